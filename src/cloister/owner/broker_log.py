"""A broker's log: what was done, in lines that nobody can change, cut out, reorder or put in between unseen.

    line = {"v":1,"number":N,"time":Unix seconds,"event":word,"details":{name: text or integer},"previous":hex64,"signature":b64url}

Compact JSON, one line each. `previous` is the SHA-256 of the line before, its newline left out (of the first: 64 zeros);
`signature` is the broker's Ed25519 over `cloister/broker-log/v1`, a zero byte, and the line without its last member. Whether
lines were cut off at the very end no chain can show: compare the last number and digest with a copy kept elsewhere.

A line is on the disk before anything is done that it tells of (of a revocation the record is written too where the line
cannot be). What a crash left of a line is taken away at the next turn,
and that is logged too.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloister.errors import MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.strict_json import Fields, b64url, from_b64url, load_object

__all__ = ["MAX_LINE", "START", "Append", "Details", "Entry", "Log", "read_entries"]

Details = Mapping[str, str | int]

MAX_LINE = 16 * 1024
"""Bytes of a line."""

START = "00" * 32
"""What the first line names as the one before."""

_LABEL = b"cloister/broker-log/v1\0"
_SIGNATURE = 64
_TAIL = re.compile(rb',"signature":"([A-Za-z0-9_-]{86})"}')
_TAIL_LENGTH = len(b',"signature":""}') + 86
_EVENT = re.compile(r"[a-z][a-z-]{0,31}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line. `time`: Unix seconds. `digest`: hex SHA-256, by which the next line names it."""

    number: int
    time: int
    event: str
    details: Details
    previous: str
    digest: str

    def to_json(self) -> dict[str, object]:
        return {"number": self.number, "time": self.time, "event": self.event, **self.details, "sha256": self.digest}


Append = Callable[[str, Details], Entry]
"""Of an event and its details. The line is on the disk when this returns; WrongUse, and nothing of it stays, when it cannot be."""


def read_entries(data: bytes, key: Ed25519PublicKey, *, after: Entry | None = None) -> Iterator[Entry]:
    """Of whole lines, from the log's first on, or from the one that follows `after`.

    Raises: NotTrusted at the first line that is not what the broker wrote at that place.
    """
    lines = data.split(b"\n")
    rest = lines.pop()
    for line in lines:
        after = _entry(line, key, after)
        yield after
    if rest:
        hint = "If the broker was ended in the midst of it, its next start repairs that."
        raise _wrong(after, "The log ends in the midst of a line.", hint=hint)


def _entry(line: bytes, key: Ed25519PublicKey, after: Entry | None) -> Entry:
    tail = _TAIL.fullmatch(line[-_TAIL_LENGTH:])
    if tail is None or len(line) > MAX_LINE:
        raise _wrong(after, "A line of the log is none.")
    signed = line[:-_TAIL_LENGTH]
    try:
        key.verify(from_b64url(tail[1].decode(), what="signature"), _LABEL + signed)
        fields = Fields(load_object(signed + b"}", max_bytes=MAX_LINE, what="log"), what="log")
        fields.integer("v", low=1, high=1)
        entry = Entry(
            number=fields.integer("number", low=1),
            time=fields.integer("time"),
            event=fields.matching("event", _EVENT, "a word"),
            details=_details(fields.take("details")),
            previous=fields.sha256("previous"),
            digest=hashlib.sha256(line).hexdigest(),
        )
        fields.end()
    except (InvalidSignature, MalformedEvidence) as error:
        raise _wrong(after, "A line of the log was changed, or is another broker's.") from error
    number, previous = (1, START) if after is None else (after.number + 1, after.digest)
    if (entry.number, entry.previous) != (number, previous):
        raise _wrong(after, "Lines of the log are missing, or stand in another order.", got=f"line {entry.number}")
    return entry


def _details(value: object) -> Details:
    if not isinstance(value, dict) or not all(
        _NAME.fullmatch(name) and type(one) in (str, int) for name, one in value.items()
    ):
        raise MalformedEvidence("log.details is not names with text or integers.", step="log.details")
    return value


def _wrong(after: Entry | None, message: str, *, got: str | None = None, hint: str = "") -> NotTrusted:
    at = 1 if after is None else after.number + 1
    told = hint or "Up to there it is whole. Compare it with a copy kept elsewhere."
    return NotTrusted(message, step="log", expected=f"line {at}", got=got, hint=told)


def _line(after: Entry | None, event: str, details: Details, now: float, key: Ed25519PrivateKey) -> bytes:
    members = {
        "v": 1,
        "number": 1 if after is None else after.number + 1,
        "time": int(now),
        "event": event,
        "details": dict(details),
        "previous": START if after is None else after.digest,
    }
    signed = json.dumps(members, separators=(",", ":"), ensure_ascii=True).encode()[:-1]
    return signed + b',"signature":"' + b64url(key.sign(_LABEL + signed)).encode() + b'"}'


class Log:
    """The log of one broker on this machine. Several threads and processes take turns with it.

    `key`: the broker's. `on_entry` is told of each line once, in order, those that others wrote too. `clock`: Unix seconds.
    """

    def __init__(
        self,
        path: Path,
        key: Ed25519PrivateKey,
        *,
        clock: Callable[[], float],
        on_entry: Callable[[Entry], None] = lambda _entry: None,
    ) -> None:
        self._path = path
        self._key = key
        self._clock = clock
        self._on_entry = on_entry
        self._last: Entry | None = None
        self._size = 0

    @property
    def last(self) -> Entry | None:
        """As of the last turn."""
        return self._last

    @contextmanager
    def turn(self) -> Iterator[Append]:
        """Nobody else writes meanwhile; all that others wrote is known. Raises: NotTrusted for a log that was tampered with;
        WrongUse."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise WrongUse(f"{self._path} cannot be opened.", step="log", got=error.strerror) from error
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._catch_up(file.fileno())
            yield lambda event, details: self._add(file.fileno(), event, details)

    def _catch_up(self, descriptor: int) -> None:
        """Reads what was added since the last turn; repairs what a crash left of a last line, which is whole when it lacks
        its newline alone."""
        size = os.fstat(descriptor).st_size
        if size < self._size:
            raise _wrong(self._last, "Lines were cut off the log while the broker ran.")
        whole, newline, torn = os.pread(descriptor, size - self._size, self._size).rpartition(b"\n")
        for entry in read_entries(whole + newline, self._key.public_key(), after=self._last):
            self._note(entry)
        self._size += len(whole + newline)
        if not torn:
            return
        try:
            (entry,) = read_entries(torn + b"\n", self._key.public_key(), after=self._last)
        except NotTrusted:
            os.ftruncate(descriptor, self._size)
            self._add(descriptor, "repaired", {"bytes": len(torn)})
        else:
            _write(descriptor, b"\n", size, keep=size)
            self._size = size + 1
            self._note(entry)

    def _note(self, entry: Entry) -> None:
        self._last = entry
        self._on_entry(entry)

    def _add(self, descriptor: int, event: str, details: Details) -> Entry:
        line = _line(self._last, event, details, self._clock(), self._key)
        (entry,) = read_entries(line + b"\n", self._key.public_key(), after=self._last)
        _write(descriptor, line + b"\n", self._size, keep=self._size)
        self._size += len(line) + 1
        self._note(entry)
        return entry


def _write(descriptor: int, data: bytes, at: int, *, keep: int) -> None:
    """`keep`: the length to go back to."""
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], at + done)
        os.fsync(descriptor)
    except OSError as error:
        os.ftruncate(descriptor, keep)
        raise WrongUse(
            "The log cannot be written, and nothing is done that is not in it.", step="log", got=error.strerror
        ) from error
