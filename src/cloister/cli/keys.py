"""`cloister keys`: API keys for `cloister serve --api-keys FILE`. The file holds hashes only."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from cloister.cli import output
from cloister.cli.output import AsJson
from cloister.enclave.boot import KeyHash
from cloister.enclave.llm.tenants import new_key
from cloister.errors import WrongUse

__all__ = ["read_keys", "register"]

_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._@-]{0,63}) ([0-9a-f]{64})")

KeyFile = Annotated[Path, typer.Argument(help="The file of key hashes.", show_default=False)]


def register(app: typer.Typer) -> None:
    app.callback()(_family)
    app.command("new")(new)
    app.command("list")(list_keys)


def _family() -> None:
    """Make and list API keys."""


def read_keys(path: Path) -> tuple[KeyHash, ...]:
    """One `name sha256` per line. Raises WrongUse with the line's number."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUse(
            f"{path} cannot be read as a file of API keys.", hint="`cloister keys new` makes one."
        ) from error
    keys = []
    for number, line in enumerate(lines, 1):
        if not (match := _LINE.fullmatch(line)):
            raise WrongUse(f"{path}, line {number}: not a name and a SHA-256.", hint="`cloister keys new` adds lines.")
        keys.append(KeyHash(match[1], match[2]))
    if not keys:
        raise WrongUse(f"{path} holds no key.", hint="`cloister keys new` adds one.")
    return tuple(keys)


def new(
    file: KeyFile,
    name: Annotated[str, typer.Argument(help="Whose key it is.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Make a key, print it once, and add its hash to FILE."""
    plain, digest = new_key()
    if not _LINE.fullmatch(f"{name} {digest}"):
        raise WrongUse("A key's name has letters, digits, dots, dashes.", got=name)
    if file.exists() and any(key.name == name for key in read_keys(file)):
        raise WrongUse(f"There is a key named {name} already.", hint="Choose another name, or remove its line.")
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as lines:
            os.fchmod(lines.fileno(), 0o600)
            lines.write(f"{name} {digest}\n")
    except OSError as error:
        raise WrongUse(f"{file} cannot be written: {error.strerror}.") from error
    if as_json:
        output.json_value({"name": name, "key": plain, "sha256": digest})
        return
    output.line(plain)
    output.note(f"Shown once. {file} holds its hash: cloister serve --api-keys {file}", "dim")


def list_keys(file: KeyFile, as_json: AsJson = False) -> None:
    """Names and the first digits of their hashes."""
    keys = read_keys(file)
    if as_json:
        output.json_value([{"name": key.name, "sha256": key.sha256} for key in keys])
        return
    for key in keys:
        output.line(f"{key.name}  sha256:{key.sha256[:12]}…")
