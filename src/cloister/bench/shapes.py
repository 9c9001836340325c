"""Models in true shapes with random weights: speed does not depend on what the weights are, quality does.

The vocabulary is synthetic (256 bytes, then fillers), so nothing is needed but the `gguf` package.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray

__all__ = ["SHAPES", "Shape", "write_random"]

_CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
_BLOCK_ROWS = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """A GPT-NeoX shape: layers, width, feed-forward width, heads, vocabulary, context (tokens), rotary dimensions."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    vocabulary: int
    context: int
    rotary: int


SHAPES = {
    "pythia-1b": Shape(16, 2048, 8192, 8, 50304, 2048, 64),
    "pythia-70m": Shape(6, 512, 2048, 8, 50304, 2048, 16),
}


def _byte_level() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(byte if byte in printable else next(extra)) for byte in range(256)]


class _Noise:
    """One quantized block of noise, repeated: a gigabyte is written in seconds."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._blocks: dict[int, NDArray[np.uint8]] = {}

    def matrix(self, rows: int, columns: int) -> NDArray[np.uint8]:
        if columns not in self._blocks:
            values = self._random.standard_normal((_BLOCK_ROWS, columns), dtype=np.float32) * columns**-0.5
            self._blocks[columns] = quantize(values, gguf.GGMLQuantizationType.Q8_0)
        return np.tile(self._blocks[columns], (-(-rows // _BLOCK_ROWS), 1))[:rows]


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*specials, *_byte_level()]
    tokens += [f"w{number}" for number in range(size - len(tokens))]
    types = [gguf.TokenType.CONTROL] * len(specials) + [gguf.TokenType.NORMAL] * (size - len(specials))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(_CHATML)


def _add_header(writer: gguf.GGUFWriter, name: str, shape: Shape) -> None:
    writer.add_name(f"{name} shape, random weights")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(shape.rotary)
    writer.add_parallel_residual(use=True)
    _add_vocabulary(writer, shape.vocabulary)


def _add_tensors(writer: gguf.GGUFWriter, shape: Shape) -> None:
    noise = _Noise()

    def matrix(name: str, rows: int, columns: int, *, bias: bool = True) -> None:
        writer.add_tensor(f"{name}.weight", noise.matrix(rows, columns), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        if bias:
            writer.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.width, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(shape.width, np.float32))

    matrix("token_embd", shape.vocabulary, shape.width, bias=False)
    norm("output_norm")
    matrix("output", shape.vocabulary, shape.width, bias=False)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        matrix(f"{block}.attn_qkv", 3 * shape.width, shape.width)
        matrix(f"{block}.attn_output", shape.width, shape.width)
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.ffn_up", shape.feed_forward, shape.width)
        matrix(f"{block}.ffn_down", shape.width, shape.feed_forward)


def write_random(name: str, folder: Path, *, note: Callable[[str], None]) -> Path:
    """The q8_0 GGUF of that shape in `folder`, written once; a file that was cut short is never taken for whole."""
    path = folder / f"{name}-random-q8_0.gguf"
    if path.exists():
        return path
    note(f"writing {path.name} (random weights, once)")
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        with contextlib.closing(gguf.GGUFWriter(partial, "gptneox")) as writer:
            _add_header(writer, name, SHAPES[name])
            _add_tensors(writer, SHAPES[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
