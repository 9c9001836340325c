"""An app's code and its wheels, out of memory into a folder in memory. Archives are the owner's, and still not trusted
with a path: nothing lands outside of the folder."""

import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

__all__ = ["unpack_code", "unpack_wheels"]

_DATA = ("purelib", "platlib")


def unpack_code(archive: IO[bytes], folder: Path) -> None:
    """A tar of files. Raises: ValueError for a member that is no file or leads elsewhere; tarfile.TarError."""
    for name, content in _files(archive):
        _write(folder, name, content)


def unpack_wheels(archive: IO[bytes], folder: Path) -> None:
    """A tar of wheels, each put where an installer would put its modules. Scripts and headers are left out.

    Raises: as `unpack_code`; zipfile.BadZipFile.
    """
    for name, content in _files(archive):
        if not name.endswith(".whl"):
            raise ValueError("not a wheel")
        with zipfile.ZipFile(content) as wheel:
            for member in wheel.infolist():
                if (target := _installed(member.filename)) and not member.is_dir():
                    with wheel.open(member) as file:
                        _write(folder, target, file)


def _files(archive: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=archive, mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise ValueError("not a file")
            yield member.name, content


def _installed(name: str) -> str:
    """Where a wheel's file goes below the folder of packages; "" for what is not installed there."""
    first, _, rest = name.partition("/")
    if not first.endswith(".data"):
        return name
    scheme, _, path = rest.partition("/")
    return path if scheme in _DATA else ""


def _write(folder: Path, name: str, content: IO[bytes]) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
        raise ValueError("leads out of its folder")
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
