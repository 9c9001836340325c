"""The files of an enclave under Gramine: which ones it opens, and a folder that holds exactly them.

The list is made from what is installed: our own code and the packages that it imports, the engine, the interpreter with
its standard library, and every shared library that the system's loader would find for them. The C library is not among
them, since Gramine brings its own. That nothing is missing is shown by a start that has nothing else
(tests/deploy/test_gramine_start.py).
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cloister.deploy.gramine import APP, ENGINE, LAUNCH, LIBRARIES, MODEL, PACKAGES, PYTHON, ROOT
from cloister.errors import WrongUse

__all__ = ["collect", "stage"]

_OWN = "cloister/"
_NEVER_IMPORTED = frozenset(
    {"__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
    | {"tkinter", "turtledemo", "venv"}
)
_NEVER_LOADED = re.compile(r"(_tkinter|_test\w*|_ctypes_test|_xx\w*|xx\w*)\.")
# The C library's own parts, as Gramine brings them; and the kernel's.
_C_LIBRARY = re.compile(
    r"(ld-linux-x86-64|lib(c|m|mvec|dl|rt|anl|nsl|util|pthread|resolv|thread_db|c_malloc_debug|nss_\w+|BrokenLocale))\.so[.0-9]*"
    r"|linux-vdso\.so\.1"
)
_NEEDED = re.compile(r"^\t(\S+) => (/\S.*) \(0x[0-9a-f]+\)$", re.MULTILINE)
_SHARED = re.compile(r"\.so(\.[0-9.]+)?$")


def collect(code: Mapping[str, Path], engine: Path, model: Path) -> dict[str, Path]:
    """Path inside the enclave -> file on this machine.

    `code`: the enclave's own, by module path ("cloister/…", and the packages that it imports). `engine`: the folder of
    llama.cpp's libraries. Raises: WrongUse where there is no `ldd`, or it does not say what a file needs.
    """
    files = {
        **{_place(name): path for name, path in code.items()},
        **{f"{ENGINE}/{path.name}": path for path in engine.glob("lib*.so*")},
        **_standard_library(Path(sysconfig.get_path("stdlib"))),
        f"{PYTHON}/bin/python3": Path(sys.executable).resolve(),
        MODEL: model.resolve(),
    }
    binaries = [path for inside, path in files.items() if _SHARED.search(inside) or inside.endswith("/python3")]
    own = {path.resolve() for path in binaries}
    for name, path in _needed(binaries):
        if not _C_LIBRARY.fullmatch(name) and path.resolve() not in own:
            files[f"{LIBRARIES}/{name}"] = path.resolve()
    return files


def _place(name: str) -> str:
    return f"{APP}/{name}" if name.startswith(_OWN) else f"{PACKAGES}/{name}"


def _standard_library(folder: Path) -> dict[str, Path]:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found: dict[str, Path] = {}
    for path in folder.rglob("*"):
        within = path.relative_to(folder)
        skipped = _NEVER_IMPORTED & set(within.parts[:-1]) or _NEVER_LOADED.match(path.name)
        if path.suffix in (".py", ".so") and path.is_file() and not skipped:
            found[f"{PYTHON}/lib/{version}/{within.as_posix()}"] = path
    return found


def _needed(binaries: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Name -> file, as the system's loader finds them. What it does not find would not load here either."""
    ldd = shutil.which("ldd")
    if ldd is None:
        raise WrongUse("`ldd` is missing: which libraries are needed cannot be told.", step="gramine.files")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LD_")}
    command = [ldd, *sorted(map(str, binaries))]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    found = _NEEDED.findall(done.stdout)
    if not found:
        raise WrongUse("`ldd` does not say which libraries are needed.", step="gramine.files")
    return ((name, Path(path)) for name, path in found)


def stage(folder: Path, files: Mapping[str, Path], launch: bytes) -> dict[str, str]:
    """Copies `files`, and writes `launch`, into `folder`/root as the enclave sees them. A model is linked where it can be.

    `folder`/root must not be there yet. The digest of each copy, by its path inside (SHA-256, hex), is returned: of the
    bytes that lie there, whatever became of the originals. Raises: WrongUse.
    """
    root = folder / ROOT
    try:
        root.mkdir(parents=True)
        for parent in {Path(inside).parent for inside in files}:
            (root / parent.relative_to("/")).mkdir(parents=True, exist_ok=True)
        (root / "lib").mkdir(exist_ok=True)
        (root / "tmp").mkdir(exist_ok=True)
        (root / LAUNCH.lstrip("/")).write_bytes(launch)
        with ThreadPoolExecutor(max_workers=4) as pool:
            digests = pool.map(lambda item: _put(root / item[0].lstrip("/"), item[1]), files.items())
            return dict(zip(files, digests, strict=True))
    except OSError as error:
        raise WrongUse(
            f"The enclave's files cannot be laid out: {error.strerror}.",
            hint="Name a folder that is not there yet, on a disk with room for the model.",
            step="gramine.files",
            got=str(error.filename or folder),
        ) from error


def _put(target: Path, source: Path) -> str:
    if target.name == Path(MODEL).name:
        with contextlib.suppress(OSError):
            os.link(source, target)
    if not target.exists():
        shutil.copyfile(source, target)
        target.chmod(0o755 if target.parent.name == "bin" else 0o644)
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
