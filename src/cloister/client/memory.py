"""What a client has seen and will not see fall again: release numbers, and the numbers of collateral, by scope.

An attacker who cannot forge evidence can still keep an old release with known faults, or a revocation list from before
a key was revoked, and serve it again: genuine, signed, and outdated. So a client remembers the highest number of each
kind that it accepted, and refuses lower ones.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from cloister import private_file
from cloister.errors import WrongUse

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["FileMemory", "Memory", "ProcessMemory", "platform_scope", "release_scope", "seen_file"]

MOST_SCOPES = 4096
MOST_NAMES = 256
_MOST_BYTES = 4 << 20
_LONGEST_NAME = 256  # characters, of a scope and of a counter
_HIGHEST = 1 << 160  # revocation lists are numbered in up to 20 bytes (RFC 5280, section 5.2.3)
_Seen = dict[str, dict[str, int]]


class Memory(Protocol):
    """`scope` says whose counters: see `release_scope` and `platform_scope`. Numbers are not negative."""

    def highest(self, scope: str, name: str) -> int:
        """The highest number noted; 0 when there is none."""

    def note(self, scope: str, counters: Mapping[str, int]) -> None:
        """Remembers each number that is higher than the one known. Never forgets."""


def release_scope(owner_key: str, deployment: str) -> str:
    """An owner counts the releases of each of their deployments."""
    return f"deployment {owner_key} {deployment}"


def platform_scope(platform: str) -> str:
    """A vendor counts its collateral for all machines of a platform."""
    return f"platform {platform}"


class ProcessMemory:
    """For as long as the process lives. May be shared between sessions and threads."""

    def __init__(self) -> None:
        self._seen: _Seen = {}
        self._lock = threading.Lock()

    def highest(self, scope: str, name: str) -> int:
        with self._lock:
            return self._seen.get(scope, {}).get(name, 0)

    def note(self, scope: str, counters: Mapping[str, int]) -> None:
        with self._lock:
            _raise_to(self._seen, scope, counters)


def seen_file() -> Path:
    """`$XDG_STATE_HOME/cloister/seen.json`, or `~/.local/state/cloister/seen.json`."""
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".local" / "state") / "cloister" / "seen.json"


class FileMemory:
    """In a file that this user alone may read, replaced whole; processes that write at once wait for each other.

    A file that is damaged, or that others could have written, is an error and never a fresh start: an attacker who can
    damage it could otherwise make the client forget. Holds at most 4,096 scopes, and then says that it is full.

    Raises, in both methods: WrongUse.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or seen_file()

    def highest(self, scope: str, name: str) -> int:
        return self._read().get(scope, {}).get(name, 0)

    def note(self, scope: str, counters: Mapping[str, int]) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self.path.with_name(f".{self.path.name}.lock")):
                seen = self._read()
                if _raise_to(seen, scope, counters):
                    text = json.dumps({"version": 1, "seen": seen}, indent=1, sort_keys=True)
                    private_file.write(self.path, text.encode("ascii"))
        except OSError as error:
            hint = "It remembers which releases and collateral were seen, so that none can be taken back."
            raise WrongUse(f"{self.path} cannot be written: {error.strerror}.", hint=hint, step="memory") from error

    def _read(self) -> _Seen:
        try:
            for path in (self.path.parent, self.path):  # reading it harms nobody but its owner's privacy
                private_file.refuse_shared(path, step="memory", readable=True)
            return _parse(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise WrongUse(f"{self.path} cannot be read: {error.strerror}.", step="memory") from error
        except (ValueError, RecursionError) as error:
            hint = "It holds what was seen so far. Restore it; moving it away forgets which releases are outdated."
            raise WrongUse(f"{self.path} is damaged: {error}.", hint=hint, step="memory") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process and thread at a time; the system lets go of it when a process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _raise_to(seen: _Seen, scope: str, counters: Mapping[str, int]) -> bool:
    """Whether anything was news. Raises: WrongUse when there is no room for it."""
    known = seen.get(scope, {})
    news = {name: value for name, value in counters.items() if value > known.get(name, 0)}
    merged = {**known, **news}
    if news and (not _fits(scope, merged) or len(seen.keys() | {scope}) > MOST_SCOPES):
        hint = "The memory of what was seen is full. Move it away: it begins anew, and forgets what it has seen."
        raise WrongUse("There is no room to remember what was seen.", hint=hint, step="memory")
    if news:
        seen[scope] = merged
    return bool(news)


def _fits(scope: str, counters: Mapping[str, int]) -> bool:
    names = (scope, *counters)
    return (
        len(counters) <= MOST_NAMES
        and all(len(name) <= _LONGEST_NAME for name in names)
        and all(type(value) is int and 0 <= value < _HIGHEST for value in counters.values())
    )


def _parse(data: bytes) -> _Seen:
    """Raises: ValueError, RecursionError."""
    if len(data) > _MOST_BYTES:
        raise ValueError("it is over 4 MiB")
    raw = json.loads(data)
    if not isinstance(raw, dict) or raw.keys() != {"version", "seen"} or raw["version"] != 1:
        raise ValueError("it is no memory of this version")
    seen = raw["seen"]
    if not isinstance(seen, dict) or len(seen) > MOST_SCOPES:
        raise ValueError("it holds something else than scopes")
    if not all(isinstance(counters, dict) and _fits(scope, counters) for scope, counters in seen.items()):
        raise ValueError("it holds something else than numbers")
    return seen
