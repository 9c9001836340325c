"""Wheels of what is installed here, and a lock over them: what pip would fetch, without any network."""

import hashlib
import importlib.metadata
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

FLASK = ("blinker", "click", "flask", "itsdangerous", "jinja2", "markupsafe", "werkzeug")


def closure(*names: str) -> list[str]:
    """With what they require here, extras left out."""
    found: list[str] = []
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.append(name)
            waiting += [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in requires if "extra" not in line]
    return sorted(found)


def build_wheel(name: str, folder: Path) -> Path:
    """Of an installed distribution, from its own files."""
    distribution = importlib.metadata.distribution(name)
    tag = "py3-none-any"
    for line in (distribution.read_text("WHEEL") or "").splitlines():
        if line.startswith("Tag: "):
            tag = line.removeprefix("Tag: ")
    project = re.sub(r"[-_.]+", "_", distribution.metadata["Name"]).lower()
    path = folder / f"{project}-{distribution.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in distribution.files or []:
            source = Path(str(distribution.locate_file(file)))
            if ".." not in file.parts and "__pycache__" not in file.parts and source.is_file():
                wheel.write(source, file.as_posix())
    return path


def lock(names: Iterable[str], folder: Path, file: Path) -> Path:
    """Wheels in `folder`, and `file` that names each with its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in names:
        wheel = build_wheel(name, folder)
        version = importlib.metadata.version(name)
        lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    file.write_text("".join(lines))
    return file
