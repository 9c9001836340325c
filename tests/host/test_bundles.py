import contextlib
import errno
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cloister.errors import Conflict, HostFull, Malformed, NotFound, WrongUse
from cloister.host.bundles import Bundles, UploadLimits

CONTENT = random.Random(1).randbytes(300_000)
NAME = hashlib.sha256(CONTENT).hexdigest()
LIMITS = UploadLimits(most=1 << 20, quota=1 << 21, reserve=0)


@pytest.fixture
def bundles(tmp_path: Path) -> Bundles:
    return Bundles(tmp_path, LIMITS)


def append(bundles: Bundles, offset: int, data: bytes, name: str = NAME) -> None:
    with bundles.appending(name, offset) as sink:
        sink.write(data)


def test_a_bundle_is_there_when_every_byte_is(bundles: Bundles, tmp_path: Path) -> None:
    assert bundles.begin(NAME, len(CONTENT)).offset == 0
    append(bundles, 0, CONTENT[:1000])
    assert bundles.finish(NAME).complete is False
    with pytest.raises(NotFound):
        bundles.path(NAME)
    append(bundles, 1000, CONTENT[1000:])
    assert bundles.finish(NAME).complete is True
    assert bundles.path(NAME).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_an_upload_goes_on_in_another_process(bundles: Bundles, tmp_path: Path) -> None:
    bundles.begin(NAME, len(CONTENT))
    append(bundles, 0, CONTENT[:1000])
    later = Bundles(tmp_path, LIMITS)
    assert later.begin(NAME, len(CONTENT)).offset == 1000
    append(later, 1000, CONTENT[1000:])
    assert later.finish(NAME).complete
    assert later.begin(NAME, len(CONTENT)).complete


@pytest.mark.parametrize("at", [0, 1000, len(CONTENT) - 1])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_changed_byte_is_refused_and_nothing_is_left(tmp_path: Path, at: int, restarted: bool) -> None:
    bundles = Bundles(tmp_path, LIMITS)
    changed = bytearray(CONTENT)
    changed[at] ^= 1
    bundles.begin(NAME, len(CONTENT))
    append(bundles, 0, bytes(changed[:1000]))
    bundles = Bundles(tmp_path, LIMITS) if restarted else bundles
    append(bundles, 1000, bytes(changed[1000:]))
    with pytest.raises(Malformed):
        bundles.finish(NAME)
    assert list(tmp_path.iterdir()) == []


def test_more_than_announced_is_refused_unwritten(bundles: Bundles) -> None:
    bundles.begin(NAME, 1000)
    append(bundles, 0, CONTENT[:999])
    with pytest.raises(WrongUse, match="More arrived"):
        append(bundles, 999, CONTENT[:2])
    assert bundles.state(NAME).offset == 999


def test_a_stretch_fits_where_the_last_one_ended(bundles: Bundles) -> None:
    bundles.begin(NAME, len(CONTENT))
    append(bundles, 0, CONTENT[:1000])
    for offset in (0, 999, 1001):
        with pytest.raises(Conflict):
            append(bundles, offset, b"x")
    assert bundles.state(NAME).offset == 1000


def test_two_do_not_write_at_once(bundles: Bundles) -> None:
    bundles.begin(NAME, len(CONTENT))
    with bundles.appending(NAME, 0), pytest.raises(Conflict), bundles.appending(NAME, 0):
        pass
    append(bundles, 0, CONTENT)


def test_another_size_is_a_conflict(bundles: Bundles) -> None:
    bundles.begin(NAME, 1000)
    with pytest.raises(Conflict):
        bundles.begin(NAME, 1001)


@pytest.mark.parametrize("size", [0, -1, (1 << 20) + 1])
def test_a_size_out_of_bounds_is_refused(bundles: Bundles, size: int) -> None:
    with pytest.raises(WrongUse):
        bundles.begin(NAME, size)


@pytest.mark.parametrize(
    "name", ["", "..", "../" + NAME, NAME.upper(), NAME + "\n", NAME[:-1], NAME + ".part", f"/{NAME}", f"{NAME}/../x"]
)
def test_a_name_that_is_no_digest_leads_nowhere(bundles: Bundles, tmp_path: Path, name: str) -> None:
    for ask in (
        lambda: bundles.begin(name, 10),
        lambda: bundles.state(name),
        lambda: bundles.path(name),
        lambda: bundles.finish(name),
        lambda: append(bundles, 0, b"x", name),
    ):
        with pytest.raises(WrongUse):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_what_others_were_promised_is_not_given_twice(bundles: Bundles) -> None:
    other = "0" * 64
    bundles.begin(other, 1 << 20)
    bundles.begin(NAME, 1 << 20)
    with pytest.raises(HostFull):
        bundles.begin("1" * 64, 1)


def test_a_disk_without_room_is_said_before_a_byte_is_sent(tmp_path: Path) -> None:
    bundles = Bundles(tmp_path, UploadLimits(reserve=100), free=lambda _: 1099)
    with pytest.raises(HostFull, match="disk has no room"):
        bundles.begin(NAME, 1000)
    assert list(tmp_path.iterdir()) == []
    bundles.begin(NAME, 999)


class _FullFile:
    """Takes some bytes, then the disk is full."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count: int = self.file.write(data[: self.room])
        self.room -= count
        return count


def test_a_disk_that_fills_up_during_an_upload_keeps_nothing_of_it_and_all_before(
    bundles: Bundles, tmp_path: Path
) -> None:
    earlier = b"an earlier bundle"
    name = hashlib.sha256(earlier).hexdigest()
    bundles.begin(name, len(earlier))
    append(bundles, 0, earlier, name)
    bundles.finish(name)
    bundles.begin(NAME, len(CONTENT))
    with pytest.raises(HostFull, match="disk is full"), bundles.appending(NAME, 0) as sink:
        sink._file = _FullFile(sink._file, 1000)
        sink.write(CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert bundles.path(name).read_bytes() == earlier
    bundles.begin(NAME, len(CONTENT))
    append(bundles, 0, CONTENT)
    assert bundles.finish(NAME).complete


def test_the_kernels_own_refusal_is_a_full_disk(tmp_path: Path) -> None:
    """A limit on file sizes (RLIMIT_FSIZE) in a process of its own."""
    program = f"""
import resource, signal
from pathlib import Path
from cloister.errors import HostFull
from cloister.host.bundles import Bundles
bundles = Bundles(Path({str(tmp_path)!r}))
bundles.begin({NAME!r}, 300000)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    with bundles.appending({NAME!r}, 0) as sink:
        sink.write(bytes(300000))
except HostFull as error:
    print(error.message)
"""
    assert resource.RLIMIT_FSIZE
    assert signal.SIGXFSZ
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "The host's disk is full.", ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_wants_any_more_goes(bundles: Bundles, tmp_path: Path) -> None:
    bundles.begin(NAME, len(CONTENT))
    append(bundles, 0, CONTENT)
    bundles.finish(NAME)
    bundles.begin("0" * 64, 10)
    bundles.drop_stale(0.0, [])
    assert len(list(tmp_path.iterdir())) == 2
    bundles.drop_stale(4e9, [NAME])
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    bundles.drop_stale(4e9, [])
    assert list(tmp_path.iterdir()) == []
    bundles.drop(NAME)


def test_an_upload_under_way_is_not_swept_away(bundles: Bundles) -> None:
    bundles.begin(NAME, len(CONTENT))
    with bundles.appending(NAME, 0) as sink:
        bundles.drop_stale(4e9, [])
        sink.write(CONTENT)
    assert bundles.finish(NAME).complete


def test_no_upload_begins_to_write_into_what_is_being_swept_away(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles.begin(NAME, len(CONTENT))
    unlink, writing, ended = Path.unlink, threading.Event(), threading.Event()

    def upload() -> None:
        with contextlib.suppress(NotFound), bundles.appending(NAME, 0) as sink:
            writing.set()
            ended.wait(60)
            sink.write(CONTENT)

    thread = threading.Thread(target=upload)

    def slow(path: Path, **more: Any) -> None:
        thread.start()
        writing.wait(0.2)
        unlink(path, **more)

    monkeypatch.setattr(Path, "unlink", slow)
    bundles.drop_stale(4e9, [])
    ended.set()
    thread.join()
    assert not writing.is_set()
    with pytest.raises(NotFound):
        bundles.state(NAME)


def test_an_upload_that_becomes_whole_while_it_is_begun_again_leaves_no_second_one(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles.begin(NAME, len(CONTENT))
    append(bundles, 0, CONTENT)
    find, found = bundles._find, []

    def meanwhile(sha256: str) -> Any:
        found.append(find(sha256))
        if len(found) == 1:
            next(tmp_path.iterdir()).rename(tmp_path / NAME)
        return found[-1]

    monkeypatch.setattr(bundles, "_find", meanwhile)
    assert bundles.begin(NAME, len(CONTENT)).complete
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_bundle_that_somebody_has_come_for_is_not_swept_away(bundles: Bundles, tmp_path: Path) -> None:
    bundles.begin(NAME, len(CONTENT))
    append(bundles, 0, CONTENT)
    bundles.finish(NAME)
    os.utime(tmp_path / NAME, (0, 0))
    assert bundles.begin(NAME, len(CONTENT)).complete
    bundles.drop_stale(1000.0, [])
    assert bundles.path(NAME)


def test_what_goes_while_it_is_looked_at_is_passed_over(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles.begin(NAME, len(CONTENT))
    append(bundles, 0, CONTENT[:1000])
    gone = [tmp_path / ("0" * 64), tmp_path / f"{'1' * 64}.5.part"]
    listed = [*tmp_path.iterdir(), *gone]
    monkeypatch.setattr(Path, "iterdir", lambda _folder: iter(listed))
    assert bundles.stored == 1000
    assert bundles.begin(NAME, len(CONTENT)).offset == 1000
    with pytest.raises(NotFound):
        bundles.state("1" * 64)
    bundles.drop_stale(4e9, [])
    assert bundles.stored == 0


_UPLOADER = """
import sys, time
from pathlib import Path
from cloister.host.bundles import Bundles
folder, source, name = sys.argv[1:]
content = Path(source).read_bytes()
bundles = Bundles(Path(folder))
upload = bundles.begin(name, len(content))
print("begun", flush=True)
with bundles.appending(name, upload.offset) as sink:
    for at in range(upload.offset, len(content), 4096):
        sink.write(content[at : at + 4096])
bundles.finish(name)
print("done", flush=True)
"""


def test_fifty_kills_at_random_moments_leave_a_whole_bundle_or_none(tmp_path: Path) -> None:
    """One process after another goes on with the upload, until it is killed by the number of bytes that it has written."""
    chance = random.Random(6)
    folder = tmp_path / "bundles"
    content = chance.randbytes(4 << 20)
    name = hashlib.sha256(content).hexdigest()
    (tmp_path / "source").write_bytes(content)
    kills = 0
    for _ in range(50):
        process = subprocess.Popen(
            [
                sys.executable,
                "-S",
                "-c",
                f"import sys; sys.path[:0] = {sys.path!r}\n{_UPLOADER}",
                str(folder),
                str(tmp_path / "source"),
                name,
            ],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        with_part = chance.randrange(4 << 20)
        while process.poll() is None and _written(folder) < with_part:
            pass
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
        names = {path.name for path in folder.iterdir()}
        assert names <= {name, f"{name}.{len(content)}.part"}
        assert len(names) == 1
        whole = folder / name
        if whole.exists():
            assert hashlib.sha256(whole.read_bytes()).hexdigest() == name
            whole.unlink()
    assert kills > 20
    last = Bundles(folder)
    upload = last.begin(name, len(content))
    append(last, upload.offset, content[upload.offset :], name)
    assert last.finish(name).complete


def _written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.part"))
