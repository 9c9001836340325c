"""`cloister.toml` and its folder into one bundle: a plaintext head that is the same for the same app, and ciphertext under
keys that are drawn anew each time. Constant memory, whatever the model's size."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from cloister.channel.hpke import TAG_LENGTH, Entropy
from cloister.channel.sections import CHUNK, FILE_KEY, SectionSealer
from cloister.errors import MalformedApp, WrongUse
from cloister.evidence.bundle import BundleHead, Manifest, Section, encode_head, parse_bundle_head
from cloister.models.store import LocalModel
from cloister.owner import filekeys
from cloister.owner.appfile import AppFile
from cloister.owner.archive import Source, file_source, tar_source
from cloister.owner.ignoring import app_files
from cloister.owner.requirements import fetched, target_of

__all__ = ["Package", "Progress", "manifest_of", "package"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (what is done, bytes so far, bytes in all)."""


@dataclass(frozen=True, slots=True)
class Package:
    """`sha256` (hex) is of the bundle's file; `head.sha256` of its manifest, which the launch config names. `keys`: section ->
    file key."""

    path: Path
    sha256: str
    head: BundleHead
    keys: Mapping[str, bytes]

    def __repr__(self) -> str:
        return f"Package({self.path}, {self.sha256})"


def package(
    app: AppFile,
    out: Path,
    *,
    state: Path,
    model: LocalModel | None = None,
    progress: Progress = lambda _what, _done, _total: None,
    entropy: Entropy = os.urandom,
) -> Package:
    """Writes the bundle to `out`, and its keys into the owner's `state` folder. `model`: what `app.model` means.

    Raises: MalformedApp, NotTrusted for a package that is not the one that was locked, WrongUse for a place that cannot be
    written.
    """
    with ExitStack() as stack:
        sources, manifest = _read(app, model, stack, progress)
        bundle_id = entropy(16).hex()
        head = encode_head(manifest, bundle_id)
        keys = {source.name: entropy(FILE_KEY) for source in sources}
        try:
            filekeys.save(state, bundle_id, keys)
            sha256 = _write(out, head, sources, keys, progress)
        except OSError as error:
            raise WrongUse("The bundle cannot be written.", step="package", got=_named(error)) from error
    return Package(out, sha256, parse_bundle_head(head), keys)


def manifest_of(
    app: AppFile,
    *,
    model: LocalModel | None = None,
    progress: Progress = lambda _what, _done, _total: None,
) -> Manifest:
    """What `package` would write as the manifest, and nothing sealed: whether a bundle that is there is of this very app.

    Raises: as `package`.
    """
    with ExitStack() as stack:
        return _read(app, model, stack, progress)[1]


def _read(
    app: AppFile, model: LocalModel | None, stack: ExitStack, progress: Progress
) -> tuple[list[Source], Manifest]:
    try:
        sources = _sources(app, model, stack)
        sections = tuple(_section(source, progress) for source in sources)
    except OSError as error:
        raise MalformedApp("A file of the app cannot be read.", step="package", got=_named(error)) from error
    return sources, _manifest(app, sections, model)


def _named(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def _sources(app: AppFile, model: LocalModel | None, stack: ExitStack) -> list[Source]:
    sources = []
    if app.code is not None:
        files = app_files(app.code)
        _check_entry(app, [name for name, _ in files])
        sources.append(tar_source("code", files))
    if app.requirements is not None:
        wheels = fetched(app.requirements, target_of(app.platform, app.python))
        sources.append(tar_source("requirements", stack.enter_context(wheels)))
    if bool(app.model) != (model is not None):
        raise WrongUse("The app's model was not looked up.", step="package")
    if model is not None:
        sources.append(file_source("model", model.path))
    return sources


def _check_entry(app: AppFile, files: Sequence[str]) -> None:
    """The module must be there: an enclave would find out only after its release."""
    path = app.entry.partition(":")[0].replace(".", "/")
    if f"{path}.py" not in files and f"{path}/__init__.py" not in files and app.requirements is None:
        hint = f"Looked for {path}.py. Is it left out by .cloisterignore?"
        raise MalformedApp(f"The app's module is not among its files: {app.entry}.", step="app", hint=hint)


def _section(source: Source, progress: Progress) -> Section:
    digest = hashlib.sha256()
    done = 0
    for piece in source.pieces():
        digest.update(piece)
        done += len(piece)
        progress(f"reading {source.name}", done, source.size)
    return Section(source.name, digest.hexdigest(), source.size)


def _manifest(app: AppFile, sections: tuple[Section, ...], model: LocalModel | None) -> Manifest:
    called = "" if model is None else model.name if app.kind == "llm" else model.path.name
    return Manifest(
        name=app.name,
        kind=app.kind,
        sections=sections,
        entry=app.entry,
        model=called,
        health=app.health,
        python=target_of(app.platform, app.python).python if app.requirements is not None else "",
        secrets=tuple(sorted(app.secrets)),
        egress=app.egress,
        logs=app.logs,
        domain=app.domain,
        resources=app.resources,
    )


def _write(out: Path, head: bytes, sources: Sequence[Source], keys: Mapping[str, bytes], progress: Progress) -> str:
    """The digest (hex) of what was written, in its place only when it is whole."""
    draft = out.with_name(f".{out.name}.{os.getpid()}.part")
    digest = hashlib.sha256(head)
    try:
        with draft.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
            _all(file, memoryview(head))
            hashed: Future[None] | None = None
            for sealed in (each for source in sources for each in _seal(source, keys[source.name], progress)):
                if hashed is not None:
                    hashed.result()
                hashed = hashing.submit(digest.update, sealed)  # while this one is written, and the next one sealed
                _all(file, sealed)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    return digest.hexdigest()


def _all(file: BinaryIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


def _seal(source: Source, key: bytes, progress: Progress) -> Iterator[memoryview]:
    """Each chunk's ciphertext, valid until the one after the next is asked for."""
    sealer = SectionSealer(key, source.name, source.size)
    plain = memoryview(bytearray(CHUNK))
    sealed, other = (memoryview(bytearray(CHUNK + TAG_LENGTH)) for _ in range(2))
    filled = done = 0
    for piece in source.pieces():
        view = memoryview(piece)
        while view:
            count = min(len(view), CHUNK - filled)
            plain[filled : filled + count] = view[:count]
            filled, view = filled + count, view[count:]
            if filled == sealer.next_length:
                yield sealed[: sealer.seal_into(plain[:filled], sealed)]
                sealed, other = other, sealed
                done, filled = done + filled, 0
                progress(f"sealing {source.name}", done, source.size)
    if not sealer.ended:  # a section of nothing is one chunk of nothing
        yield sealed[: sealer.seal_into(plain[:filled], sealed)]
