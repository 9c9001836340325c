"""Files that their user alone may read."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cloister import private_file
from cloister.errors import WrongUse

Write = Callable[[Path, bytes], None]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("write", [private_file.write, private_file.write_once])
def test_what_is_written_is_its_users_alone_whatever_the_umask(tmp_path: Path, write: Write) -> None:
    before = os.umask(0)
    try:
        write(tmp_path / "one", b"secret")
    finally:
        os.umask(before)
    assert (mode(tmp_path / "one"), (tmp_path / "one").read_bytes()) == (0o600, b"secret")
    assert list(tmp_path.iterdir()) == [tmp_path / "one"]


def test_writing_replaces_what_was_there_and_its_rights(tmp_path: Path) -> None:
    path = tmp_path / "one"
    path.write_bytes(b"old")
    path.chmod(0o666)
    private_file.write(path, b"new")
    assert (mode(path), path.read_bytes()) == (0o600, b"new")


def test_writing_through_a_link_replaces_the_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"kept")
    (tmp_path / "one").symlink_to(tmp_path / "elsewhere")
    private_file.write(tmp_path / "one", b"new")
    assert (tmp_path / "elsewhere").read_bytes() == b"kept"
    assert not (tmp_path / "one").is_symlink()


def test_what_was_written_once_stays(tmp_path: Path) -> None:
    private_file.write_once(tmp_path / "one", b"first")
    private_file.write_once(tmp_path / "one", b"second")
    assert (tmp_path / "one").read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [tmp_path / "one"]


@pytest.mark.parametrize("write", [private_file.write, private_file.write_once])
def test_what_fails_leaves_what_was_there(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cloister.private_file.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "one", b"new")
    assert (tmp_path / "one").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "one"]


@pytest.mark.parametrize("write", [private_file.write, private_file.write_once])
def test_the_name_is_on_the_disk_after_the_content(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), (tmp_path / "one").exists()))

    monkeypatch.setattr("cloister.private_file.os.fsync", fsync)
    write(tmp_path / "one", b"new")
    assert synced == [(False, False), (True, True)]


@pytest.mark.parametrize("rights", [0o640, 0o604, 0o620, 0o602, 0o610])
def test_what_others_can_reach_is_refused(tmp_path: Path, rights: int) -> None:
    private_file.write(tmp_path / "one", b"")
    private_file.refuse_shared(tmp_path / "one")
    (tmp_path / "one").chmod(rights)
    with pytest.raises(WrongUse, match="Others can reach") as caught:
        private_file.refuse_shared(tmp_path / "one", step="here")
    assert (caught.value.step, "chmod go-rwx" in caught.value.hint) == ("here", True)


@pytest.mark.parametrize(("rights", "fine"), [(0o644, True), (0o664, False), (0o646, False)])
def test_what_others_may_read_but_not_write(tmp_path: Path, rights: int, *, fine: bool) -> None:
    (tmp_path / "one").write_bytes(b"")
    (tmp_path / "one").chmod(rights)
    (tmp_path / "link").symlink_to("one")
    if fine:
        private_file.refuse_shared(tmp_path / "link", readable=True)
        return
    with pytest.raises(WrongUse, match="Others can write"):
        private_file.refuse_shared(tmp_path / "link", readable=True)


def test_links_and_what_somebody_else_owns_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_file.write(tmp_path / "one", b"")
    (tmp_path / "link").symlink_to("one")
    with pytest.raises(WrongUse):
        private_file.refuse_shared(tmp_path / "link")
    monkeypatch.setattr("cloister.private_file.os.getuid", lambda: tmp_path.stat().st_uid + 1)
    for readable in (True, False):
        with pytest.raises(WrongUse):
            private_file.refuse_shared(tmp_path / "one", readable=readable)


def test_a_file_that_is_not_there_is_said_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        private_file.refuse_shared(tmp_path / "one")
