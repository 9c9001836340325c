"""Where llama.cpp keeps a context's cache, so that it can be overwritten piece by piece.

Its own `llama_memory_clear` overwrites everything at once, which keeps a request waiting where the cache is a gibibyte,
and its API names no address. So the allocator of the CPU's buffers is watched while a context is opened, and those
buffers that `llama_memory_clear` then overwrites are the cache.
"""

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cloister.enclave.llm.llama.library import library_dir

__all__ = ["Region", "overwrite", "overwritten_by", "watched_buffers"]

_PIECE = 4 << 20
"""Bytes overwritten between two looks at whether there is work: less than a millisecond's."""
_Alloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_MARK = 0xA5
_WATCHING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Region:
    """`size` bytes of this process from `address` on."""

    address: int
    size: int


class _BufferType(ctypes.Structure):
    """The beginning of `struct ggml_backend_buffer_type` of ggml-backend-impl.h; the engine's source is locked."""

    _fields_ = (("get_name", ctypes.c_void_p), ("alloc_buffer", ctypes.c_void_p))


class _Buffer(ctypes.Structure):
    """The beginning of `struct ggml_backend_buffer`, likewise."""

    _fields_ = (("free_buffer", ctypes.c_void_p),)


@contextlib.contextmanager
def watched_buffers() -> Iterator[list[Region]]:
    """The buffers in the CPU's memory that are allocated meanwhile and not freed again: complete at the end."""
    ggml = ctypes.CDLL(str(library_dir() / "libggml-base.so"))
    ggml.ggml_backend_cpu_buffer_type.restype = ctypes.POINTER(_BufferType)
    ggml.ggml_backend_buffer_get_base.restype = ctypes.c_void_p
    ggml.ggml_backend_buffer_get_size.restype = ctypes.c_size_t
    frees: dict[int, int] = {}

    def alloc(kind: int | None, size: int) -> int | None:
        buffer: int | None = _Alloc(own_alloc)(kind, size)
        if buffer and size:
            head = _Buffer.from_address(buffer)
            frees[buffer], head.free_buffer = head.free_buffer, _address(free_hook)
        return buffer

    def free(buffer: int) -> None:
        _Free(frees.pop(buffer))(buffer)

    alloc_hook, free_hook = _Alloc(alloc), _Free(free)
    regions: list[Region] = []
    with _WATCHING:
        kind = ggml.ggml_backend_cpu_buffer_type().contents
        own_alloc, kind.alloc_buffer = kind.alloc_buffer, _address(alloc_hook)
        try:
            yield regions
        finally:
            kind.alloc_buffer = own_alloc
            for buffer, own_free in frees.items():
                _Buffer.from_address(buffer).free_buffer = own_free
                handle = ctypes.c_void_p(buffer)
                regions.append(
                    Region(ggml.ggml_backend_buffer_get_base(handle), ggml.ggml_backend_buffer_get_size(handle))
                )


def _address(hook: Any) -> int:
    return ctypes.cast(hook, ctypes.c_void_p).value or 0


def overwritten_by(clear: Callable[[], None], regions: list[Region]) -> tuple[Region, ...]:
    """Which of the regions `clear` fills with zeros: it is called once, and what stood at their ends is lost."""
    ends = {region: (region.address, region.address + region.size - 1) for region in regions}
    for address in (address for pair in ends.values() for address in pair):
        ctypes.memset(address, _MARK, 1)
    clear()
    return tuple(r for r, pair in ends.items() if all(ctypes.string_at(address, 1) == b"\0" for address in pair))


def overwrite(regions: tuple[Region, ...], stop: Callable[[], bool]) -> bool:
    """Fill the regions with zeros, unless `stop`, asked every few milliseconds, says True. Whether all is done."""
    for region in regions:
        for at in range(0, region.size, _PIECE):
            if stop():
                return False
            ctypes.memset(region.address + at, 0, min(_PIECE, region.size - at))
    return True
