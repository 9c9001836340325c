"""An app's locked requirements as wheels: fetched by pip, each held against the hash that the lock names. Neither is
anything built here, nor does the host ever install anything."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from cloister.errors import MalformedApp, NotTrusted, WrongUse

__all__ = ["PYTHON", "fetched"]

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
"""The minor version that wheels are chosen for: this one, which must be the enclave's."""

_OPTIONS = ("--require-hashes", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet")


@contextmanager
def fetched(lock: Path) -> Iterator[list[tuple[str, Path]]]:
    """(name, file) of every wheel, sorted, for as long as the context lasts.

    Raises: MalformedApp for a lock without hashes or what has no wheel for this machine, NotTrusted for a package that is
    not the one that was locked, WrongUse without pip.
    """
    with TemporaryDirectory(prefix="cloister-") as folder:
        _download(lock, Path(folder))
        wheels = sorted((path.name, path) for path in Path(folder).iterdir())
        if not wheels:
            raise MalformedApp(f"{lock.name} names no package.", step="requirements", hint="Leave `requirements` away.")
        yield wheels


def _download(lock: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", *_OPTIONS, "--dest", str(folder), "--requirement", str(lock)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if ran.returncode == 0:
        return
    words = ran.stderr
    if "No module named pip" in words:
        raise WrongUse("pip is needed to fetch the requirements.", step="requirements", hint="python -m ensurepip")
    got = next((line for line in words.splitlines() if line.startswith("ERROR:")), "")[:300]
    if "DO NOT MATCH THE HASHES" in words:
        raise NotTrusted(
            "A package is not the one that was locked.",
            step="requirements",
            got=got,
            hint="Somebody changed the package or the lock. If it was you: lock anew.",
        )
    hint = f"Lock it with hashes: pip-compile --generate-hashes -o {lock.name} requirements.in"
    raise MalformedApp(f"{lock.name} cannot be fetched as wheels.", step="requirements", got=got, hint=hint)
