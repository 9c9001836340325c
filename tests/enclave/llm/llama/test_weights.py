import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cloister.enclave.llm.llama.weights import Weights, open_measured, seal_weights
from cloister.errors import MalformedModel, WrongUse


def test_the_copy_is_hashed_and_nobody_can_change_it(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"weights" * 100000)
    with seal_weights(path) as weights:
        assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert weights.size == 700000
        for damage in (
            lambda: os.pwrite(weights.fd, b"x", 0),
            lambda: os.ftruncate(weights.fd, 1),
            lambda: os.ftruncate(weights.fd, 1 << 20),
        ):
            with pytest.raises(PermissionError):
                damage()
        path.write_bytes(b"other")
        assert os.pread(weights.fd, 7, 0) == b"weights"
    assert weights.fd == -1


def test_memory_that_nobody_can_change_is_not_copied() -> None:
    memory = os.memfd_create("model", os.MFD_ALLOW_SEALING)
    os.write(memory, b"weights")
    path = Path(f"/proc/self/fd/{memory}")
    with seal_weights(path) as copy:
        assert os.fstat(copy.fd).st_ino != os.fstat(memory).st_ino
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
    with seal_weights(path) as same:
        assert os.fstat(same.fd).st_ino == os.fstat(memory).st_ino
        assert (same.size, same.sha256) == (7, hashlib.sha256(b"weights").hexdigest())
    assert os.pread(memory, 7, 0) == b"weights"
    os.close(memory)


def test_a_machine_without_memory_files_left_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    monkeypatch.setattr(os, "memfd_create", full)
    with pytest.raises(WrongUse):
        seal_weights(path)


def test_where_every_file_is_measured_it_is_taken_as_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"weights" * 100000)
    monkeypatch.delattr(os, "memfd_create")
    with open_measured(path) as weights:
        assert (weights.sha256, weights.size) == (hashlib.sha256(path.read_bytes()).hexdigest(), 700000)
        assert os.fstat(weights.fd).st_ino == path.stat().st_ino
        assert Path(f"/proc/self/fd/{weights.fd}").read_bytes() == path.read_bytes()
    assert weights.fd == -1


@pytest.mark.parametrize("take", [seal_weights, open_measured])
def test_refuses_another_digest(tmp_path: Path, take: Callable[..., Weights]) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    good = hashlib.sha256(b"weights").hexdigest()
    take(path, expected=good).close()
    with pytest.raises(MalformedModel):
        take(path, expected="f" + good[1:])


@pytest.mark.parametrize("take", [seal_weights, open_measured])
def test_says_when_there_is_no_such_file(tmp_path: Path, take: Callable[..., Weights]) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(WrongUse):
            take(path)
