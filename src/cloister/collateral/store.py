"""A cache of collateral on disk, which nothing that is read from is believed: every entry is checked again.

    <cache>/intel/tcb-info/tdx-00806f050000.json        vendor / kind / platform: what it is filed under is what it is

`<cache>` is `$XDG_CACHE_HOME/cloister/collateral`, or `~/.cache/cloister/collateral`. A file appears whole, in one step.
"""

import base64
import binascii
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cloister.collateral.pieces import MAX_PIECE, Answer, Key
from cloister.errors import MalformedEvidence, WrongUse
from cloister.evidence.strict_json import Fields, load_object

__all__ = ["Cache", "Entry"]

_MAX_FILE = 4 * MAX_PIECE
_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Entry:
    """As it lies there. `fetched_at` in Unix seconds."""

    key: Key
    answer: Answer
    fetched_at: int


class Cache:
    """A `CollateralSource`. `root` is its folder. May be shared between threads and processes: the last one to write an
    entry wins."""

    name = "cache"

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or _default_root()

    def get(self, key: Key) -> Answer | None:
        entry = self._read(key)
        return entry.answer if entry is not None else None

    def put(self, key: Key, answer: Answer, now: float) -> None:
        """Raises: WrongUse when it cannot be written; then what lay there before still does."""
        path = self._path(key)
        text = _encode(Entry(key, answer, int(now)))
        draft = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False, encoding="ascii") as file:
                draft = file.name
                file.write(text)
            Path(draft).replace(path)
        except OSError as error:
            if draft:
                Path(draft).unlink(missing_ok=True)
            message = f"Collateral cannot be stored: {error.strerror or error}."
            raise WrongUse(message, hint="See XDG_CACHE_HOME.") from error

    def entries(self) -> Iterator[Entry]:
        """Every readable entry, in the order of their names."""
        for path in sorted(self.root.glob(f"*/*/*{_SUFFIX}")):
            vendor, kind, file = path.relative_to(self.root).parts
            try:
                key = Key(vendor, kind, file.removesuffix(_SUFFIX))
            except MalformedEvidence:
                continue
            if entry := self._read(key):
                yield entry

    def _path(self, key: Key) -> Path:
        return self.root / key.vendor / key.kind / f"{key.platform}{_SUFFIX}"

    def _read(self, key: Key) -> Entry | None:
        try:
            with self._path(key).open("rb") as file:
                entry = _decode(file.read(_MAX_FILE + 1))
        except (OSError, MalformedEvidence):
            return None
        return entry if entry.key == key else None


def _default_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "cloister" / "collateral"


def _encode(entry: Entry) -> str:
    value = {
        "v": 1,
        "vendor": entry.key.vendor,
        "kind": entry.key.kind,
        "platform": entry.key.platform,
        "fetched_at": entry.fetched_at,
        "body": base64.b64encode(entry.answer.body).decode(),
        "chain": base64.b64encode(entry.answer.chain).decode(),
    }
    return json.dumps(value, indent=1) + "\n"


def _decode(data: bytes) -> Entry:
    fields = Fields(load_object(data, max_bytes=_MAX_FILE, what="cache"), what="cache")
    fields.integer("v", low=1, high=1)
    key = Key(fields.text("vendor"), fields.text("kind"), fields.text("platform"))
    answer = Answer(_bytes(fields, "body"), _bytes(fields, "chain"))
    fetched_at = fields.integer("fetched_at")
    fields.end()
    return Entry(key, answer, fetched_at)


def _bytes(fields: Fields, name: str) -> bytes:
    value = fields.take(name)
    try:
        return base64.b64decode(value if isinstance(value, str) else "-", validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedEvidence(f"cache.{name} is not base64.", step=f"cache.{name}") from error
