"""What a model will take of memory, before a byte of it is loaded.

The engine copies the file into sealed memory, llama.cpp reads it from there into memory of its own, and the sealed copy
is dropped when all is loaded. So at the peak there are the file, the weights, the cache and the buffers; afterwards
there is all of that but the file. Not counted: the interpreters of the enclave's processes, some 0.1 GB together.
"""

import contextlib
import platform
from dataclasses import dataclass
from pathlib import Path

from cloister.errors import WrongUse
from cloister.models.gguf import Description

__all__ = ["KV_TYPES", "Estimate", "available_memory", "estimate", "judge", "kv_bytes", "kv_cells"]

KV_TYPES = {"f16": (1, 2), "q8_0": (32, 34)}
"""Type of the cache's entries -> how many stand in a block, and the block's bytes."""

_MOST_CONTEXT = 16384
_LEAST_CACHE, _MOST_CACHE, _MOST_PARTED = 1 << 30, 1 << 31, 1 << 32
_MOST_SCORES = 1 << 28
_VECTOR = 16
_PADDING = 256
_CHUNK = 512
_SEQUENCES = 2
_UNKNOWN = 1 << 62
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes, but `context` (tokens per stream), `streams`, and `cells` (tokens that the cache holds for all streams).

    `weights`: as they lie in memory. `buffers`: llama.cpp's for computing. `file`: the sealed copy while loading.
    """

    context: int
    streams: int
    cells: int
    file: int
    weights: int
    kv: int
    buffers: int

    @property
    def resident(self) -> int:
        return self.weights + self.kv + self.buffers

    @property
    def peak(self) -> int:
        return self.file + self.resident

    def __str__(self) -> str:
        """In one line, to be said before loading."""
        return (
            f"{_gib(self.resident)}, {_gib(self.peak)} while loading: weights {_gib(self.weights)}, "
            f"cache {_gib(self.kv)} for {self.streams} streams of {self.context:,} tokens"
        )


def kv_bytes(model: Description, cells: int, kv_type: str = "f16") -> int:
    """Keys and values of `cells` tokens, every layer's window taken as the whole context, as the engine does."""
    entries, size = KV_TYPES[kv_type]
    rows = (heads * length for heads in model.kv_heads for length in (model.key_length, model.value_length))
    return cells * sum(-(-row // entries) * size for row in rows)


def kv_cells(model: Description, *, context: int, streams: int, kv_type: str = "f16", free: int = 0) -> int:
    """How many tokens the engine's cache holds, of `free` bytes: a part of one context for each stream, where they fit,
    or else `streams` contexts at most in one cache for all, and never less than one."""
    if _is_parted(model, context=context, streams=streams, kv_type=kv_type, free=free):
        return streams * context
    return max(context, min(streams * context, _within(model, _MOST_CACHE, kv_type=kv_type, free=free)))


def _is_parted(model: Description, *, context: int, streams: int, kv_type: str, free: int) -> bool:
    cells = streams * _padded(context)
    return kv_type == "f16" and cells <= _within(model, _MOST_PARTED, kv_type=kv_type, free=free)


def _within(model: Description, most: int, *, kv_type: str, free: int) -> int:
    """Cells that fit what the cache may take, of `most` bytes at most."""
    budget = min(max(free // 4, _LEAST_CACHE), most)
    return budget * _PADDING // max(kv_bytes(model, _PADDING, kv_type), 1)


def _padded(cells: int) -> int:
    return -(-cells // _PADDING) * _PADDING


def estimate(
    model: Description,
    *,
    context: int | None = None,
    streams: int = 16,
    kv_type: str = "f16",
    available: int = 0,
) -> Estimate:
    """What the engine takes to serve `model`. `context` None: the model's own, at most 16,384, as the engine does.

    `available` (bytes, before loading): the engine's cache may take a
    quarter of what is free beside the weights, between one and two gibibytes, or four where that is enough for a part
    of its own for every stream. Measured: `resident` is within 10 % for
    llama and gptneox. Where layers keep a state instead of a cache (Mamba and its like) that state is missing here.
    """
    context = context or min(model.context, _MOST_CONTEXT)
    weights = _weights(model)
    free = 0 if available == _UNKNOWN else available - model.file_size - weights
    cells = kv_cells(model, context=context, streams=streams, kv_type=kv_type, free=free)
    parted = _is_parted(model, context=context, streams=streams, kv_type=kv_type, free=free)
    each, number = (context, streams) if parted else (cells, 1)
    cells = number * _padded(each)
    return Estimate(
        context=context,
        streams=streams,
        cells=cells,
        file=model.file_size,
        weights=weights,
        kv=kv_bytes(model, cells, kv_type),
        buffers=_buffers(model, cells, streams) + (_scores(model, context) if parted and _has_scores(model) else 0),
    )


def _weights(model: Description) -> int:
    """Where the output shares its matrix with the embedding, llama.cpp keeps the two in two layouts."""
    total = 0
    tied = all(tensor.name != "output.weight" for tensor in model.tensors)
    for tensor in model.tensors:
        total += tensor.size * (2 if tied and tensor.name == "token_embd.weight" else 1)
    return total


def _buffers(model: Description, cells: int, streams: int) -> int:
    """For a chunk of a prompt: which cell sees which (16 bit), a handful of rows as wide as the model, and two as wide
    as its feed-forward part (32 bit); and for every sequence a row of logits."""
    width = max(model.width, model.heads * model.key_length)
    rows = _CHUNK * (2 * cells + 4 * (5 * width + 2 * model.feed_forward))
    return rows + 4 * _SEQUENCES * streams * model.vocabulary


def _has_scores(model: Description) -> bool:
    """Whether the engine goes without flash attention where every stream has a part, as it is slow there for few rows."""
    return platform.machine() != "x86_64" or bool(model.key_length % _VECTOR or model.value_length % _VECTOR)


def _scores(model: Description, context: int) -> int:
    """Without flash attention: a chunk's rows against a whole conversation, for every head, in 32 bit."""
    row = 4 * model.heads * context
    return row * min(_CHUNK, max(1, _MOST_SCORES // max(row, 1) // 64) * 64)


def judge(needed: Estimate, available: int) -> str:
    """A warning when loading comes near to what is available (bytes), "" when there is plenty.

    Raises: WrongUse when even the sealed copy and the weights together are more: loading would end in the kernel
    killing something.
    """
    least = needed.file + needed.weights
    if least > available:
        raise WrongUse(
            f"This model does not fit: loading takes {_gib(needed.peak)} and {_gib(available)} are free.",
            hint="Choose a smaller model or quantization: cloister models quantize",
            expected=f"at least {_gib(least)} free",
            got=_gib(available),
        )
    if needed.peak > available * 9 // 10:
        return f"memory is tight: loading takes {_gib(needed.peak)}, and {_gib(available)} are free"
    return ""


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be had now without swapping: the kernel's word, and what a control group leaves. More than any
    machine has where neither says anything. `root` for tests."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())  # "max" is no number: there is no limit
        found.append(max(0, limit - int((group / "memory.current").read_text())))
    return min(found, default=_UNKNOWN)
