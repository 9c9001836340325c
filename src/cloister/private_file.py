"""Files that their user alone may read (0600): written whole or not at all, and refused when others can reach them."""

import contextlib
import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from cloister.errors import WrongUse

__all__ = ["refuse_shared", "write", "write_once"]

_ANYTHING, _WRITING = 0o077, 0o022


def write(path: Path, content: bytes) -> None:
    """In the place of what was there. Does not look who may reach the folder. Raises: OSError."""
    with _draft(path, content) as draft:
        draft.replace(path)
        _sync(path.parent)


def write_once(path: Path, content: bytes) -> None:
    """Unless something is there: of two processes that come at once the first one's stands, and the caller reads `path`
    to know which. Raises: OSError."""
    with _draft(path, content) as draft, contextlib.suppress(FileExistsError):
        os.link(draft, path)
        _sync(path.parent)


def _sync(folder: Path) -> None:
    """So that the name is on the disk too, where folders can be synced."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _draft(path: Path, content: bytes) -> Iterator[Path]:
    """A file beside `path` that is on the disk already."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def refuse_shared(path: Path, *, step: str = "", readable: bool = False) -> None:
    """For a file or folder; on Windows, which has other rights, nothing is looked at.

    Raises: OSError; WrongUse, of `step`, when somebody else owns it or may read or change it, or it is a link. `readable`:
    others may read it, and it may be a link.
    """
    if sys.platform == "win32":
        return
    status = path.stat() if readable else path.lstat()
    others = stat.S_IMODE(status.st_mode) & (_WRITING if readable else _ANYTHING)
    if status.st_uid != os.getuid() or others or stat.S_ISLNK(status.st_mode):
        what, rights = ("write", "go-w") if readable else ("reach", "go-rwx")
        hint = f"If nobody has {'changed' if readable else 'read or changed'} it: chmod {rights} {path}"
        raise WrongUse(f"Others can {what} {path}.", hint=hint, step=step)
