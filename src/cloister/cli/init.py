"""`cloister init [DIR]`: a small app that works, to start from."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cloister.cli import output
from cloister.errors import WrongUse
from cloister.owner.template import TEMPLATES, name_of, write_template

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command()(init)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Made if it is not there.")] = Path(),
    template: Annotated[str, typer.Option(help=f"{', '.join(TEMPLATES)}; absent: asks.")] = "",
    name: Annotated[str, typer.Option(help="What the app is called; absent: as the folder.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="What was written, as JSON.")] = False,
) -> None:
    """Write cloister.toml and a small app that works."""
    chosen = template or _ask()
    called = name or name_of(folder)
    files = write_template(folder, chosen, called)
    if as_json:
        output.json_value({"name": called, "template": chosen, "folder": str(folder), "files": files})
        return
    output.line(f"{called}: {TEMPLATES[chosen]}, in {folder}")
    for file in files:
        output.note(f"  {file}", "dim")
    output.note(f"next: cloister test {folder}")


def _ask() -> str:
    if not output.is_terminal(sys.stdin):
        raise WrongUse("Which template?", hint=f"cloister init --template {'|'.join(TEMPLATES)}")
    for one, what in TEMPLATES.items():
        output.note(f"  {one:<8} {what}")
    answer: str = typer.prompt("template", default="llm", err=True)
    return answer.strip()
