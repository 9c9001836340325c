"""A GPT-NeoX model of random weights in the GGML format of 2023 (magic `ggml`), which ctransformers reads, and we do not.

Layout: ggml/examples/gpt-neox/main.cpp of August 2023: header, vocabulary, tensors, with no table of contents.
"""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from gguf.quants import quantize

from cloister.bench.shapes import SHAPES, Shape
from cloister.errors import WrongUse

__all__ = ["write_ggml"]

_MAGIC = 0x67676D6C
_QUANTIZATION_VERSION = 2000
_FTYPE_Q5_0 = 8
_KIND = gguf.GGMLQuantizationType.Q5_0
_F32 = 0
_ROWS = 64


def write_ggml(name: str, folder: Path, *, note: Callable[[str], None]) -> Path:
    """The q5_0 file of that shape in `folder`, written once. Raises: WrongUse when it is no GPT-NeoX."""
    shape = SHAPES[name]
    if shape.architecture != "gptneox":
        raise WrongUse("Only GPT-NeoX shapes are written in the old format.", got=shape.architecture)
    path = folder / f"{name}-random-q5_0.ggml"
    if path.exists():
        return path
    note(f"writing {path.name} (random weights, once)")
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            _write(file, shape)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _write(file: BinaryIO, shape: Shape) -> None:
    header = (shape.vocabulary, shape.context, shape.width, shape.heads, shape.layers, shape.rotary)
    file.write(struct.pack("<I8i", _MAGIC, *header, 1, _QUANTIZATION_VERSION + _FTYPE_Q5_0))  # 1: parallel residual
    for number in range(shape.vocabulary):
        word = f"w{number}".encode()
        file.write(struct.pack("<I", len(word)) + word)
    random = np.random.default_rng(0)
    tiles = {
        columns: quantize(random.standard_normal((_ROWS, columns), dtype=np.float32) * columns**-0.5, _KIND).tobytes()
        for columns in (shape.width, shape.feed_forward)
    }
    for tensor, rows, columns in _matrices(shape):
        _describe(file, f"{tensor}.weight", (columns, rows), int(_KIND))
        whole, rest = divmod(rows, _ROWS)
        file.writelines(tiles[columns] for _ in range(whole))
        file.write(tiles[columns][: rest * len(tiles[columns]) // _ROWS])
    for tensor, size, value in _vectors(shape):
        _describe(file, tensor, (size,), _F32)
        file.write(np.full(size, value, np.float32).tobytes())


def _describe(file: BinaryIO, name: str, shape: tuple[int, ...], kind: int) -> None:
    file.write(struct.pack("<3i", len(shape), len(name), kind) + struct.pack(f"<{len(shape)}i", *shape) + name.encode())


def _blocks(shape: Shape) -> Iterator[tuple[str, int, int]]:
    for layer in range(shape.layers):
        block = f"gpt_neox.layers.{layer}"
        yield f"{block}.attention.query_key_value", 3 * shape.width, shape.width
        yield f"{block}.attention.dense", shape.width, shape.width
        yield f"{block}.mlp.dense_h_to_4h", shape.feed_forward, shape.width
        yield f"{block}.mlp.dense_4h_to_h", shape.width, shape.feed_forward


def _matrices(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """Name, rows, columns."""
    yield "gpt_neox.embed_in", shape.vocabulary, shape.width
    yield "embed_out", shape.vocabulary, shape.width
    yield from _blocks(shape)


def _vectors(shape: Shape) -> Iterator[tuple[str, int, float]]:
    """Name, length, the one value."""
    norms = [f"gpt_neox.layers.{layer}.{name}" for layer in range(shape.layers) for name in _NORMS]
    for norm in ("gpt_neox.final_layer_norm", *norms):
        yield f"{norm}.weight", shape.width, 1.0
        yield f"{norm}.bias", shape.width, 0.0
    for matrix, rows, _ in _blocks(shape):
        yield f"{matrix}.bias", rows, 0.0


_NORMS = ("input_layernorm", "post_attention_layernorm")
