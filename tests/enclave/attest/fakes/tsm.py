"""configfs-tsm as the kernel does it: one folder per report, a generation, and answers made at the first read."""

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.enclave.attest.fakes.kernel import Buffered, Node, OpenFile, Reading, failure

from cloister.enclave.attest.device import Mode

Make = Callable[[bytes, int], tuple[bytes, bytes]]
"""(64 bytes, privilege level) -> outblob, auxblob."""

ULONG = 1 << 64


@dataclass
class Entry:
    inblob: bytes = b""
    privilege_level: int = 0
    written: int = 0
    read: int = 0
    blobs: tuple[bytes, bytes] | None = None


@dataclass
class FakeTsm:
    """`busy`: how many reports fail with EBUSY first. `interfere`: what another process does once the question stands.

    `error`: errno of every report. `say`: how the generation is written.
    """

    provider: str | None
    make: Make
    floor: int = 0
    busy: int = 0
    error: int = 0
    interfere: Callable[["FakeTsm", Entry], None] | None = None
    first_generation: int = 0
    say: Callable[[int], str] = str
    entries: dict[str, Entry] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    made: int = 0

    @property
    def is_snp(self) -> bool:
        return self.provider == "sev_guest"

    def mkdir(self, path: str) -> None:
        if self.provider is None:
            raise failure(errno.ENXIO)
        if "/" in path or not path:
            raise failure(errno.EPERM)
        if path in self.entries:
            raise failure(errno.EEXIST)
        self.entries[path] = Entry(written=self.first_generation, read=self.first_generation)

    def rmdir(self, path: str) -> None:
        if path not in self.entries:
            raise failure(errno.ENOENT)
        del self.entries[path]
        self.removed.append(path)

    def listdir(self, path: str) -> tuple[str, ...] | None:
        if not path:
            return tuple(self.entries)
        return self._attributes() if path in self.entries else None

    def node(self, path: str) -> Node | None:
        name, _, attribute = path.partition("/")
        if name not in self.entries or attribute not in self._attributes():
            return None
        return lambda mode: self._open(self.entries[name], attribute, mode)

    def advance(self, entry: Entry) -> None:
        if (entry.written + 1) % ULONG == entry.read % ULONG and entry.written != entry.read:
            raise failure(errno.EBUSY)
        entry.written = (entry.written + 1) % ULONG

    def _attributes(self) -> tuple[str, ...]:
        common = ("generation", "inblob", "outblob", "provider")
        return (*common, "auxblob", "privlevel", "privlevel_floor") if self.is_snp else common

    def _open(self, entry: Entry, attribute: str, mode: Mode) -> OpenFile:
        writable = attribute in ("inblob", "privlevel")
        if mode != ("w" if writable else "r"):
            raise failure(errno.EACCES)
        match attribute:
            case "generation":
                return Reading(f"{self.say(entry.written)}\n".encode())
            case "provider":
                return Reading(f"{self.provider}\n".encode())
            case "privlevel_floor":
                return Reading(f"{self.floor}\n".encode())
            case "inblob":
                return Buffered(lambda data: self._set_inblob(entry, data), limit=64)
            case "privlevel":
                return _Level(self, entry)
        return _Blob(lambda: self._blob(entry, attribute == "auxblob"))

    def _set_inblob(self, entry: Entry, data: bytes) -> None:
        self.advance(entry)
        entry.inblob = data

    def _blob(self, entry: Entry, auxiliary: bool) -> bytes:
        if not entry.inblob:
            raise failure(errno.EINVAL)
        if entry.blobs is None or entry.read != entry.written:
            if self.interfere is not None:
                self.interfere(self, entry)
            entry.blobs = None
            entry.blobs = self._new(entry)
            entry.read = entry.written
        return entry.blobs[auxiliary]

    def _new(self, entry: Entry) -> tuple[bytes, bytes]:
        if self.busy:
            self.busy -= 1
            raise failure(errno.EBUSY)
        if self.error:
            raise failure(self.error)
        if len(entry.inblob) != 64:
            raise failure(errno.EINVAL)
        self.made += 1
        return self.make(entry.inblob, entry.privilege_level)


class _Blob(OpenFile):
    """Made at the first read of this open; later reads give the rest of the same."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self._made: Reading | None = None

    def read(self, size: int) -> bytes:
        if self._made is None:
            self._made = Reading(self._make())
        return self._made.read(size)


class _Level(OpenFile):
    def __init__(self, tsm: FakeTsm, entry: Entry) -> None:
        self._tsm = tsm
        self._entry = entry

    def write(self, data: bytes) -> int:
        try:
            level = int(data.decode().removesuffix("\n"), 0)
        except ValueError as error:
            raise failure(errno.EINVAL) from error
        if not self._tsm.floor <= level <= 3:
            raise failure(errno.EINVAL)
        self._tsm.advance(self._entry)
        self._entry.privilege_level = level
        return len(data)
