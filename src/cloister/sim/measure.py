"""What "running code" means here: every file of the enclave's import closure, the interpreter and the engine.

Not measured: the standard library, modules outside the packages of installed distributions, and cached bytecode, which
the enclave never reads (`host.process`). Hardware measures all of it, inside an image.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

import cloister
from cloister.errors import WrongUse
from cloister.evidence.manifest import manifest, manifest_digest

__all__ = ["ROOMS", "Measurement", "code_files", "code_manifest", "engine_digest", "measure"]

ROOMS = ("errors.py", "patience.py", "timely.py", "evidence", "verify", "channel", "enclave")
"""All that the enclave imports of cloister; a test holds it against what the process really loads."""

PACKAGE = Path(cloister.__file__).parent

_IMPORTERS = frozenset({"import_module", "find_spec", "__import__"})

_ENGINE = "llama_cpp/lib/"
"""Installed with its bindings, but a component of its own: a change of the engine is told as just that."""

_NOT_CODE = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json", "uv_build.json"})
"""Written by the installer, different on every machine."""

_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")
_EXTRA = re.compile(r";.*\bextra\b")


@dataclass(frozen=True, slots=True)
class Measurement:
    """Values as they stand in the report and in policies: "sha256:…"; the interpreter's with name and version."""

    code: str
    interpreter: str
    engine: str

    def components(self) -> Mapping[str, str]:
        return {"code": self.code, "interpreter": self.interpreter, "engine": self.engine}


def measure(engine_dir: Path | None, *, package: Path = PACKAGE) -> Measurement:
    """Measure what would run if the enclave were started now from `package`, with the engine in `engine_dir`.

    Raises: WrongUse when the enclave imports something that belongs to no installed distribution, does not parse, or is
    not where it was measured.
    """
    return Measurement(
        code=_text(hashlib.sha256(code_manifest(package)).digest()),
        interpreter=_interpreter(),
        engine=_text(engine_digest(engine_dir)),
    )


def engine_digest(engine_dir: Path | None) -> bytes:
    """SHA-256 (32 bytes) of the manifest of `lib*.so*` by resolved file name; of nothing without an engine."""
    libraries = set() if engine_dir is None else {path.resolve() for path in engine_dir.glob("lib*.so*")}
    files = {path.name: path for path in libraries if path.is_file()}
    if len(files) != sum(path.is_file() for path in libraries):
        raise WrongUse("Two of the engine's libraries have one name: they cannot be measured.", step="measure")
    return manifest_digest(_hash(files))


def code_manifest(package: Path = PACKAGE) -> bytes:
    """The `sha256sum` lines that the code's digest is over: `code` = SHA-256 of exactly these bytes."""
    return manifest(_hash(code_files(package)))


def code_files(package: Path = PACKAGE) -> Mapping[str, Path]:
    """Name in the manifest -> file: the rooms' own, and those of every distribution that they import, in turn."""
    files = {f"cloister/{path.relative_to(package).as_posix()}": path for path in _own_files(package)}
    wanted = {name for path in files.values() if path.suffix == ".py" for name in _imports(path)}
    owners = importlib.metadata.packages_distributions()
    closure = _closure(_distributions(wanted, owners))
    for distribution in sorted(closure):
        files.update(_files_of(distribution))
    _refuse_shadows((name for name in owners if closure & _normals(owners[name])), set(files.values()), package)
    return files


def _text(digest: bytes) -> str:
    return f"sha256:{digest.hex()}"


@cache
def _executable_digest(path: str, size: int, changed: int) -> bytes:
    """`size` and `changed` are part of the key, so that another executable at the same path is hashed again."""
    return _sha256(Path(path))


def _interpreter() -> str:
    path = Path(sys.executable).resolve()
    status = path.stat()
    digest = _executable_digest(str(path), status.st_size, status.st_mtime_ns)
    return f"{sys.implementation.name} {platform.python_version()} {_text(digest)}"


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _hash(files: Mapping[str, Path]) -> dict[str, bytes]:
    """In threads: reading and hashing both let go of the interpreter's lock."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(files, pool.map(_sha256, files.values()), strict=True))


def _own_files(package: Path) -> Iterator[Path]:
    yield package / "__init__.py"
    for room in ROOMS:
        path = package / room
        yield from [path] if path.is_file() else sorted(_files(path))


def _files(folder: Path) -> Iterator[Path]:
    """All but cached bytecode. Bytecode elsewhere counts: without a source beside it, it is what runs."""
    for path in folder.rglob("*"):
        if path.is_symlink() and path.is_dir():  # the interpreter would follow it, and a folder goes before a module
            raise WrongUse(f"{path.name} is a link to a folder: it cannot be measured.", step="measure")
        if path.is_file() and "__pycache__" not in path.parts[len(folder.parts) :]:
            yield path


def _parse(source: bytes, path: Path) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise WrongUse(f"{path.name} is not Python: the enclave could not start.", step="measure") from error


def _imports(path: Path) -> Iterator[str]:
    """Top-level names of third-party packages, wherever in the file they are imported."""
    source = path.read_bytes()
    tree = _parse(source, path)
    # A call that imports has its name in the source, as it stands there if all of it is ASCII: without one, statements do.
    calls = not source.isascii() or any(name.encode() in source for name in _IMPORTERS)
    for node in ast.walk(tree) if calls else _statements(tree):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(level=0, module=str(module)):
                names = [module]
            case ast.Call(func=ast.Attribute(attr=called) | ast.Name(id=called)) if called in _IMPORTERS:
                names = [_named(node, path)]
            case _:
                continue
        yield from {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"cloister"}


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All below it, however deep; they stand in other statements, their handlers and cases, and never in an expression."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        found = getattr(node, name, ())
        for child in found if isinstance(found, list) else ():  # a lambda's and a conditional expression's are none
            yield child
            yield from _statements(child)


def _named(call: ast.Call, path: Path) -> str:
    match call.args:
        case [ast.Constant(value=str(name)), *_]:
            return name
    raise WrongUse(f"{path.name} imports what only running it would tell: it cannot be measured.", step="measure")


def _distributions(names: set[str], owners: Mapping[str, list[str]]) -> set[str]:
    """What is not installed cannot run and is left out; what is there but belongs to nobody is refused."""
    for name in names - owners.keys():
        if importlib.util.find_spec(name) is not None:
            raise WrongUse(
                f"The enclave imports {name}, which belongs to no installed distribution: it cannot be measured.",
                step="measure",
                hint="Install it as a package, with its metadata.",
            )
    return {owner for name in names for owner in _normals(owners.get(name, []))}


def _refuse_shadows(names: Iterable[str], measured: set[Path], package: Path) -> None:
    """Each name must be found where it was measured, on the path that `host.process` gives the enclave."""
    importlib.invalidate_caches()
    search = [str(package.parent), *dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))]
    for name in sorted(names):
        spec = PathFinder.find_spec(name, search)
        if spec is not None and spec.has_location and Path(str(spec.origin)) not in measured:
            raise WrongUse(
                f"Something else stands in the place of {name}: it cannot be measured.", step="measure", got=spec.origin
            )


def _normals(names: Iterable[str]) -> set[str]:
    return {_normal(name) for name in names}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _closure(names: set[str]) -> set[str]:
    """With everything they require, as far as it is installed; extras only when something imports them."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found and _is_installed(name):
            found.add(name)
            waiting.extend(_requirements(name))
    return found


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _requirements(name: str) -> Iterator[str]:
    for line in importlib.metadata.requires(name) or []:
        if (match := _REQUIREMENT.match(line)) and not _EXTRA.search(line):
            yield _normal(match[1])


def _files_of(name: str) -> Iterator[tuple[str, Path]]:
    """Inside site-packages only: console scripts and manual pages lie outside and are never imported. Of a package
    every file, listed or not: one that was added could stand in for a module."""
    distribution = importlib.metadata.distribution(name)
    site = Path(str(distribution.locate_file("")))
    tops = {entry.parts[0] for entry in distribution.files or [] if ".." not in entry.parts} - {"__pycache__"}
    for top in tops:
        for path in [site / top] if (site / top).is_file() else _files(site / top):
            entry = path.relative_to(site).as_posix()
            if path.name not in _NOT_CODE and not entry.startswith(_ENGINE):
                yield entry, path
