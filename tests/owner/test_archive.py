import io
import os
import tarfile
from pathlib import Path

import pytest

from cloister.errors import MalformedApp
from cloister.owner.archive import Source, file_source, tar_source


def content(source: Source) -> bytes:
    return b"".join(bytes(piece) for piece in source.pieces())


def test_a_tar_is_as_long_as_foretold_and_holds_the_files(tmp_path: Path) -> None:
    bodies = {"a.py": b"1", "deep/" + "n" * 120 + ".html": os.urandom(2 << 20), "empty": b"", "ä.txt": b"x" * 512}
    files = []
    for number, (name, body) in enumerate(bodies.items()):
        path = tmp_path / str(number)
        path.write_bytes(body)
        files.append((name, path))
    source = tar_source("code", files)
    found = content(source)
    assert len(found) == source.size
    with tarfile.open(fileobj=io.BytesIO(found)) as archive:
        read = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert read == bodies


def test_times_owners_and_modes_leave_no_trace(tmp_path: Path) -> None:
    found = []
    for number in range(2):
        path = tmp_path / str(number)
        path.write_bytes(b"same")
        path.chmod(0o600 + number * 0o155)
        os.utime(path, (number * 1000, number * 1000))
        found.append(content(tar_source("code", [("main.py", path)])))
    assert found[0] == found[1]


def test_it_can_be_read_twice(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(os.urandom(3 << 20))
    for source in (file_source("model", path), tar_source("code", [("a", path)])):
        assert content(source) == content(source)


@pytest.mark.parametrize("change", ["longer", "shorter", "touched"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    source = file_source("model", path)
    if change == "touched":
        os.utime(path, (1, 1))
    else:
        path.write_bytes(b"x" * (200 if change == "longer" else 50))
    with pytest.raises(MalformedApp, match="changed while"):
        content(source)
