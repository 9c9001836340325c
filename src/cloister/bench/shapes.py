"""Models in true shapes with random weights: speed does not depend on what the weights are, quality does.

The vocabulary is synthetic (256 bytes, then fillers), so nothing is needed but the `gguf` package. Left out is what
costs no time: the scaling of rotary positions beyond the context that a model was first trained with.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Literal, cast

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize
from numpy.typing import NDArray

from cloister.errors import WrongUse
from cloister.models.gguf import Description
from cloister.models.gguf import Tensor as FileTensor

__all__ = ["FULL_SHAPES", "SHAPES", "TYPES", "Shape", "Tensor", "check_room", "describe", "tensors", "write_random"]

_CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
_BLOCK_ROWS = 64
_SPARE = 1 << 28
"""Bytes that stay free on the disk."""

TYPES: Mapping[str, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = MappingProxyType(
    {
        "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
        "q5_1": (gguf.GGMLQuantizationType.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
        "q5_0": (gguf.GGMLQuantizationType.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
        "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    }
)
"""What weights can be written in. All matrices are, the output too, which llama.cpp's quantizer likes to keep finer."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a model's published config.json, in GGUF's words.

    `head` and `rotary`: dimensions of a head, and how many of them are rotated; 0 where GGUF need not say.
    `tied`: the output is the embedding. `window`: tokens that the sliding layers look back on.
    """

    architecture: str
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    epsilon: float = 1e-5
    head: int = 0
    rotary: int = 0
    rope_base: float = 10_000.0
    tied: bool = False
    window: int = 0
    experts: int = 0
    experts_used: int = 0

    @property
    def head_size(self) -> int:
        return self.head or self.width // self.heads

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in tensors(self))


# Published: huggingface.co/<repository>/blob/main/config.json, the repository named beside each.
FULL_SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "pythia-70m": Shape("gptneox", 6, 512, 2048, 8, 8, 50304, 2048, rotary=16),  # EleutherAI/pythia-70m
        "pythia-1b": Shape("gptneox", 16, 2048, 8192, 8, 8, 50304, 2048, rotary=64),  # EleutherAI/pythia-1b
        "pythia-12b": Shape("gptneox", 36, 5120, 20480, 40, 40, 50688, 2048, rotary=32),  # EleutherAI/pythia-12b
        "gpt-neox-20b": Shape("gptneox", 44, 6144, 24576, 64, 64, 50432, 2048, rotary=24),  # EleutherAI/gpt-neox-20b
        "falcon-7b": Shape("falcon", 32, 4544, 18176, 71, 1, 65024, 2048),  # tiiuae/falcon-7b
        "falcon-40b": Shape("falcon", 60, 8192, 32768, 128, 8, 65024, 2048),  # tiiuae/falcon-40b
        "mpt-7b": Shape("mpt", 32, 4096, 16384, 32, 32, 50432, 2048, tied=True),  # mosaicml/mpt-7b
        "mpt-30b": Shape("mpt", 48, 7168, 28672, 64, 64, 50432, 8192, tied=True),  # mosaicml/mpt-30b
        "llama-3.2-1b": Shape(  # meta-llama/Llama-3.2-1B
            "llama", 16, 2048, 8192, 32, 8, 128256, 131072, rotary=64, rope_base=5e5, tied=True
        ),
        "mistral-7b": Shape(  # mistralai/Mistral-7B-v0.3
            "llama", 32, 4096, 14336, 32, 8, 32768, 32768, rotary=128, rope_base=1e6
        ),
        "qwen2-0.5b": Shape(  # Qwen/Qwen2-0.5B
            "qwen2", 24, 896, 4864, 14, 2, 151936, 131072, epsilon=1e-6, rope_base=1e6, tied=True
        ),
        "qwen3-1.7b": Shape(  # Qwen/Qwen3-1.7B
            "qwen3", 28, 2048, 6144, 16, 8, 151936, 40960, epsilon=1e-6, head=128, rope_base=1e6, tied=True
        ),
        "gemma-3-1b": Shape(  # google/gemma-3-1b-pt
            "gemma3", 26, 1152, 6912, 4, 1, 262144, 32768, 1e-6, head=256, rope_base=1e6, tied=True, window=512
        ),
        "gpt-oss-20b": Shape(  # openai/gpt-oss-20b
            "gpt-oss", 24, 2880, 2880, 64, 8, 201088, 131072,
            head=64, rotary=64, rope_base=1.5e5, window=128, experts=32, experts_used=4,
        ),
    }
)  # fmt: skip

_MINI: Mapping[str, Shape] = MappingProxyType(
    {
        "gptneox-mini": Shape("gptneox", 2, 128, 512, 4, 4, 512, 1024, rotary=8),
        "falcon-mini": Shape("falcon", 2, 192, 768, 3, 1, 512, 1024),  # falcon-7b's kind of block
        "falcon-grouped-mini": Shape("falcon", 2, 256, 1024, 4, 2, 512, 1024),  # falcon-40b's
        "mpt-mini": Shape("mpt", 2, 128, 512, 4, 4, 512, 1024, tied=True),
        "llama-mini": Shape("llama", 2, 128, 512, 4, 2, 512, 1024, rotary=32, tied=True),
        "qwen2-mini": Shape("qwen2", 2, 128, 512, 4, 2, 512, 1024, epsilon=1e-6, tied=True),
        "qwen3-mini": Shape("qwen3", 2, 128, 512, 4, 2, 512, 1024, epsilon=1e-6, head=64, tied=True),
        "gemma3-mini": Shape("gemma3", 6, 128, 512, 2, 1, 512, 1024, 1e-6, head=128, tied=True, window=64),
        "gpt-oss-mini": Shape(
            "gpt-oss", 2, 128, 128, 4, 2, 512, 1024, head=64, rotary=64, window=64, experts=8, experts_used=2
        ),
    }
)
"""The same architectures in under 3 MB, each block made as in the large ones."""

SHAPES: Mapping[str, Shape] = MappingProxyType({**FULL_SHAPES, **_MINI})


@dataclass(frozen=True, slots=True)
class Tensor:
    """`shape`: as numpy has it, rows before columns. `fill`: "weights" in the file's type, "experts" in mxfp4, "router"
    (noise), "ones" and "zeros" in f32."""

    name: str
    shape: tuple[int, ...]
    fill: Literal["weights", "experts", "router", "ones", "zeros"] = "weights"


@dataclass(frozen=True, slots=True)
class _Block:
    """How an architecture's layer is made. `norms`: over the whole width."""

    norms: tuple[str, ...]
    rms: bool = True
    norm_bias: bool = False
    fused: bool = False  # one matrix for queries, keys and values
    qkv_bias: bool = False
    bias: bool = False  # of all other matrices
    head_norms: bool = False
    gated: bool = True


_BLOCKS: Mapping[str, _Block] = MappingProxyType(
    {
        "gptneox": _Block(
            ("attn_norm", "ffn_norm"), rms=False, norm_bias=True, fused=True, qkv_bias=True, bias=True, gated=False
        ),
        "falcon": _Block(("attn_norm",), rms=False, norm_bias=True, fused=True, gated=False),
        "mpt": _Block(("attn_norm", "ffn_norm"), rms=False, fused=True, gated=False),
        "llama": _Block(("attn_norm", "ffn_norm")),
        "qwen2": _Block(("attn_norm", "ffn_norm"), qkv_bias=True),
        "qwen3": _Block(("attn_norm", "ffn_norm"), head_norms=True),
        "gemma3": _Block(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), head_norms=True),
        "gpt-oss": _Block(("attn_norm", "post_attention_norm"), qkv_bias=True, bias=True),
    }
)


def tensors(shape: Shape) -> Iterator[Tensor]:
    """All tensors of a model of that shape, as llama.cpp names them."""
    block = _BLOCKS[shape.architecture]
    yield Tensor("token_embd.weight", (shape.vocabulary, shape.width))
    yield from _norm("output_norm", shape.width, bias=block.norm_bias)
    if not shape.tied:
        yield Tensor("output.weight", (shape.vocabulary, shape.width))
    for layer in range(shape.layers):
        for part in (_norms(shape, block), _attention(shape, block), _feed_forward(shape, block)):
            for tensor in part:
                yield Tensor(f"blk.{layer}.{tensor.name}", tensor.shape, tensor.fill)


def _norms(shape: Shape, block: _Block) -> Iterator[Tensor]:
    grouped = shape.architecture == "falcon" and shape.kv_heads > 1  # falcon-40b norms both branches of its block
    for name in (*block.norms, *(("attn_norm_2",) if grouped else ())):
        yield from _norm(name, shape.width, bias=block.norm_bias)
    if block.head_norms:
        yield from _norm("attn_q_norm", shape.head_size)
        yield from _norm("attn_k_norm", shape.head_size)


def _attention(shape: Shape, block: _Block) -> Iterator[Tensor]:
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    if block.fused:
        yield from _matrix("attn_qkv", queries + 2 * keys, shape.width, bias=block.qkv_bias)
    else:
        yield from _matrix("attn_q", queries, shape.width, bias=block.qkv_bias)
        yield from _matrix("attn_k", keys, shape.width, bias=block.qkv_bias)
        yield from _matrix("attn_v", keys, shape.width, bias=block.qkv_bias)
    yield from _matrix("attn_output", shape.width, queries, bias=block.bias)
    if shape.architecture == "gpt-oss":
        yield Tensor("attn_sinks.weight", (shape.heads,), "zeros")


def _feed_forward(shape: Shape, block: _Block) -> Iterator[Tensor]:
    inner = {"ffn_gate": (shape.feed_forward, shape.width)} if block.gated else {}
    inner |= {"ffn_up": (shape.feed_forward, shape.width), "ffn_down": (shape.width, shape.feed_forward)}
    if not shape.experts:
        for name, (rows, columns) in inner.items():
            yield from _matrix(name, rows, columns, bias=block.bias)
        return
    yield Tensor("ffn_gate_inp.weight", (shape.experts, shape.width), "router")
    yield Tensor("ffn_gate_inp.bias", (shape.experts,), "zeros")
    for name, (rows, columns) in inner.items():
        yield Tensor(f"{name}_exps.weight", (shape.experts, rows, columns), "experts")
        yield Tensor(f"{name}_exps.bias", (shape.experts, rows), "zeros")


def _matrix(name: str, rows: int, columns: int, *, bias: bool) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (rows, columns))
    if bias:
        yield Tensor(f"{name}.bias", (rows,), "zeros")


def _norm(name: str, size: int, *, bias: bool = False) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (size,), "ones")
    if bias:
        yield Tensor(f"{name}.bias", (size,), "zeros")


def write_random(
    name: str,
    folder: Path,
    *,
    note: Callable[[str], None],
    type: str = "q8_0",  # noqa: A002 (GGUF's word)
    progress: Callable[[float], None] = lambda _share: None,
) -> Path:
    """The GGUF of that shape (of `SHAPES`) and type (of `TYPES`) in `folder`, written once, in constant memory.

    A file that was cut short is never taken for whole. `progress` is told the share that is written.

    Raises: WrongUse when the disk has no room for it.
    """
    path = folder / f"{name}-random-{type}.gguf"
    if path.exists():
        return path
    note(f"writing {path.name} (random weights, once)")
    folder.mkdir(parents=True, exist_ok=True)
    check_room(path, describe(SHAPES[name], type).file_size)
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        with contextlib.closing(gguf.GGUFWriter(partial, SHAPES[name].architecture)) as writer:
            _add_header(writer, name, SHAPES[name], type)
            _write(writer, SHAPES[name], type, progress)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def describe(shape: Shape, type: str) -> Description:  # noqa: A002 (GGUF's word)
    """What the file says of itself once it is written; its header, a few megabytes at most, is left out of its size."""
    listed = []
    for tensor in tensors(shape):
        kind = _type_of(tensor, type)
        listed.append(FileTensor(tensor.name, tensor.shape[::-1], kind.name, 0, _bytes(tensor.shape, kind)))
    return Description(
        architecture=shape.architecture,
        name="",
        licence="",
        quantization=type,
        chat_template=_CHATML,
        context=shape.context,
        vocabulary=shape.vocabulary,
        width=shape.width,
        feed_forward=shape.feed_forward,
        heads=shape.heads,
        kv_heads=(shape.kv_heads,) * shape.layers,
        key_length=shape.head_size,
        value_length=shape.head_size,
        tensors=tuple(listed),
        file_size=sum(tensor.size for tensor in listed),
    )


def check_room(path: Path, size: int) -> None:
    """Whether a file of `size` bytes can be written at `path`. Raises: WrongUse."""
    free = shutil.disk_usage(path.parent).free
    if free < size + _SPARE:
        raise WrongUse(
            f"The disk has no room for {path.name}.",
            expected=f"{(size + _SPARE) / 1e9:.1f} GB free in {path.parent}",
            got=f"{free / 1e9:.1f} GB",
            hint="Free some, or set XDG_CACHE_HOME to a folder on a larger disk.",
        )


def _type_of(tensor: Tensor, type: str) -> gguf.GGMLQuantizationType:  # noqa: A002 (GGUF's word)
    match tensor.fill:
        case "weights":
            return TYPES[type][0]
        case "experts":
            return gguf.GGMLQuantizationType.MXFP4
        case _:
            return gguf.GGMLQuantizationType.F32


def _bytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // per_block * block_bytes


def _byte_level() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(byte if byte in printable else next(extra)) for byte in range(256)]


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


def _add_header(writer: gguf.GGUFWriter, name: str, shape: Shape, type: str) -> None:  # noqa: A002 (GGUF's word)
    writer.add_name(f"{name} shape, random weights")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE if shape.experts else TYPES[type][1])
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    if _BLOCKS[shape.architecture].rms:
        writer.add_layer_norm_rms_eps(shape.epsilon)
    else:
        writer.add_layer_norm_eps(shape.epsilon)
    if shape.head:
        writer.add_key_length(shape.head)
        writer.add_value_length(shape.head)
    if shape.rotary:
        writer.add_rope_dimension_count(shape.rotary)
    if shape.window:
        writer.add_sliding_window(shape.window)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.feed_forward)
    match shape.architecture:
        case "gptneox":
            writer.add_parallel_residual(use=True)
        case "mpt":
            writer.add_max_alibi_bias(8.0)
        case _:
            writer.add_rope_freq_base(shape.rope_base)
    _add_vocabulary(writer, shape.vocabulary)


class _Tiles:
    """A few rows of each width and type, made once and repeated: a gigabyte is written in seconds."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._tiles: dict[tuple[str, int, gguf.GGMLQuantizationType], NDArray[np.uint8]] = {}

    def of(self, tensor: Tensor, kind: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
        """The bytes of some rows."""
        key = (tensor.fill, tensor.shape[-1], kind)
        if key not in self._tiles:
            self._tiles[key] = quantize(self._values(tensor), kind).view(np.uint8).reshape(-1)
        return self._tiles[key]

    def _values(self, tensor: Tensor) -> NDArray[np.float32]:
        columns = tensor.shape[-1]
        if tensor.fill in ("ones", "zeros"):
            return np.full((1, columns), tensor.fill == "ones", np.float32)
        noise: NDArray[np.float32] = self._random.standard_normal((_BLOCK_ROWS, columns), dtype=np.float32)
        return noise * np.float32(columns**-0.5)


def _write(writer: gguf.GGUFWriter, shape: Shape, type: str, progress: Callable[[float], None]) -> None:  # noqa: A002
    listed = [(tensor, _type_of(tensor, type)) for tensor in tensors(shape)]
    for tensor, kind in listed:
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, _bytes(tensor.shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = cast("list[BinaryIO]", writer.fout)[0]
    tiles, done, total = _Tiles(), 0, describe(shape, type).file_size
    for tensor, kind in listed:
        writer.write_padding(file, file.tell())
        size = _bytes(tensor.shape, kind)
        _repeat(file, tiles.of(tensor, kind), size)
        done += size
        progress(done / total)
    writer.write_padding(file, file.tell())


def _repeat(file: BinaryIO, tile: NDArray[np.uint8], size: int) -> None:
    while size > 0:
        size -= file.write(tile[:size].data)
