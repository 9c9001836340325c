"""An app's locked requirements as wheels: fetched by pip, each held against the hash that the lock names. Neither is
anything built here, nor does the host ever install anything."""

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cloister.errors import MalformedApp, NotTrusted, WrongUse

__all__ = ["HERE", "IMAGE_PYTHON", "NEWEST_GLIBC", "Target", "fetched", "target_of"]

_OPTIONS = ("--require-hashes", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet")
_IMAGE_PLATFORMS = ("tdx", "sev-snp", "vtpm", "azure-tdx", "azure-sev-snp")
IMAGE_PYTHON, NEWEST_GLIBC = "3.13", 41
"""What the measured image has (packaging/image/build.py): glibc 2.41."""
_IMAGE_TAGS = (
    *("linux_x86_64", "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"),
    *(f"manylinux_2_{minor}_x86_64" for minor in range(5, NEWEST_GLIBC + 1)),
)
_NOWHERE = re.compile(r"No matching distribution found for (\S{1,200})")
_CONDITION = re.compile(r"^\s*[A-Za-z0-9][^#\n]*;", re.MULTILINE)
_REQUIRES = re.compile(r"^Requires-Dist:\s*([A-Za-z0-9._-]+)[^;\n]*$", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Target:
    """What wheels are chosen for: CPython's minor version, and the tags of the platform, () for this machine's own."""

    python: str
    tags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"Python {self.python} on {'x86-64 Linux' if self.tags else 'a machine like this one'}"


HERE = Target(f"{sys.version_info.major}.{sys.version_info.minor}")
"""This Python, on this machine."""


def target_of(platform: str, python: str = "") -> Target:
    """What an app meets on one of `verify.policy.PLATFORMS`: the image's Python in a virtual machine, else, and for "", this
    one. `python`: another minor version, "" for that one."""
    if platform in _IMAGE_PLATFORMS:
        return Target(python or IMAGE_PYTHON, _IMAGE_TAGS)
    return Target(python or HERE.python)


@contextmanager
def fetched(lock: Path, target: Target = HERE) -> Iterator[list[tuple[str, Path]]]:
    """(name, file) of every wheel, sorted, for as long as the context lasts.

    For another Python than this one, pip cannot tell which dependencies are needed there: the lock must name them all without
    conditions, and what a wheel requires unconditionally must be in it.

    Raises: MalformedApp for a lock without hashes or what has no wheel for the target, NotTrusted for a package that is
    not the one that was locked, WrongUse without pip.
    """
    with TemporaryDirectory(prefix="cloister-") as folder:
        _download(lock, Path(folder), target)
        wheels = sorted((path.name, path) for path in Path(folder).iterdir())
        if not wheels:
            raise MalformedApp(f"{lock.name} names no package.", step="requirements", hint="Leave `requirements` away.")
        if target.python != HERE.python:
            _check_complete(lock, [path for _, path in wheels])
        yield wheels


def _download(lock: Path, folder: Path, target: Target) -> None:
    command = [sys.executable, "-m", "pip", "download", *_OPTIONS, *_choice(lock, target), "--dest", str(folder)]
    command += ["--requirement", str(lock)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if ran.returncode:
        raise _refusal(lock, target, ran.stderr)


def _choice(lock: Path, target: Target) -> list[str]:
    """pip's options. Conditions it would judge by the Python that runs it. Raises: MalformedApp."""
    if target == HERE:
        return []
    options = ["--implementation", "cp", "--python-version", target.python]
    options += [word for tag in target.tags for word in ("--platform", tag)]
    if target.python == HERE.python:
        return options
    if _CONDITION.search(_text(lock)):
        raise MalformedApp(
            f"{lock.name} has lines with conditions (after a `;`), and is to be read for another Python than this one.",
            step="requirements",
            hint=f"Lock it for Python {target.python} alone, or package the app with that Python.",
        )
    return [*options, "--no-deps"]


def _text(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MalformedApp(f"{lock.name} cannot be read as text.", step="requirements") from error


def _check_complete(lock: Path, wheels: Sequence[Path]) -> None:
    there = {_normal(path.name.partition("-")[0]) for path in wheels}
    for path in wheels:
        if missing := sorted(_required_by(path) - there):
            raise MalformedApp(
                f"{lock.name} lacks {missing[0]}, which {path.name.partition('-')[0]} requires.",
                step="requirements",
                hint=f"Lock it anew: pip-compile --generate-hashes -o {lock.name} requirements.in",
            )


def _required_by(wheel: Path) -> set[str]:
    """The names, normalised, of what a wheel requires whatever the machine and the extras."""
    try:
        with zipfile.ZipFile(wheel) as packed:
            (name,) = (one for one in packed.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", one))
            head = packed.read(name).decode(errors="replace").replace("\r\n", "\n").partition("\n\n")[0]
    except (zipfile.BadZipFile, ValueError) as error:
        raise MalformedApp(f"{wheel.name} is no wheel.", step="requirements") from error
    return {_normal(found) for found in _REQUIRES.findall(head)}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _refusal(lock: Path, target: Target, words: str) -> MalformedApp | NotTrusted | WrongUse:
    if "No module named pip" in words:
        return WrongUse("pip is needed to fetch the requirements.", step="requirements", hint="python -m ensurepip")
    got = next((line for line in words.splitlines() if line.startswith("ERROR:")), "")[:300]
    if "DO NOT MATCH THE HASHES" in words:
        return NotTrusted(
            "A package is not the one that was locked.",
            step="requirements",
            got=got,
            hint="Somebody changed the package or the lock. If it was you: lock anew.",
        )
    if nowhere := _NOWHERE.search(words):
        what = f"{lock.name}: {nowhere[1]} has no wheel for {target}."
        hint = "Lock a version that has one."
        if not target.tags:
            hint += f' If another Python runs the app, say which in cloister.toml: python = "{IMAGE_PYTHON}".'
        return MalformedApp(what, step="requirements", got=got, hint=hint)
    hint = f"Lock it with hashes: pip-compile --generate-hashes -o {lock.name} requirements.in"
    return MalformedApp(f"{lock.name} cannot be fetched as wheels.", step="requirements", got=got, hint=hint)
