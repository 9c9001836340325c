"""Where uploaded bundles rest: each under the SHA-256 of its bytes, whole or not at all.

An upload grows in a file of its own, `SHA256.SIZE.part`, and is renamed to its SHA-256 when every byte is there, hashes
to it and is synced. One that broke off goes on from its file's size, after a restart of the host too.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloister.errors import Conflict, HostFull, Malformed, NotFound, WrongUse

__all__ = ["Appending", "Bundles", "Upload", "UploadLimits"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"([0-9a-f]{64})\.([0-9]{1,15})\.part")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_READ = 1 << 20


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Bytes. `most`: of one bundle. `quota`: of all. `reserve`: what stays free on the disk for everything else."""

    most: int = 256 << 30
    quota: int = 1 << 40
    reserve: int = 256 << 20


@dataclass(frozen=True, slots=True)
class Upload:
    """`offset`: the bytes that are here; `complete`: all of them, and they are what their name says."""

    sha256: str
    size: int
    offset: int
    complete: bool


@dataclass(slots=True)
class _Hashed:
    """A digest over a part's first `length` bytes, kept while its upload goes on in this process."""

    digest: Any = field(default_factory=hashlib.sha256)
    length: int = 0


def _free(path: Path) -> int:
    return shutil.disk_usage(path).free


class Bundles:
    def __init__(
        self, folder: Path, limits: UploadLimits | None = None, *, free: Callable[[Path], int] = _free
    ) -> None:
        """`free`: the bytes that a folder's disk has left."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._limits = limits or UploadLimits()
        self._free = free
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self._hashed: dict[str, _Hashed] = {}

    def path(self, sha256: str) -> Path:
        """Of a whole bundle. Raises: NotFound; WrongUse for what is no SHA-256."""
        path = self._folder / _checked(sha256)
        if not path.is_file():
            raise NotFound("The host does not have that bundle.", hint="`cloister deploy` uploads it.", step="bundle")
        return path

    def begin(self, sha256: str, size: int) -> Upload:
        """A new upload, or where an earlier one stands.

        Raises: WrongUse for a size out of bounds; HostFull; Conflict for another size than was said before.
        """
        if not 0 < size <= self._limits.most:
            raise WrongUse(
                "A bundle of that size is not taken.",
                hint="The operator sets the limit: cloister host --max-bundle",
                step="upload",
                expected=f"1 to {self._limits.most} bytes",
                got=str(size),
            )
        with self._lock:
            known = self._find(_checked(sha256))
            if known is not None and known.size != size:
                raise Conflict("That upload was begun with another size.", step="upload", expected=str(known.size))
            if known is not None and known.complete:
                os.utime(self._folder / sha256)  # somebody has come for it
                return known
            self._check_room(sha256, size, size - (known.offset if known else 0))
            part = self._part(sha256, size)
            with _translated():
                if known is None:
                    part.touch(mode=0o600)
                else:  # which is not made anew where it has just become the whole one, or gone
                    with contextlib.suppress(FileNotFoundError):
                        os.utime(part)
        return self.state(sha256)

    def state(self, sha256: str) -> Upload:
        """Raises: NotFound for an upload that was never begun."""
        found = self._find(_checked(sha256))
        if found is None:
            raise NotFound("There is no such upload.", hint="Begin it first.", step="upload")
        return found

    @contextmanager
    def appending(self, sha256: str, offset: int) -> Iterator["Appending"]:
        """Takes the bytes that follow `offset`. What was written stays when it breaks off; with a full disk it goes.

        Raises: NotFound for an upload that was never begun; Conflict for another offset, or an upload under way; what
        `Appending` raises.
        """
        with self._alone(sha256):
            upload = self.state(sha256)
            if upload.complete or upload.offset != offset:
                raise Conflict(
                    "The upload stands at another offset.", step="upload", expected=str(upload.offset), got=str(offset)
                )
            hashed = self._hashed.setdefault(sha256, _Hashed())
            try:
                with self._part(sha256, upload.size).open("ab", buffering=0) as file:
                    yield Appending(file, upload, hashed)
            except HostFull:
                self._drop(upload)
                raise

    def finish(self, sha256: str) -> Upload:
        """Where the upload stands now; if every byte is here, it is hashed, synced and named first.

        Raises: Malformed, with nothing left of it, when its bytes are not those of its name; HostFull; Conflict.
        """
        with self._alone(sha256):
            upload = self.state(sha256)
            if upload.complete or upload.offset < upload.size:
                return upload
            part = self._part(sha256, upload.size)
            hashed = self._hashed.pop(sha256, _Hashed())
            found = hashed.digest.hexdigest() if hashed.length == upload.size else _file_digest(part)
            if found != sha256:
                self._drop(upload)
                raise Malformed(
                    "What arrived is not the bundle that was announced.",
                    hint="Upload it again.",
                    step="upload",
                    expected=sha256,
                    got=found,
                )
            with _translated():
                _sync(part)
                part.replace(self._folder / sha256)
                _sync(self._folder)
        return Upload(sha256, upload.size, upload.size, complete=True)

    def drop(self, sha256: str) -> None:
        """Removes a whole bundle; nothing happens where there is none."""
        with self._lock:
            (self._folder / _checked(sha256)).unlink(missing_ok=True)

    def drop_stale(self, older_than: float, used: Iterable[str]) -> None:
        """Removes uploads, and bundles that no app uses, whose last byte came before that time (Unix seconds)."""
        kept = set(used)
        for upload in self._all():
            path = self._folder / upload.sha256 if upload.complete else self._part(upload.sha256, upload.size)
            with self._lock, contextlib.suppress(FileNotFoundError):  # none begins or goes on meanwhile
                if upload.sha256 not in kept | self._busy and path.stat().st_mtime < older_than:
                    self._hashed.pop(upload.sha256, None)
                    path.unlink()

    @property
    def stored(self) -> int:
        """Bytes of all that is here, whole or not."""
        return sum(upload.offset for upload in self._all())

    @contextmanager
    def _alone(self, sha256: str) -> Iterator[None]:
        with self._lock:
            if sha256 in self._busy:
                raise Conflict("That bundle is being uploaded already.", hint="Try again in a moment.", step="upload")
            self._busy.add(sha256)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(sha256)

    def _check_room(self, sha256: str, size: int, missing: int) -> None:
        """What other uploads were promised is not there for this one."""
        others = [upload for upload in self._all() if upload.sha256 != sha256]
        total = sum(upload.size for upload in others) + size
        if total > self._limits.quota:
            raise HostFull(
                "The host's room for bundles is full.",
                hint="Remove an app, or ask the operator for more: cloister host --quota",
                step="upload",
                expected=f"at most {self._limits.quota} bytes in all",
                got=str(total),
            )
        promised = sum(upload.size - upload.offset for upload in others)
        free = self._free(self._folder) - self._limits.reserve - promised
        if missing > free:
            raise HostFull(
                "The host's disk has no room for this bundle.",
                hint="Remove an app, or ask the operator for a larger disk.",
                step="upload",
                expected=f"{missing} bytes free",
                got=f"{max(free, 0)} bytes",
            )

    def _all(self) -> Iterator[Upload]:
        return filter(None, map(_found, sorted(self._folder.iterdir())))

    def _find(self, sha256: str) -> Upload | None:
        whole = self._folder / sha256
        # The part is looked for first: it may become the whole one meanwhile, and never the other way.
        part = next((upload for upload in self._all() if upload.sha256 == sha256 and not upload.complete), None)
        return _found(whole) or part

    def _part(self, sha256: str, size: int) -> Path:
        return self._folder / f"{sha256}.{size}.part"

    def _drop(self, upload: Upload) -> None:
        self._hashed.pop(upload.sha256, None)
        self._part(upload.sha256, upload.size).unlink(missing_ok=True)


class Appending:
    """One stretch of an upload: give it bytes in order."""

    def __init__(self, file: Any, upload: Upload, hashed: _Hashed) -> None:
        self._file = file
        self._left = upload.size - upload.offset
        self._hashed = hashed
        self._follows = hashed.length == upload.offset

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Raises: WrongUse for more than was announced (nothing of it is written); HostFull when the disk is."""
        if len(data) > self._left:
            raise WrongUse("More arrived than the upload announced.", step="upload", expected=f"{self._left} bytes")
        rest = memoryview(data)
        with _translated():
            while rest:
                rest = rest[self._file.write(rest) :]
        self._left -= len(data)
        if self._follows:
            self._hashed.digest.update(data)
            self._hashed.length += len(data)


def _checked(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise WrongUse("A bundle is named by its SHA-256: 64 lower-case hexadecimal digits.", step="bundle")
    return sha256


def _found(path: Path) -> Upload | None:
    """None for what is no upload, or has gone since it was listed."""
    part = _PART.fullmatch(path.name)
    if part is None and not _SHA256.fullmatch(path.name):
        return None
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    return (
        Upload(path.name, size, size, complete=True)
        if part is None
        else Upload(part[1], int(part[2]), size, complete=False)
    )


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        hint = "Nothing of it was kept. Remove an app, or ask the operator for a larger disk."
        raise HostFull("The host's disk is full.", hint=hint, step="upload") from error


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_READ)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
