"""What goes into a bundle, as a stream of known length that can be read twice: files as a tar, or one file as it is.

The tar is the same for the same files, whoever packs them, where and when: names sorted by the caller, no times, no owners,
no modes, headers in the PAX form.
"""

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cloister.errors import MalformedApp

__all__ = ["Source", "file_source", "tar_source"]

Pieces: TypeAlias = Iterator[memoryview | bytes]

_BLOCK = tarfile.BLOCKSIZE
_READ = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """`pieces` may be called again and gives the same bytes, `size` in all, or raises MalformedApp when a file changed."""

    name: str
    size: int
    pieces: Callable[[], Pieces]


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> "_File":
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def pieces(self) -> Pieces:
        """Raises: MalformedApp when it is no longer the file that was looked at."""
        buffer = memoryview(bytearray(_READ))
        left = self.size
        with self.path.open("rb", buffering=0) as file:
            while left and (count := file.readinto(buffer[: min(left, _READ)])):
                left -= count
                yield buffer[:count]
            status = os.fstat(file.fileno())
        if left or (status.st_size, status.st_mtime_ns) != (self.size, self.changed):
            raise MalformedApp(f"{self.path.name} changed while it was packaged.", step="package", hint="Try again.")


def file_source(name: str, path: Path) -> Source:
    """Raises: OSError."""
    file = _File.of(path)
    return Source(name, file.size, file.pieces)


def tar_source(name: str, files: Sequence[tuple[str, Path]]) -> Source:
    """`files`: (name in the archive, file). Raises: OSError."""
    entries = [
        (_header(inside, file.size), file) for inside, file in ((inside, _File.of(path)) for inside, path in files)
    ]
    size = sum(len(header) + file.size + _padding(file.size) for header, file in entries) + 2 * _BLOCK

    def pieces() -> Pieces:
        for header, file in entries:
            yield header
            yield from file.pieces()
            yield bytes(_padding(file.size))
        yield bytes(2 * _BLOCK)

    return Source(name, size, pieces)


def _header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> int:
    return -size % _BLOCK
