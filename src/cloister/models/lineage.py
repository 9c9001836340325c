"""Where a model file comes from: a record beside it, whose SHA-256 an enclave puts into its statement.

    <file>.gguf.lineage.json

The record is JSON in one spelling (keys sorted, no white space, ASCII, no floats), so that whoever repeats the steps
gets the same bytes; no time stands in it. It says the file's digest, every tensor's, and the steps that led to it, each
with the digest of what it gave. Nobody signs it: it is as true as the owner who approves the model is careful, and what
it adds is that the owner's record and the enclave's are the same one. Tensor digests tell apart a change of words or
template from a change of weights.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from cloister.errors import MalformedModel, WrongUse
from cloister.models.gguf import read_description

__all__ = [
    "MAX_LINEAGE",
    "Digests",
    "Fetched",
    "Found",
    "Lineage",
    "Quantized",
    "Step",
    "digest_model",
    "encode_step",
    "lineage_path",
    "parse_lineage",
    "read_lineage",
    "save_lineage",
    "steps_of",
    "trace",
    "write_whole",
]

MAX_LINEAGE = 1 << 24
"""Bytes of a record."""

_SUFFIX = ".lineage.json"
_VERSION = 1
_CHUNK = 1 << 22
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Fetched:
    """From a hub's repository at one revision."""

    repository: str
    revision: str
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Found:
    """A file on the machine where the next step was made; nothing is known of how it came there."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Quantized:
    """`version`: of the bindings, which bring the library. `engine_sha256`: of the library's files, as the statement
    has it. `requantized`: from a model that was quantized already."""

    tool: str
    version: str
    engine_sha256: str
    type: str
    requantized: bool
    sha256: str


Step: TypeAlias = Fetched | Found | Quantized

_ACTIONS: Mapping[str, type[Step]] = {"fetched": Fetched, "found": Found, "quantized": Quantized}


@dataclass(frozen=True, slots=True)
class Lineage:
    """`tensors`: SHA-256 (hex) by name, of the bytes as they lie in the file; empty where its header was not
    understood."""

    sha256: str
    size: int
    steps: tuple[Step, ...]
    tensors: Mapping[str, str] = field(repr=False)

    def encode(self) -> bytes:
        members = {
            "v": _VERSION,
            "sha256": self.sha256,
            "size": self.size,
            "steps": [encode_step(step) for step in self.steps],
            "tensors": dict(self.tensors),
        }
        return json.dumps(members, sort_keys=True, separators=(",", ":")).encode()

    def digest(self) -> str:
        """Hex; what the statement's `lineage_sha256` is."""
        return hashlib.sha256(self.encode()).hexdigest()


def encode_step(step: Step) -> dict[str, Any]:
    """As it stands in the record."""
    (action,) = (name for name, kind in _ACTIONS.items() if kind is type(step))
    return {"action": action, **asdict(step)}


def parse_lineage(data: bytes) -> Lineage:
    """Raises MalformedModel for anything but a record in its one spelling. Does not look at the model."""
    try:
        raw = json.loads(data) if len(data) <= MAX_LINEAGE else None
        lineage = _from_json(raw)
        if lineage.encode() == data:
            return lineage
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _malformed() from error
    raise _malformed()


def _malformed() -> MalformedModel:
    return MalformedModel(
        "The record of this model's lineage is none.", hint="Remove the .lineage.json file beside it.", step="lineage"
    )


def _from_json(raw: Any) -> Lineage:
    steps = tuple(_step(step) for step in raw["steps"])
    tensors = {str(name): str(digest) for name, digest in dict(raw["tensors"]).items()}
    digests = [raw["sha256"], *(step.sha256 for step in steps), *tensors.values()]
    sound = raw["v"] == _VERSION and type(raw["size"]) is int and all(_SHA256.fullmatch(digest) for digest in digests)
    if not sound or not steps or steps[-1].sha256 != raw["sha256"]:
        raise ValueError("a field holds what it cannot")
    return Lineage(raw["sha256"], raw["size"], steps, tensors)


def _step(raw: Mapping[str, Any]) -> Step:
    kind = _ACTIONS[raw["action"]]
    values = {item.name: raw[item.name] for item in fields(kind)}
    if any(type(value) is not (bool if name == "requantized" else str) for name, value in values.items()):
        raise ValueError("a field has another type")
    return kind(**values)


def lineage_path(model: Path) -> Path:
    return model.with_name(model.name + _SUFFIX)


def read_lineage(model: Path) -> Lineage | None:
    """The record beside `model`; None without one. Whether it is of the file's bytes is for the caller to compare.

    Raises: MalformedModel.
    """
    try:
        with lineage_path(model).open("rb") as stored:
            return parse_lineage(stored.read(MAX_LINEAGE + 1))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WrongUse(f"{lineage_path(model)} cannot be read: {error.strerror or error}.") from error


def save_lineage(model: Path, lineage: Lineage) -> None:
    """Write the record beside `model`, in one step."""
    write_whole(lineage_path(model), lineage.encode())


def write_whole(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, in one step; whatever ends this early leaves nothing behind. Raises: OSError."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        draft.chmod(0o644)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def steps_of(model: Path, sha256: str) -> tuple[Step, ...]:
    """What is known of how `model`, whose bytes have that digest, came to be: its record's steps when the record is of
    these bytes, else only that it was found."""
    with contextlib.suppress(MalformedModel):
        known = read_lineage(model)
        if known is not None and known.sha256 == sha256:
            return known.steps
    return (Found(model.name, sha256),)


def trace(found: "Digests", *steps: Step) -> Lineage:
    """The record for a file with these digests, which the last of `steps` gave.

    Raises: MalformedModel when that step gave another file.
    """
    if found.sha256 != steps[-1].sha256:
        raise MalformedModel(
            "The model file changed meanwhile.", step="lineage", expected=steps[-1].sha256, got=found.sha256
        )
    return Lineage(found.sha256, found.size, steps, found.tensors)


@dataclass(frozen=True, slots=True)
class Digests:
    """SHA-256 (hex) of a file and of each of its tensors by name, all of the same bytes; the file's size."""

    sha256: str
    size: int
    tensors: Mapping[str, str] = field(repr=False)


def digest_model(model: Path) -> Digests:
    """Read the file once. No tensors where its header is not understood. Raises: WrongUse when it cannot be read."""
    whole = hashlib.sha256()
    tensors: dict[str, str] = {}
    try:
        with model.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for name, length in _ranges(model, size):
                part = hashlib.sha256()
                while length > 0 and (data := file.read(min(length, _CHUNK))):
                    whole.update(data)
                    part.update(data)
                    length -= len(data)
                if name:
                    tensors[name] = part.hexdigest()
    except OSError as error:
        raise WrongUse(f"{model} cannot be read: {error.strerror or error}.") from error
    return Digests(whole.hexdigest(), size, tensors)


def _ranges(model: Path, size: int) -> Iterator[tuple[str, int]]:
    """The file from end to end: (tensor's name, or "" for what lies between; how many bytes)."""
    try:
        tensors = read_description(model).tensors
    except MalformedModel:
        tensors = ()
    position = 0
    for tensor in tensors:
        yield "", tensor.offset - position
        yield tensor.name, tensor.size
        position = tensor.offset + tensor.size
    yield "", size - position
