"""What was once seen never goes back: in a process, and in a file that many processes share."""

import json
import multiprocessing
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cloister.client import memory
from cloister.client.memory import FileMemory, Memory, ProcessMemory, platform_scope, release_scope, seen_file
from cloister.errors import WrongUse


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "seen.json"


@pytest.fixture(params=["process", "file"])
def remembering(request: pytest.FixtureRequest, path: Path) -> Memory:
    return ProcessMemory() if request.param == "process" else FileMemory(path)


def test_what_was_never_seen_is_zero(remembering: Memory) -> None:
    assert remembering.highest("scope", "release") == 0


def test_numbers_rise_and_never_fall(remembering: Memory) -> None:
    for value, highest in ((3, 3), (2, 3), (3, 3), (7, 7), (0, 7)):
        remembering.note("scope", {"release": value})
        assert remembering.highest("scope", "release") == highest


def test_each_scope_and_each_name_counts_for_itself(remembering: Memory) -> None:
    remembering.note("a", {"x": 5, "y": 1})
    remembering.note("b", {"x": 2})
    assert [remembering.highest(*at) for at in (("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"))] == [5, 1, 2, 0]


def test_a_number_that_is_not_mentioned_is_not_forgotten(remembering: Memory) -> None:
    remembering.note("a", {"x": 5})
    remembering.note("a", {"y": 1})
    assert remembering.highest("a", "x") == 5


def test_scopes_do_not_run_into_each_other() -> None:
    assert release_scope("ed25519:A", "b") != release_scope("ed25519:B", "b") != release_scope("ed25519:B", "c")
    assert platform_scope("tdx") != platform_scope("sgx")


@pytest.mark.parametrize("counters", [{"x": -1}, {"x": 1 << 160}, {"n" * 257: 1}, {str(at): 1 for at in range(257)}])
def test_what_does_not_fit_is_refused_and_not_dropped(remembering: Memory, counters: dict[str, int]) -> None:
    if counters == {"x": -1}:
        remembering.note("a", counters)  # lower than what is known, as all that was never seen is 0
        assert remembering.highest("a", "x") == 0
        return
    with pytest.raises(WrongUse):
        remembering.note("a", counters)


def test_a_full_memory_says_so_and_forgets_nothing(remembering: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_SCOPES", 3)
    for at in range(3):
        remembering.note(f"scope {at}", {"x": 1})
    with pytest.raises(WrongUse) as caught:
        remembering.note("one more", {"x": 1})
    assert "full" in caught.value.hint
    remembering.note("scope 0", {"x": 2})
    assert [remembering.highest(f"scope {at}", "x") for at in range(3)] == [2, 1, 1]


# The file


def test_another_process_remembers(path: Path) -> None:
    FileMemory(path).note("scope", {"release": 4})
    assert FileMemory(path).highest("scope", "release") == 4


def test_only_its_user_may_read_it(path: Path) -> None:
    FileMemory(path).note("scope", {"release": 4})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert sorted(each.name for each in path.parent.iterdir()) == [".seen.json.lock", "seen.json"]


def test_no_news_writes_nothing(path: Path) -> None:
    FileMemory(path).note("scope", {"release": 4})
    before = path.stat().st_mtime_ns, path.stat().st_ino
    FileMemory(path).note("scope", {"release": 3})
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


def _whole(seen: Any) -> bytes:
    return json.dumps({"version": 1, "seen": seen}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"version":1}',
        b'{"version":2,"seen":{}}',
        b'{"version":1,"seen":{},"more":1}',
        _whole([]),
        _whole({"a": 1}),
        _whole({"a": {"x": "1"}}),
        _whole({"a": {"x": -1}}),
        _whole({"a": {"x": True}}),
        _whole({"a": {"x": 1.0}}),
        _whole({"a": {"x": 1 << 160}}),
        _whole({"s" * 257: {"x": 1}}),
        _whole({"a": {str(at): 1 for at in range(257)}}),
        _whole({str(at): {} for at in range(4097)}),
        b" " * (4 << 20) + _whole({}),
        b'{"version":1,"seen":{"a":{"x":' + b"9" * 5000 + b"}}}",
    ],
    ids=lambda content: content[:32].decode("latin-1"),
)
def test_a_damaged_file_is_an_error_and_no_fresh_start(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_bytes(content)
    path.chmod(0o600)
    for use in (lambda: FileMemory(path).highest("a", "x"), lambda: FileMemory(path).note("a", {"x": 1})):
        with pytest.raises(WrongUse) as caught:
            use()
        assert "damaged" in caught.value.message
        assert "forgets" in caught.value.hint
    assert path.read_bytes() == content


@pytest.mark.parametrize("where", [Path, lambda path: path.parent])
def test_what_others_could_have_written_is_not_believed(path: Path, where: Callable[[Path], Path]) -> None:
    FileMemory(path).note("scope", {"release": 4})
    where(path).chmod(0o722)
    with pytest.raises(WrongUse) as caught:
        FileMemory(path).highest("scope", "release")
    assert "chmod go-w" in caught.value.hint


def test_a_place_that_cannot_be_written_is_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WrongUse):
        FileMemory(tmp_path / "file" / "seen.json").note("scope", {"release": 4})
    (tmp_path / "seen.json").mkdir(mode=0o700)
    with pytest.raises(WrongUse):
        FileMemory(tmp_path / "seen.json").highest("scope", "release")


def test_writers_at_the_same_time_lose_nothing_of_each_others(path: Path) -> None:
    """Processes and threads, each with a name of its own and one that all share."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_many, args=(path, f"process {at}")) for at in range(2)]
    threads = [threading.Thread(target=_write_many, args=(path, f"thread {at}")) for at in range(2)]
    workers: list[Any] = [*processes, *threads]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    seen = json.loads(path.read_text())["seen"]
    assert seen.pop("shared") == {"x": 8}
    assert seen == {f"{kind} {at}": {"x": 8} for kind in ("process", "thread") for at in range(2)}


def _write_many(path: Path, scope: str) -> None:
    for value in range(1, 9):
        FileMemory(path).note(scope, {"x": value})
        FileMemory(path).note("shared", {"x": value})


def test_a_writer_that_dies_holds_nobody_up(path: Path) -> None:
    """Its lock goes with it, and what it had not put in place was never there."""
    FileMemory(path).note("scope", {"x": 1})
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_die_while_writing, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    FileMemory(path).note("scope", {"x": 3})
    assert FileMemory(path).highest("scope", "x") == 3


def _die_while_writing(path: Path) -> None:
    with mock.patch("os.fsync", lambda descriptor: os._exit(9)):
        FileMemory(path).note("scope", {"x": 2})


def test_it_lies_where_state_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert seen_file() == tmp_path / "cloister" / "seen.json" == FileMemory().path
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", unusable)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert seen_file() == tmp_path / ".local" / "state" / "cloister" / "seen.json"
