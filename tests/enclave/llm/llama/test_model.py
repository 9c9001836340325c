import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.enclave.llm.llama.conftest import SETTINGS
from tests.enclave.llm.llama.random_model import START, write_model

from cloister.enclave.llm.llama import LoopSettings, loop
from cloister.enclave.llm.llama.model import Model
from cloister.errors import WrongUse

CELLS = 40
ROW = 2 * 16 * 2
"""Bytes of a cell in one layer's keys, or values: the random model has two heads of 16 numbers for them, 16 bit each."""
LENGTH = CELLS * ROW
WINDOW = 1 << 22
PAD = 259


@pytest.fixture(params=["parted", "shared"])
def used(library: Any, model_path: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    """It has read two prompts, and holds the first one's cells for a third sequence too."""
    cells = 0 if request.param == "parted" else 1024
    model = Model(library, model_path, LoopSettings(slots=4, threads=1, kv_tokens=cells))
    assert model.parted == (request.param == "parted")
    model.decode([(token, at, 0, at == CELLS - 1) for at, token in enumerate(range(50, 50 + CELLS))])
    model.decode([(token, at, 1, at == 19) for at, token in enumerate(range(100, 120))])
    model.share(0, 2, CELLS)
    yield model
    model.close()


def last_positions(model: Model) -> list[int]:
    return [int(model._lib.llama_memory_seq_pos_max(model._memory, at)) for at in range(model.sequences)]


def save(model: Model) -> "ctypes.Array[ctypes.c_uint8]":
    """What llama.cpp saves of the first sequence: cells, then keys and values layer by layer as they lie in the cache."""
    size = model._lib.llama_state_seq_get_size(model.context, 0)
    state: ctypes.Array[ctypes.c_uint8] = (ctypes.c_uint8 * size)()
    assert model._lib.llama_state_seq_get_data(model.context, state, size, 0) == size
    return state


def find_rows(state: memoryview) -> list[int]:
    """Where a layer's keys, or values, begin in what was saved: after their type, f16, and a row's length."""
    head = (1).to_bytes(4, "little") + ROW.to_bytes(8, "little")
    return [at + len(head) for at in range(len(state) - LENGTH) if state[at : at + len(head)] == head]


def writable_windows() -> Iterator[tuple[int, int]]:
    """Addresses of all that this process can write to, in windows that overlap by what is looked for."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, *_ = line.split()
        low, high = (int(part, 16) for part in span.split("-"))
        if rights.startswith("rw"):
            yield from ((start, min(start + WINDOW, high)) for start in range(low, high, WINDOW - LENGTH))


def find_in_memory(needle: memoryview) -> set[int]:
    """Every address where it stands in this process. Copies nothing but into one window."""
    found = set()
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    with mmap.mmap(-1, WINDOW) as window:
        own = ctypes.addressof(ctypes.c_char.from_buffer(window))
        for low, high in writable_windows():
            try:
                count = min(os.preadv(memory, [window], low), high - low)
            except OSError:
                continue  # a guard page, or no longer there
            at = window.find(needle, 0, count)
            while at >= 0:
                found.add(low + at)
                at = window.find(needle, at + 1, count)
    os.close(memory)
    return {at for at in found if not own <= at < own + WINDOW}


def test_erasing_forgets_every_sequence(used: Model) -> None:
    assert last_positions(used)[:3] == [CELLS - 1, 19, CELLS - 1]
    used.erase()
    assert last_positions(used) == [-1] * used.sequences


def test_erasing_leaves_no_byte_of_what_was_read(used: Model) -> None:
    state = save(used)
    saved = memoryview(state).cast("B")
    starts = find_rows(saved)
    assert len(starts) >= 2, "the keys of both layers"
    places = set()
    for start in starts:
        elsewhere = find_in_memory(saved[start : start + LENGTH]) - {ctypes.addressof(state) + start}
        assert elsewhere, "in the cache"
        places |= elsewhere
    used.erase()
    assert {ctypes.string_at(place, LENGTH) for place in places} == {bytes(LENGTH)}
    ctypes.memset(state, 0, len(state))  # or the next search finds it in memory that was given back


def test_the_batch_has_room_for_what_the_loop_fills_it_up_to() -> None:
    assert LoopSettings(chunk=loop._SMALLEST_CHUNK).chunk == 64
    with pytest.raises(WrongUse):
        LoopSettings(chunk=loop._SMALLEST_CHUNK - 1)


def test_control_tokens_that_mark_calls_and_thoughts_are_shown(
    library: Any, model: Model, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.piece(PAD) == b""
    monkeypatch.setattr("cloister.enclave.llm.llama.model.MARKERS", ("<|pad|>",))
    marked = Model(library, model_path, SETTINGS)
    assert (marked.piece(PAD), marked.piece(START)) == (b"<|pad|>", b"")
    marked.close()


def test_says_how_it_writes_calls_and_thoughts(library: Any, tmp_path: Path) -> None:
    template = "{% if tools %}<tool_call>{% endif %}{% if add_generation_prompt %}<think>{% endif %}"
    other = Model(library, write_model(tmp_path / "other.gguf", template=template), SETTINGS)
    assert (other.describe().calls, other.describe().thinking) == ("hermes", "opened")
    other.close()


def test_tells_how_each_tokens_piece_begins(model: Model) -> None:
    beginnings = model.beginnings().tolist()
    assert len(beginnings) == model.vocabulary
    assert [divmod(beginnings[token], 257) for token in (ord("a"), START, 258)] == [
        (ord("a"), 0),
        (256, 0),
        (ord("t"), ord("h") + 1),
    ]
