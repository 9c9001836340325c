"""The command line in this process."""

from typing import Any

import typer
from typer.testing import CliRunner


def run(app: typer.Typer, *words: str) -> Any:
    return CliRunner().invoke(app, list(words))
