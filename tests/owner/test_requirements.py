import hashlib
from pathlib import Path

import pytest
from tests.owner.wheels import build_wheel

from cloister.errors import MalformedApp, NotTrusted
from cloister.owner.requirements import fetched


def test_locked_packages_are_fetched_as_wheels(tmp_path: Path, index: Path) -> None:
    with fetched(tmp_path / "lock.txt") as wheels:
        ((name, path),) = wheels
        assert name.startswith("itsdangerous-")
        assert path.read_bytes() == (index / name).read_bytes()
    assert not path.exists()


def test_a_package_that_was_modified_is_refused(tmp_path: Path, index: Path) -> None:
    (wheel,) = index.iterdir()
    wheel.write_bytes(wheel.read_bytes() + b"more")
    with pytest.raises(NotTrusted, match="not the one that was locked"), fetched(tmp_path / "lock.txt"):
        pass


def test_a_lock_that_was_modified_is_refused(tmp_path: Path, index: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(lock.read_text().replace("sha256:", "sha256:00")[:-3] + "\n")
    with pytest.raises((NotTrusted, MalformedApp)), fetched(lock):
        pass


@pytest.mark.parametrize("content", ["itsdangerous\n", "itsdangerous==99 --hash=sha256:" + "0" * 64 + "\n"])
def test_requirements_without_hashes_or_that_are_nowhere_are_refused(tmp_path: Path, index: Path, content: str) -> None:
    lock = tmp_path / "other.txt"
    lock.write_text(content)
    with pytest.raises(MalformedApp), fetched(lock):
        pass


def test_a_dependency_that_the_lock_forgot_is_refused(tmp_path: Path, index: Path) -> None:
    lock = tmp_path / "lock.txt"
    wheel = build_wheel("jinja2", index)
    version = wheel.name.split("-")[1]
    lock.write_text(f"jinja2=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    with pytest.raises(MalformedApp), fetched(lock):
        pass


def test_a_lock_of_nothing_is_refused(tmp_path: Path, index: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("# nothing\n")
    with pytest.raises(MalformedApp), fetched(lock):
        pass
