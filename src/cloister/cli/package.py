"""`cloister package [DIR]`: the app and its model as one sealed file."""

from pathlib import Path
from typing import Annotated

import typer

from cloister.cli import output
from cloister.cli.local import state_directory
from cloister.models.download import resolve
from cloister.owner.appfile import AppFile, read_appfile
from cloister.owner.package import Package
from cloister.owner.package import package as write_package

__all__ = ["model_of", "pack", "register"]


def register(app: typer.Typer) -> None:
    app.command()(package)


def package(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where cloister.toml is.")] = Path(),
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Absent: NAME.cloister in DIR.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What was made, as JSON.")] = False,
) -> None:
    """Seal an app, its requirements and its model into one file, under fresh keys that stay on this machine."""
    app = read_appfile(folder)
    made = pack(app, out or folder / f"{app.name}.cloister", state_directory())
    sections = made.head.manifest.sections
    if as_json:
        output.json_value(
            {
                "bundle": str(made.path),
                "sha256": made.sha256,
                "app_sha256": made.head.sha256,
                "bytes": made.head.total,
                "python": made.head.manifest.python,
                "sections": [{"name": one.name, "sha256": one.sha256, "bytes": one.size} for one in sections],
            }
        )
        return
    for one in sections:
        output.note(f"{one.name:<13} {one.size:>14,} bytes  sha256:{one.sha256}", "dim")
    if python := made.head.manifest.python:
        output.note(f"requirements  for Python {python}", "dim")
    output.note(f"app           sha256:{made.head.sha256}  (the same for the same app: pin it)")
    output.line(str(made.path))


def pack(app: AppFile, out: Path, state: Path) -> Package:
    """With a progress bar on a terminal. Raises: what `owner.package` raises."""
    with output.download_bar() as bar:
        model = resolve(model_of(app), progress=bar) if app.model else None
        return write_package(app, out, state=state, model=model, progress=bar)


def model_of(app: AppFile) -> str:
    """What `app.model` names: a file is looked for beside the app's own, wherever the command is called."""
    beside = app.folder / app.model
    return str(beside) if beside.suffix == ".gguf" and beside.is_file() else app.model
