"""From a reference to a file: choose on the hub, fetch with resume, check the digest, and only then call it whole.

The hub's client library finds the files (and knows mirrors by `HF_ENDPOINT`, tokens and proxies); the bytes are
fetched here over plain HTTP with `Range`, because the library starts a cut download again from nothing.
"""

import glob
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeAlias

import httpx2
from filelock import FileLock
from huggingface_hub import HfApi, get_session, get_token, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from cloister.errors import ConnectionFailed, MalformedModel, WrongUse
from cloister.models.lineage import Fetched, digest_model, lineage_path, save_lineage, trace
from cloister.models.reference import EmbeddedModel, HubModel, ModelFile, Reference, parse_reference
from cloister.models.store import (
    LocalModel,
    Record,
    drop_record,
    embedded_path,
    file_path,
    find_record,
    read_record,
    save_record,
)

__all__ = ["PREFERRED", "Progress", "pull", "resolve", "split_quantization"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (file's name, bytes so far, bytes in all) while a model is fetched."""

PREFERRED = ("Q8_0", "Q4_K_M", "Q6_K", "Q5_K_M", "Q5_0", "Q4_0", "BF16", "F16")
"""Which quantization is taken when none is named: the first of these that the repository has."""

_ENDPOINT = "https://huggingface.co"
_BLOCK = 1 << 20
_ATTEMPTS = 4  # in a row, without a new byte
_PAUSE = 0.5  # seconds, times the attempt
_TIMEOUT = 20.0  # seconds without a byte
_QUANTIZATION = re.compile(r"(?:^|[-._])((?:I?Q|TQ)\d[A-Z0-9_]*|BF16|F16|F32|MXFP4[A-Z0-9_]*)$", re.IGNORECASE)
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_OFFLINE_HINT = (
    "The network is needed to fetch a model once. Without it: name a .gguf file, or use the embedded `default`."
)


@dataclass(frozen=True, slots=True)
class _HubFile:
    """One GGUF file of a repository. `sha256` is "" where the hub does not say."""

    name: str
    size: int
    sha256: str

    @property
    def stem(self) -> str:
        return _PART.sub("", PurePosixPath(self.name).stem)

    @property
    def quantization(self) -> str:
        return split_quantization(self.stem)[1]

    @property
    def in_parts(self) -> bool:
        return _PART.search(PurePosixPath(self.name).stem) is not None


def split_quantization(stem: str) -> tuple[str, str]:
    """A file's name without its ending, in two: `toy-q8_0` is ("toy", "Q8_0"); without a quantization ("toy", "")."""
    found = _QUANTIZATION.search(stem)
    return (stem[: found.start()], found.group(1).upper()) if found else (stem, "")


def resolve(reference: str | Reference, *, progress: Progress | None = None) -> LocalModel:
    """The model that `reference` names, fetched first when it is a hub's and not here yet.

    What is here is used as it is, without asking the hub whether there is something newer: `pull` does that. The
    file's size is compared with its record, its digest is not computed again.

    Raises:
        WrongUse: it names nothing, or not one file.
        ConnectionFailed: the hub cannot be reached, or the download broke off; the next try goes on where it stopped.
        MalformedModel: what arrived is not what the hub announced.
    """
    found = parse_reference(reference) if isinstance(reference, str) else reference
    if isinstance(found, ModelFile):
        return LocalModel(found.path, found.path.stem, str(found.path))
    if isinstance(found, EmbeddedModel):
        return _embedded(found.name)
    if record := find_record(found.repository, found.tag):
        return record.local_model()
    return pull(found, progress=progress).local_model()


def _embedded(name: str) -> LocalModel:
    path = embedded_path(name)
    if not path.is_file():
        raise WrongUse(f"This installation does not hold the embedded model {name!r}.", hint="Name a .gguf file.")
    return LocalModel(path, name, "embedded in the package")


def pull(model: HubModel, *, progress: Progress | None = None) -> Record:
    """Fetch the newest revision of a hub's model, or find that it is here. Raises as `resolve` does."""
    with _translated(model):
        revision, files = _list_files(model)
        chosen = _choose(model, files)
        path = file_path(model.repository, chosen.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            here = read_record(model.repository, chosen.name)
            if here and chosen.sha256 and here.sha256 == chosen.sha256:
                record = replace(here, tags=tuple(sorted({*here.tags, model.tag})))
            else:
                record = _fetch(model, revision, chosen, path, progress)
            if not lineage_path(path).is_file():
                step = Fetched(record.repository, record.revision, record.file, record.sha256)
                save_lineage(path, trace(digest_model(path), step))
            save_record(record)
    return record


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", _ENDPOINT).rstrip("/")


@contextmanager
def _translated(model: HubModel) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise WrongUse(
            f"{model} is open only to those who accepted its terms.",
            hint=f"Accept them on https://huggingface.co/{model.repository}, then set HF_TOKEN.",
        ) from error
    except RepositoryNotFoundError as error:
        raise WrongUse(
            f"There is no {model}, or it is private.", hint="Check the name; set HF_TOKEN if private."
        ) from error
    except OfflineModeIsEnabled as error:
        raise ConnectionFailed("HF_HUB_OFFLINE is set, and this model is not here.", hint=_OFFLINE_HINT) from error
    except (HfHubHTTPError, httpx2.HTTPError, ValueError) as error:
        raise ConnectionFailed(
            f"{_endpoint()} did not give {model}: {type(error).__name__}.", hint=_OFFLINE_HINT
        ) from error
    except OSError as error:
        raise WrongUse(f"{model} cannot be stored: {error.strerror or error}.", hint="See XDG_CACHE_HOME.") from error


def _list_files(model: HubModel) -> tuple[str, list[_HubFile]]:
    info = HfApi(endpoint=_endpoint()).model_info(model.repository, files_metadata=True, timeout=_TIMEOUT)
    files = [_describe(sibling) for sibling in info.siblings or () if _is_model(sibling.rfilename)]
    if not files:
        raise WrongUse(
            f"hf.co/{model.repository} holds no .gguf file.", hint="Look for a repository that ends in -GGUF."
        )
    return info.sha or "", sorted(files, key=lambda file: file.name)


def _is_model(name: str) -> bool:
    """GGUF files that hold a language model: no vision projectors and no importance matrices."""
    last = PurePosixPath(name).name.lower()
    return last.endswith(".gguf") and not last.startswith(("mmproj", "imatrix"))


def _describe(sibling: Any) -> _HubFile:
    if not sibling.size:
        raise ConnectionFailed(f"{_endpoint()} does not say how large {sibling.rfilename} is.", step="download")
    return _HubFile(sibling.rfilename, sibling.size, sibling.lfs.sha256 if sibling.lfs else "")


def _choose(model: HubModel, files: Sequence[_HubFile]) -> _HubFile:
    fitting = _fitting(model.tag, files)
    if not fitting:
        raise WrongUse(f"{model} is not there.", hint=f"There is: {_names(files)}")
    if any(file.in_parts for file in fitting):
        raise WrongUse(
            f"{model} is split into several files, which is not supported.", hint="Name another, or join them."
        )
    if len(fitting) > 1:
        raise WrongUse(
            f"{model} names {len(fitting)} files.",
            hint=f"Name one: hf.co/{model.repository}:FILE with {_names(fitting)}",
        )
    return fitting[0]


def _fitting(tag: str, files: Sequence[_HubFile]) -> list[_HubFile]:
    if tag:
        named = [file for file in files if file.name == tag]
        return named or [file for file in files if file.quantization == tag.upper()]
    for quantization in PREFERRED:
        if found := [file for file in files if file.quantization == quantization and not file.in_parts]:
            return found
    return list(files)


def _names(files: Sequence[_HubFile], most: int = 12) -> str:
    names = list(dict.fromkeys(file.quantization or file.name for file in files))
    if len(names) < len({file.name for file in files if not file.in_parts}):
        names = [file.name for file in files]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _fetch(model: HubModel, revision: str, file: _HubFile, path: Path, progress: Progress | None) -> Record:
    partial = path.with_name(f"{path.name}.{(file.sha256 or revision)[:16]}.partial")
    url = hf_hub_url(model.repository, file.name, revision=revision, endpoint=_endpoint())
    with partial.open("a+b") as target:
        arriving = _Arriving(file, target, progress)
        arriving.receive_all(url)
    _check(file, partial, arriving.sha256)
    drop_record(model.repository, file.name)
    lineage_path(path).unlink(missing_ok=True)
    partial.replace(path)
    for other in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        other.unlink()
    return Record(
        repository=model.repository,
        revision=revision,
        file=file.name,
        quantization=file.quantization,
        tags=(model.tag,),
        sha256=arriving.sha256,
        hub_sha256=file.sha256,
        size=file.size,
        fetched_at=int(time.time()),
    )


class _Arriving:
    """A partial file, the digest of what it holds, and the requests for what is missing."""

    def __init__(self, file: _HubFile, target: BinaryIO, progress: Progress | None) -> None:
        self._file = file
        self._target = target
        self._progress = progress
        self._digest = hashlib.sha256()
        target.seek(0)
        while block := target.read(_BLOCK):
            self._digest.update(block)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def receive_all(self, url: str) -> None:
        """A broken connection costs only the bytes that did not arrive; several in a row without any end it."""
        failures = 0
        while (before := self._target.tell()) < self._file.size:
            try:
                self._receive(url, before)
                ended: Exception = httpx2.RemoteProtocolError("the answer ended early")
            except httpx2.TransportError as error:
                ended = error
            failures = 0 if self._target.tell() > before else failures + 1
            if failures == _ATTEMPTS:
                raise ended
            if self._target.tell() < self._file.size:
                time.sleep(_PAUSE * (failures + 1))

    def _receive(self, url: str, start: int) -> None:
        with get_session().stream("GET", url, headers=_headers(start), timeout=_TIMEOUT) as response:
            hf_raise_for_status(response)
            if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                self._restart()  # the whole file came, in place of the rest of it
            for block in response.iter_bytes():
                self._target.write(block)
                self._digest.update(block)
                if self._progress:
                    self._progress(self._file.name, self._target.tell(), self._file.size)
                if self._target.tell() > self._file.size:
                    return

    def _restart(self) -> None:
        self._target.seek(0)
        self._target.truncate()
        self._digest = hashlib.sha256()


def _headers(start: int) -> dict[str, str]:
    """The token goes to the hub alone: the client drops it where the hub sends it on to another host."""
    token = get_token()
    authorization = {"Authorization": f"Bearer {token}"} if token else {}
    return {"Accept-Encoding": "identity", "Range": f"bytes={start}-", **authorization}


def _check(file: _HubFile, partial: Path, sha256: str) -> None:
    """Size and digest are the hub's; a file that differs is dropped, since going on with it cannot mend it."""
    size = partial.stat().st_size
    if size == file.size and sha256 == (file.sha256 or sha256):
        return
    partial.unlink()
    raise MalformedModel(
        f"{file.name} arrived with another content than the hub announced.",
        hint="Try again; if it stays so, the mirror or the file is broken.",
        step="download",
        expected=f"{file.size} bytes, sha256 {file.sha256 or 'not given'}",
        got=f"{size} bytes, sha256 {sha256}",
    )
