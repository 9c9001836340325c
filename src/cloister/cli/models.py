"""`cloister models pull|list`: the models on this machine."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from cloister.cli import output
from cloister.errors import WrongUse
from cloister.models.download import pull
from cloister.models.reference import HubModel, parse_reference
from cloister.models.store import Record, records

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.callback()(_family)
    app.command("pull")(_pull)
    app.command("list")(_list)


def _family() -> None:
    """Fetch and list models."""


def _pull(
    reference: Annotated[str, typer.Argument(metavar="REF", help="hf.co/org/repo or hf.co/org/repo:Q4_K_M")],
) -> None:
    """Fetch a model from the Hugging Face hub, or the newer revision of one that is here. Goes on after a cut."""
    model = parse_reference(reference)
    if not isinstance(model, HubModel):
        raise WrongUse(f"{reference} is on this machine already.", hint=f"cloister serve {reference}")
    with output.download_bar() as progress:
        record = pull(model, progress=progress)
    output.line(f"{record.file}  {record.size:,} bytes  sha256 {record.sha256}")
    output.note(f"cloister serve {model}", "dim")


def _list(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the models that were fetched."""
    found = list(records())
    if as_json:
        output.json_value([_to_json(record) for record in found])
        return
    for record in found:
        day = datetime.fromtimestamp(record.fetched_at, UTC).strftime("%Y-%m-%d")
        name = f"hf.co/{record.repository}:{record.quantization or record.file}"
        output.line(f"{output.one_line(name):<50} {record.size / 1e6:>9,.1f} MB  {day}  sha256 {record.sha256[:12]}…")
    if not found:
        output.note("None yet. The embedded models `default` and `tiny` are always there.")


def _to_json(record: Record) -> dict[str, str | int]:
    return {
        "repository": record.repository,
        "revision": record.revision,
        "file": record.file,
        "quantization": record.quantization,
        "sha256": record.sha256,
        "size": record.size,
        "fetched_at": record.fetched_at,
        "path": str(record.local_model().path),
    }
