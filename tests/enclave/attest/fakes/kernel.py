"""A kernel's file system, as the drivers see it: handles, errno, short reads, and the folders that things are mounted on."""

import errno
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cloister.enclave.attest.device import Mode


def failure(number: int, path: str = "") -> OSError:
    return OSError(number, os.strerror(number), path)


class OpenFile:
    """What a node gives for one open. Refuses everything that it does not define, as drivers do."""

    def read(self, size: int) -> bytes:
        raise failure(errno.EINVAL)

    def write(self, data: bytes) -> int:
        raise failure(errno.EINVAL)

    def ioctl(self, request: int, argument: bytearray) -> int:
        raise failure(errno.ENOTTY)

    def close(self) -> None:
        """Nothing that a driver reports here reaches the caller."""


class Reading(OpenFile):
    """A file whose content was fixed when it was opened."""

    def __init__(self, content: bytes) -> None:
        self._rest = content

    def read(self, size: int) -> bytes:
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


class Buffered(OpenFile):
    """A file that acts on what was written when it is closed."""

    def __init__(self, commit: Callable[[bytes], None], limit: int = 4096) -> None:
        self._data = b""
        self._commit = commit
        self._limit = limit

    def write(self, data: bytes) -> int:
        if len(self._data) + len(data) > self._limit:
            raise failure(errno.EFBIG)
        self._data += data
        return len(data)

    def close(self) -> None:
        if self._data:
            self._commit(self._data)


Node = Callable[[Mode], OpenFile]


def content(value: bytes) -> Node:
    """A file with this content, that nobody may write."""

    def node(mode: Mode) -> OpenFile:
        if mode != "r":
            raise failure(errno.EACCES)
        return Reading(value)

    return node


class Folder(Protocol):
    """Something mounted: it has its own rules for what is in it. Paths are relative, without a leading slash."""

    def node(self, path: str) -> Node | None: ...

    def mkdir(self, path: str) -> None: ...

    def rmdir(self, path: str) -> None: ...

    def listdir(self, path: str) -> tuple[str, ...] | None: ...


@dataclass
class FakeKernel:
    """A `Device`. `nodes` by path, `folders` by mount point. `refused`: path -> errno of every open.

    `max_read`: no read gives more, as devices may do. `leaked` must be empty at the end of every test.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    folders: dict[str, Folder] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    max_read: int = 1 << 30
    max_write: int = 1 << 30
    opened: list[str] = field(default_factory=list)
    _files: dict[int, OpenFile] = field(default_factory=dict, init=False)
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(3), init=False)

    @property
    def leaked(self) -> Mapping[int, OpenFile]:
        return self._files

    def open(self, path: str, mode: Mode) -> int:
        if path in self.refused:
            raise failure(self.refused[path], path)
        node = self._node(path)
        if node is None:
            raise failure(errno.ENOENT, path)
        opened = node(mode)
        handle = next(self._numbers)
        self._files[handle] = opened
        self.opened.append(path)
        return handle

    def read(self, handle: int, size: int) -> bytes:
        return self._file(handle).read(min(size, self.max_read))

    def write(self, handle: int, data: bytes) -> int:
        return self._file(handle).write(data[: self.max_write])

    def ioctl(self, handle: int, request: int, argument: bytearray) -> int:
        return self._file(handle).ioctl(request, argument)

    def close(self, handle: int) -> None:
        opened = self._file(handle)
        del self._files[handle]
        opened.close()

    def mkdir(self, path: str) -> None:
        folder, rest = self._folder(path)
        folder.mkdir(rest)

    def rmdir(self, path: str) -> None:
        folder, rest = self._folder(path)
        folder.rmdir(rest)

    def exists(self, path: str) -> bool:
        return self._node(path) is not None or self._listed(path) is not None

    def listdir(self, path: str) -> tuple[str, ...]:
        listed = self._listed(path)
        if listed is None:
            raise failure(errno.ENOENT, path)
        return listed

    def _file(self, handle: int) -> OpenFile:
        if handle not in self._files:
            raise failure(errno.EBADF)
        return self._files[handle]

    def _node(self, path: str) -> Node | None:
        if path in self.nodes:
            return self.nodes[path]
        found = self._mounted(path)
        return found[0].node(found[1]) if found else None

    def _listed(self, path: str) -> tuple[str, ...] | None:
        found = self._mounted(path)
        return found[0].listdir(found[1]) if found else None

    def _folder(self, path: str) -> tuple[Folder, str]:
        found = self._mounted(path)
        if found is None:
            raise failure(errno.ENOENT, path)
        return found

    def _mounted(self, path: str) -> tuple[Folder, str] | None:
        for mount, folder in self.folders.items():
            if path == mount or path.startswith(f"{mount}/"):
                return folder, path.removeprefix(mount).removeprefix("/")
        return None
