import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.errors import NotTrusted, WrongUse
from cloister.owner.broker_log import START, Details, Entry, Log, read_entries

KEY = Ed25519PrivateKey.generate()
NOW = 1_800_000_000.0


def log(path: Path, key: Ed25519PrivateKey = KEY) -> Log:
    return Log(path, key, clock=lambda: NOW)


def append(one: Log, event: str, details: Details) -> Entry:
    with one.turn() as write:
        return write(event, details)


def written(path: Path, lines: int = 6, reason: str = "none") -> bytes:
    one = log(path)
    for number in range(lines):
        append(one, "refused", {"url": f"http://{number}", "release": number, "reason": reason})
    return path.read_bytes()


def entries(data: bytes) -> list[Entry]:
    return list(read_entries(data, KEY.public_key()))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def test_what_was_written_is_read_in_order(path: Path) -> None:
    found = entries(written(path, 3))
    assert [(one.number, one.event, one.time) for one in found] == [(n, "refused", int(NOW)) for n in (1, 2, 3)]
    assert [one.details["url"] for one in found] == ["http://0", "http://1", "http://2"]
    assert [one.previous for one in found] == [START, found[0].digest, found[1].digest]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_hostile_word_stays_in_its_line(path: Path) -> None:
    append(log(path), "refused", {"reason": 'x"}\n{"v":1}\u2028\x1b[2J'})
    assert path.read_bytes().count(b"\n") == 1
    assert entries(path.read_bytes())[0].details["reason"] == 'x"}\n{"v":1}\u2028\x1b[2J'


def test_no_bit_of_it_may_be_another(path: Path) -> None:
    data = written(path, 3)
    for at in range(0, len(data), 3):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(NotTrusted):
            entries(changed)


@pytest.mark.parametrize("what", ["first", "middle", "swapped", "twice", "cut", "empty line", "another's"])
def test_lines_that_are_missing_moved_or_added_are_seen(path: Path, tmp_path: Path, what: str) -> None:
    lines = written(path).splitlines(keepends=True)
    stranger = tmp_path / "other"
    append(log(stranger, Ed25519PrivateKey.generate()), "refused", {})
    changed = {
        "first": lines[1:],
        "middle": lines[:2] + lines[3:],
        "swapped": [lines[0], lines[2], lines[1], *lines[3:]],
        "twice": [lines[0], *lines],
        "cut": [*lines[:-1], lines[-1][:-20]],
        "empty line": [lines[0], b"\n", *lines[1:]],
        "another's": [*lines, stranger.read_bytes()],
    }
    with pytest.raises(NotTrusted) as caught:
        entries(b"".join(changed[what]))
    assert caught.value.step == "log"


def test_a_line_of_another_log_of_the_same_broker_does_not_fit(path: Path, tmp_path: Path) -> None:
    """Same number, other past."""
    other = tmp_path / "other"
    one = log(other)
    for _ in range(2):
        append(one, "refused", {"url": "elsewhere"})
    mine, theirs = written(path, 2).splitlines(keepends=True), other.read_bytes().splitlines(keepends=True)
    with pytest.raises(NotTrusted, match="missing"):
        entries(mine[0] + theirs[1])


def test_what_was_cut_off_at_the_very_end_cannot_be_seen(path: Path) -> None:
    """Said by `cloister broker log verify`: the number and digest of the last line are to be compared."""
    lines = written(path).splitlines(keepends=True)
    assert len(entries(b"".join(lines[:-2]))) == 4


@pytest.mark.parametrize("seed", range(50))
def test_wherever_a_crash_cuts_it_whole_lines_stay_and_it_goes_on(path: Path, seed: int) -> None:
    data = written(path, reason="x" * 1000)  # what is left of a line may be longer than the next one
    at = random.Random(seed).randrange(len(data) + 1)
    path.write_bytes(data[:at])
    whole = data[:at].count(b"\n") + (data[at : at + 1] == b"\n")  # a line that lacks its newline alone is whole
    rest = at - len(b"".join(data.splitlines(keepends=True)[:whole]))
    append(log(path), "added", {})
    found = entries(path.read_bytes())
    assert path.read_bytes().startswith(b"".join(data.splitlines(keepends=True)[:whole]))
    torn = [("repaired", {"bytes": rest})] if rest > 0 else []
    assert [(one.event, dict(one.details)) for one in found[whole:]] == [*torn, ("added", {})]


WRITER = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cloister.owner.broker_log import Log
log = Log(Path(sys.argv[1]), Ed25519PrivateKey.from_private_bytes(bytes(32)), clock=lambda: 0.0)
while True:
    with log.turn() as append:
        number = append("refused", {"reason": "x" * 4000}).number
    print(number, flush=True)
"""


def test_what_was_said_to_be_written_outlives_a_kill(path: Path) -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    said = 0
    for round_ in range(5):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(3 + 2 * round_):
            said = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        for line in process.communicate()[0].splitlines(keepends=True):
            said = int(line) if line.endswith("\n") else said
        append(Log(path, key, clock=lambda: 0.0), "added", {})
        assert len(list(read_entries(path.read_bytes(), key.public_key()))) >= said + 1


def test_several_take_turns_and_each_hears_of_all(path: Path) -> None:
    heard: list[list[int]] = [[], []]
    logs = [Log(path, KEY, clock=lambda: NOW, on_entry=lambda e, h=h: h.append(e.number)) for h in heard]  # type: ignore[misc]
    for turn in (0, 0, 1, 0, 1, 1):
        append(logs[turn], "refused", {"who": turn})
    append(logs[0], "added", {})
    assert heard[0] == [1, 2, 3, 4, 5, 6, 7]
    assert heard[1] == [1, 2, 3, 4, 5, 6]
    assert [one.details.get("who") for one in entries(path.read_bytes())] == [0, 0, 1, 0, 1, 1, None]


def test_a_log_that_was_tampered_with_takes_no_line_more(path: Path) -> None:
    data = written(path)
    path.write_bytes(data.replace(b"http://2", b"http://3"))
    before = path.read_bytes()
    with pytest.raises(NotTrusted):
        append(log(path), "added", {})
    assert path.read_bytes() == before


def test_lines_cut_off_while_it_runs_are_seen(path: Path) -> None:
    one = log(path)
    append(one, "refused", {})
    kept = path.read_bytes()
    append(one, "refused", {})
    path.write_bytes(kept)
    with pytest.raises(NotTrusted, match="cut off"):
        append(one, "added", {})


def test_on_a_full_disk_nothing_half_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = log(path)
    append(one, "refused", {})
    before = path.read_bytes()
    genuine = os.pwrite

    def full(descriptor: int, data: bytes, at: int) -> int:
        if at > len(before):
            raise OSError(28, "No space left on device")
        return genuine(descriptor, data[:20], at)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(WrongUse, match="cannot be written"):
            append(one, "added", {})
    assert path.read_bytes() == before
    append(one, "added", {})
    assert [entry.event for entry in entries(path.read_bytes())] == ["refused", "added"]
