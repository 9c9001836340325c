"""Where fetched and quantized models lie, and what was known about each when it was fetched.

    <cache>/org--repo/<file>.gguf
    <cache>/org--repo/<file>.gguf.cloister.json      the record; written last, so a file without one is not whole
    <cache>/quantized/<name>.gguf                    made here; put in place only when whole
    <either file>.lineage.json                       see `cloister.models.lineage`

`<cache>` is `$XDG_CACHE_HOME/cloister/models`, or `~/.cache/cloister/models`.
"""

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cloister.errors import WrongUse
from cloister.models.lineage import lineage_path, write_whole

__all__ = [
    "LocalModel",
    "Record",
    "cache_directory",
    "check_removable",
    "drop_record",
    "embedded_path",
    "file_path",
    "find_record",
    "quantized_models",
    "quantized_name",
    "quantized_path",
    "read_record",
    "records",
    "remove",
    "save_record",
]

_RECORD_SUFFIX = ".cloister.json"
_MAX_RECORD_BYTES = 65_536
_EMBEDDED_FILES = {"demo": "demo-q8_0.gguf", "tiny": "tiny.gguf"}


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that can be opened now. `source` says in one line where it came from.

    The digest of a model is taken of the bytes that the engine loads, not from here.
    """

    path: Path
    name: str
    source: str


@dataclass(frozen=True, slots=True)
class Record:
    """What was fetched. `sha256` (hex) was computed over the bytes as they arrived; `hub_sha256` is what the hub
    said, "" where it said nothing. `tags`: the tags it was asked for by, "" being the usual choice. `fetched_at` in
    Unix seconds."""

    repository: str
    revision: str
    file: str
    quantization: str
    tags: tuple[str, ...]
    sha256: str
    hub_sha256: str
    size: int
    fetched_at: int

    def local_model(self) -> LocalModel:
        source = f"hf.co/{self.repository}@{self.revision[:12]}/{self.file}"
        return LocalModel(file_path(self.repository, self.file), Path(self.file).stem, source)


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "cloister" / "models"


def embedded_path(name: str) -> Path:
    """Of a model that comes with the package: `demo` or `tiny`. Does not say whether this installation holds it."""
    return Path(__file__).parent / "data" / _EMBEDDED_FILES[name]


def file_path(repository: str, file: str) -> Path:
    """Flat below the repository's folder: no part of a name that a hub sent is used as a folder."""
    return cache_directory() / repository.replace("/", "--") / file.replace("/", "--")


def read_record(repository: str, file: str) -> Record | None:
    """The record of a file that is here in its full size; None when either is missing or they disagree."""
    return _read(file_path(repository, file))


def save_record(record: Record) -> None:
    """Write the record beside its file, in one step."""
    path = _record_path(file_path(record.repository, record.file))
    write_whole(path, json.dumps(asdict(record), indent=1).encode())


def drop_record(repository: str, file: str) -> None:
    """From here on the file is not taken as whole."""
    _record_path(file_path(repository, file)).unlink(missing_ok=True)


def records(repository: str | None = None) -> Iterator[Record]:
    """Every whole model in the cache, or of one repository, in the order of their names."""
    folder = repository.replace("/", "--") if repository else "*"
    for path in sorted(cache_directory().glob(f"{folder}/*{_RECORD_SUFFIX}")):
        if record := _read(path.with_name(path.name.removesuffix(_RECORD_SUFFIX))):
            yield record


def find_record(repository: str, tag: str) -> Record | None:
    """A whole model of the repository that was fetched by that tag, else one that has that quantization or file name;
    in any case, and as it is spelled before others. "" is a tag only: what has no quantization is not the usual
    choice."""
    fitting = [record for record in records(repository) if tag.upper() in _upper(_names(record))]
    return min(fitting, key=lambda r: (tag not in r.tags, tag.upper() not in _upper(r.tags)), default=None)


def _names(record: Record) -> set[str]:
    return {*record.tags} | ({record.quantization, record.file} - {""})


def _upper(names: Iterable[str]) -> set[str]:
    return {name.upper() for name in names}


def quantized_path(name: str) -> Path:
    """Of a model that was made here: `toy-Q4_0`. Does not say whether there is one."""
    return cache_directory() / "quantized" / f"{name}.gguf"


def quantized_name(stem: str, quantization: str) -> str:
    """A name by which it can be referred to, whatever letters the source's has."""
    plain = re.sub(r"\.\.+", ".", re.sub(r"[^A-Za-z0-9._]+", "-", stem)).strip("-._")
    return f"{plain[:80] or 'model'}-{quantization}"


def quantized_models() -> Iterator[Path]:
    """Every model that was made here and lies in the cache, in the order of their names."""
    yield from sorted(path for path in quantized_path("x").parent.glob("[!.]*.gguf") if path.is_file())


def check_removable(model: Path) -> None:
    """Raises: WrongUse for an embedded model, and for a file that cloister neither fetched nor made."""
    if model.resolve() in {embedded_path(name).resolve() for name in _EMBEDDED_FILES}:
        raise WrongUse(f"{model.name} comes with the package and stays.")
    if not any(path.is_file() for path in _beside(model)) and model not in quantized_models():
        raise WrongUse(f"cloister neither fetched nor made {model}.", hint="Remove it yourself, if it shall go.")


def remove(model: Path) -> None:
    """Remove a model's file, all that is recorded of it and what is left of fetching it. Raises as
    `check_removable`."""
    check_removable(model)
    for path in (*_beside(model), model, model.with_name(model.name + ".lock")):
        path.unlink(missing_ok=True)
    for path in model.parent.glob(f"{glob.escape(model.name)}.*.partial"):
        path.unlink()


def _beside(model: Path) -> tuple[Path, Path]:
    return _record_path(model), lineage_path(model)


def _record_path(model: Path) -> Path:
    return model.with_name(model.name + _RECORD_SUFFIX)


def _read(model: Path) -> Record | None:
    try:
        with _record_path(model).open("rb") as stored:
            raw = json.loads(stored.read(_MAX_RECORD_BYTES))
        record = _from_json(raw)
        whole = model.stat().st_size == record.size and file_path(record.repository, record.file) == model
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if whole else None


def _from_json(raw: dict[str, Any]) -> Record:
    values = {field.name: raw[field.name] for field in fields(Record)}
    wanted = {"tags": list, "size": int, "fetched_at": int}
    if any(type(value) is not wanted.get(name, str) for name, value in values.items()):
        raise ValueError("a field has another type")
    return Record(**{**values, "tags": tuple(str(tag) for tag in values["tags"])})
