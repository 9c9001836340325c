import ctypes
from pathlib import Path
from typing import Any

import pytest
from tests.enclave.llm.llama.random_model import write_model

from cloister.enclave.llm.llama import LoopSettings, memory
from cloister.enclave.llm.llama.library import library_dir
from cloister.enclave.llm.llama.memory import Region, overwrite, overwritten_by, watched_buffers
from cloister.enclave.llm.llama.model import Model


def region(size: int) -> tuple[Region, "ctypes.Array[ctypes.c_char]"]:
    room = ctypes.create_string_buffer(b"\x07" * size, size)
    return Region(ctypes.addressof(room), size), room


def test_the_cache_is_found_where_the_context_keeps_it(library: Any, tmp_path: Path) -> None:
    """Two layers, two heads of 16 numbers, keys and values of 16 bit, for as many cells as there are."""
    model = Model(library, write_model(tmp_path / "model.gguf"), LoopSettings(slots=2, threads=1))
    assert sum(found.size for found in model._cache) == model.kv_tokens * 2 * 2 * 2 * 16 * 2
    model.close()


def test_only_what_lives_on_is_watched(library: Any) -> None:
    ggml = ctypes.CDLL(str(library_dir() / "libggml-base.so"))
    for function in (ggml.ggml_backend_cpu_buffer_type, ggml.ggml_backend_buft_alloc_buffer):
        function.restype = ctypes.c_void_p

    def alloc(size: int) -> ctypes.c_void_p:
        kind = ctypes.c_void_p(ggml.ggml_backend_cpu_buffer_type())
        return ctypes.c_void_p(ggml.ggml_backend_buft_alloc_buffer(kind, ctypes.c_size_t(size)))

    before = alloc(1 << 10)
    with watched_buffers() as found:
        gone, empty, kept = alloc(1 << 11), alloc(0), alloc(1 << 12)
        ggml.ggml_backend_buffer_free(gone)
    after = alloc(1 << 13)
    assert [one.size for one in found] == [1 << 12]
    for buffer in (before, empty, kept, after):
        ggml.ggml_backend_buffer_free(buffer)


def test_what_is_not_cleared_is_not_taken_for_the_cache() -> None:
    (cache, cache_room), (other, other_room) = region(64), region(64)
    half, half_room = region(64)

    def clear() -> None:
        ctypes.memset(cache.address, 0, cache.size)
        ctypes.memset(half.address, 0, half.size // 2)

    assert overwritten_by(clear, [other, cache, half]) == (cache,)
    assert len(cache_room) == len(other_room) == len(half_room) == 64


def test_overwriting_ends_between_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PIECE", 16)
    (one, first), (two, second) = region(40), region(20)
    looks = iter([False, False, True])
    assert not overwrite((one, two), lambda: next(looks))
    assert first.raw == bytes(32) + b"\x07" * 8
    assert second.raw == b"\x07" * 20
    assert overwrite((one, two), lambda: False)
    assert (first.raw, second.raw) == (bytes(40), bytes(20))
