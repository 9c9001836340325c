"""The model's bytes: what is hashed is what is loaded.

They are copied once into sealed memory and hashed on the way; under Gramine, which has no such memory, the file is taken as
it lies, because there nothing else than measured bytes can be read.
"""

import fcntl
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cloister.errors import MalformedModel, WrongUse

__all__ = ["Weights", "open_measured", "seal_weights"]

_CHUNK = 1 << 23


@dataclass(slots=True)
class Weights:
    """A model file that cannot change any more. `sha256` (hex) and `size` (bytes) are of exactly what `fd` holds."""

    fd: int
    sha256: str
    size: int
    modified: int

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def seal_weights(path: Path, *, expected: str | None = None) -> Weights:
    """Copy `path` into memory that nobody, we included, can change afterwards.

    The file may change, or be changed, while it is read and after: the copy does not. What is such memory already is taken
    as it is. With `expected` (hex) another digest is refused. Does not look at what the bytes mean.

    Raises: WrongUse (no such file, or no memfd here), MalformedModel (digest differs).
    """
    if not hasattr(os, "memfd_create"):
        raise WrongUse("This platform has no memfd: the engine needs Linux.")
    digest = hashlib.sha256()
    try:
        fd = os.memfd_create("model", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise _unreadable(error) from error
    try:
        size = 0
        with path.open("rb", buffering=0) as source:
            modified = int(os.fstat(source.fileno()).st_mtime)
            sealed = _is_sealed(source.fileno())
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                view = memoryview(chunk)
                while view and not sealed:
                    view = view[os.write(fd, view) :]
                size += len(chunk)
            if sealed:
                os.dup2(source.fileno(), fd, inheritable=False)
            else:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _seals())
    except OSError as error:
        os.close(fd)
        raise _unreadable(error) from error
    return _expected(Weights(fd=fd, sha256=digest.hexdigest(), size=size, modified=modified), expected)


def open_measured(path: Path, *, expected: str | None = None) -> Weights:
    """Take `path` as it lies, where the system below answers for every byte that is read: under Gramine alone, which opens
    no file that its measured manifest does not name, and compares each read with the digest there.

    Anywhere else the file could be another one when it is loaded than when it was hashed. With `expected` (hex) another
    digest is refused. Does not look at what the bytes mean.

    Raises: WrongUse (no such file), MalformedModel (digest differs).
    """
    try:
        with path.open("rb", buffering=0) as source:
            digest, status = hashlib.file_digest(source, "sha256"), os.fstat(source.fileno())
            fd = os.dup(source.fileno())
    except OSError as error:
        raise _unreadable(error) from error
    found = Weights(fd=fd, sha256=digest.hexdigest(), size=status.st_size, modified=int(status.st_mtime))
    return _expected(found, expected)


def _unreadable(error: OSError) -> WrongUse:
    return WrongUse("The model file cannot be read into memory.", got=error.strerror or type(error).__name__)


def _expected(weights: Weights, sha256: str | None) -> Weights:
    """Raises: MalformedModel for another digest, after closing."""
    if sha256 is not None and weights.sha256 != sha256:
        weights.close()
        raise MalformedModel(
            "The model file is no longer the one that was loaded.", expected=sha256, got=weights.sha256
        )
    return weights


def _seals() -> int:
    return fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def _is_sealed(fd: int) -> bool:
    """Whether it is memory that nobody can change."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _seals() == _seals()
    except OSError:
        return False  # a file
