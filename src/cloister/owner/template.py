"""What `cloister init` writes: a small app that works, of each kind."""

import re
from importlib import resources
from pathlib import Path

from cloister.errors import WrongUse
from cloister.evidence.bundle import NAME

__all__ = ["TEMPLATES", "name_of", "write_template"]

TEMPLATES = {
    "llm": "the built-in language model, with your weights",
    "flask": "a Flask app",
    "fastapi": "a FastAPI app with a stream",
}

_SUFFIX = ".tmpl"
_DOTTED = {"cloisterignore": ".cloisterignore"}


def name_of(folder: Path) -> str:
    """A name for the app in a folder: the folder's own, as far as an app may have it."""
    name = re.sub(r"[^a-z0-9-]+", "-", folder.resolve().name.lower()).strip("-")[:63]
    return name or "my-app"


def write_template(folder: Path, template: str, name: str) -> list[str]:
    """The names of the files that were written. Nothing that is there is changed.

    Raises: WrongUse for an unknown template, a name that no app may have, or where a file of that name is there already.
    """
    if not NAME.fullmatch(name):
        hint = "1 to 63 lower-case letters, digits and dashes, no dash first."
        raise WrongUse("An app cannot have that name.", step="name", hint=hint)
    if template not in TEMPLATES:
        raise WrongUse("There is no such template.", expected=" or ".join(TEMPLATES), got=template[:40])
    root = resources.files("cloister.owner") / "templates" / template
    files = {}
    for entry in sorted(root.iterdir(), key=lambda one: one.name):
        plain = entry.name.removesuffix(_SUFFIX)
        files[_DOTTED.get(plain, plain)] = entry.read_text(encoding="utf-8").replace("NAME", name, 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if there := sorted(file for file in files if (folder / file).exists()):
            raise WrongUse(f"{folder / there[0]} is there already.", hint="Choose another folder: cloister init DIR")
        for file, content in files.items():
            (folder / file).write_text(content, encoding="utf-8")
    except OSError as error:
        raise WrongUse(f"{folder} cannot be written.", got=error.strerror) from error
    return sorted(files)
