"""The seam between the drivers and the machine: the few operations of Linux that attestation needs."""

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from cloister.errors import ConnectionFailed, MalformedEvidence

__all__ = ["Device", "LinuxDevice", "Mode", "iowr", "opened", "read_file", "said_by_hardware", "write_file"]

Mode: TypeAlias = Literal["r", "w", "rw"]

_FLAGS: Mapping[Mode, int] = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}
_PIECE = 64 * 1024


class Device(Protocol):
    """What a machine can do, as its kernel does it: every method fails with OSError and the kernel's number."""

    def open(self, path: str, mode: Mode) -> int:
        """A handle. Creates no file, truncates none, is not inherited by children."""

    def read(self, handle: int, size: int) -> bytes:
        """At most `size` bytes; b"" at the end."""

    def write(self, handle: int, data: bytes) -> int:
        """How many bytes were taken, by one write."""

    def ioctl(self, handle: int, request: int, argument: bytearray) -> int:
        """`argument` is changed in place, also where the call fails. Pointers inside it are real addresses."""

    def close(self, handle: int) -> None: ...

    def mkdir(self, path: str) -> None: ...

    def rmdir(self, path: str) -> None: ...

    def exists(self, path: str) -> bool: ...

    def listdir(self, path: str) -> tuple[str, ...]: ...


class LinuxDevice:
    """The machine that this process runs on."""

    def open(self, path: str, mode: Mode) -> int:
        return os.open(path, _FLAGS[mode] | os.O_CLOEXEC | os.O_NOCTTY)

    def read(self, handle: int, size: int) -> bytes:
        return os.read(handle, size)

    def write(self, handle: int, data: bytes) -> int:
        return os.write(handle, data)

    def ioctl(self, handle: int, request: int, argument: bytearray) -> int:
        answer: int = fcntl.ioctl(handle, request, argument, True)  # noqa: FBT003 - fcntl takes it by position only
        return answer

    def close(self, handle: int) -> None:
        os.close(handle)

    def mkdir(self, path: str) -> None:
        Path(path).mkdir(mode=0o700)

    def rmdir(self, path: str) -> None:
        Path(path).rmdir()

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def listdir(self, path: str) -> tuple[str, ...]:
        return tuple(sorted(os.listdir(path)))  # noqa: PTH208 - names, not paths


def iowr(kind: int, number: int, size: int) -> int:
    """_IOWR of <asm-generic/ioctl.h>: direction 3 (2 bits), size (14), type (8), number (8)."""
    return 3 << 30 | size << 16 | kind << 8 | number


@contextmanager
def opened(device: Device, path: str, mode: Mode) -> Iterator[int]:
    handle = device.open(path, mode)
    try:
        yield handle
    finally:
        device.close(handle)


def read_file(device: Device, path: str, *, limit: int) -> bytes:
    """All of it, in as many reads as it takes. Raises: OSError; MalformedEvidence over `limit` bytes."""
    content = bytearray()
    with opened(device, path, "r") as handle:
        while piece := device.read(handle, _PIECE):
            content += piece
            if len(content) > limit:
                raise MalformedEvidence(f"{path} is too long.", step="attest", expected=f"at most {limit} bytes")
    return bytes(content)


def write_file(device: Device, path: str, data: bytes) -> None:
    """All of `data` in one write, for attributes that take each write for a value of its own.

    Returns when the handle is closed: configfs and Gramine act on the value only then. Raises: OSError.
    """
    with opened(device, path, "w") as handle:
        if (taken := device.write(handle, data)) != len(data):
            raise OSError(errno.EIO, f"took {taken} of {len(data)} bytes", path)


@contextmanager
def said_by_hardware(what: str, *, hints: Mapping[int, str] | None = None, hint: str = "") -> Iterator[None]:
    """Translates OSError inside into ConnectionFailed "`what` …"; `hints` says what to do about which errno."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        name = errno.errorcode.get(number, "no error number")
        advice = (hints or {}).get(number, hint)
        raise ConnectionFailed(f"{what} failed: {name}.", step="attest", got=name, hint=advice) from error
