"""The values of an app's secrets: from a file of the owner's that is never packaged, or from the environment."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from cloister.errors import WrongUse

__all__ = ["FILE", "read_secrets"]

FILE = "secrets.toml"
"""Beside `cloister.toml`: NAME = "value" lines. Left out of every bundle."""


def read_secrets(names: Sequence[str], environment: Mapping[str, str], file: Path | None) -> Mapping[str, str]:
    """Of each name, from the file where it stands there, else from the environment.

    Raises: WrongUse for one that is nowhere, and for a file that cannot be read; never with a value.
    """
    kept = {} if file is None else _read(file)
    found = {}
    for name in names:
        value = kept.get(name, environment.get(name))
        if not isinstance(value, str):
            hint = f'{name} = "…" in {FILE}, or {name} in the environment.'
            raise WrongUse(f"The secret {name} has no value.", step="secrets", hint=hint)
        found[name] = value
    return found


def _read(file: Path) -> Mapping[str, object]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        hint = 'Lines of the form NAME = "value".'
        raise WrongUse(f"{file} cannot be read.", step="secrets", hint=hint) from None
