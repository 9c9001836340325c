"""`cloister models pull|list|show|quantize|rm`: the models on this machine."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cloister.cli import output
from cloister.cli.description import Shown
from cloister.cli.output import AsJson
from cloister.enclave.llm.llama.config import physical_cores
from cloister.enclave.llm.llama.library import library_digest, library_dir
from cloister.errors import MalformedModel, WrongUse
from cloister.models.download import pull, resolve, split_quantization
from cloister.models.gguf import read_description
from cloister.models.lineage import Lineage, digest_model, read_lineage
from cloister.models.memory import KV_TYPES, available_memory, estimate
from cloister.models.quantizer import TYPES, parse_type, quantize_traced
from cloister.models.reference import HubModel, parse_reference
from cloister.models.store import (
    LocalModel,
    Record,
    check_removable,
    find_record,
    quantized_models,
    quantized_name,
    quantized_path,
    records,
    remove,
)

__all__ = ["register"]

Local = Annotated[
    str, typer.Argument(metavar="REF", help="default, tiny, a .gguf file, hf.co/org/repo[:quant], or a name.")
]


def register(app: typer.Typer) -> None:
    app.callback()(_family)
    app.command("pull")(_pull)
    app.command("list")(_list)
    app.command("show")(_show)
    app.command("quantize")(_quantize)
    app.command("rm")(_rm)


def _family() -> None:
    """Fetch, describe, quantize and remove models."""


def _pull(
    reference: Annotated[str, typer.Argument(metavar="REF", help="hf.co/org/repo or hf.co/org/repo:Q4_K_M")],
    as_json: AsJson = False,
) -> None:
    """Fetch a model from the Hugging Face hub, or the newer revision of one that is here. Goes on after a cut."""
    model = parse_reference(reference)
    if not isinstance(model, HubModel):
        raise WrongUse(f"{reference} is on this machine already.", hint=f"cloister serve {reference}")
    with output.download_bar() as progress:
        record = pull(model, progress=progress)
    if as_json:
        output.json_value(_fetched_row(record))
        return
    output.line(f"{record.file}  {record.size:,} bytes  sha256 {record.sha256}")
    output.note(f"cloister serve {model}", "dim")


def _list(as_json: AsJson = False) -> None:
    """List the models that were fetched, and those that were quantized here."""
    found = [*map(_fetched_row, records()), *map(_quantized_row, quantized_models())]
    if as_json:
        output.json_value(found)
        return
    for row in found:
        made = row["fetched_at"] if "fetched_at" in row else row["quantized_at"]
        day = datetime.fromtimestamp(int(made), UTC).strftime("%Y-%m-%d")
        name, sha256 = output.one_line(str(row["name"])), str(row["sha256"])[:12]
        output.line(f"{name:<50} {int(row['size']) / 1e6:>9,.1f} MB  {day}  sha256 {sha256}…")
    if not found:
        output.note("None yet. The embedded models `default` and `tiny` are always there.")


def _fetched_row(record: Record) -> dict[str, str | int]:
    return {
        "name": f"hf.co/{record.repository}:{record.quantization or record.file}",
        "repository": record.repository,
        "revision": record.revision,
        "file": record.file,
        "quantization": record.quantization,
        "sha256": record.sha256,
        "size": record.size,
        "fetched_at": record.fetched_at,
        "path": str(record.local_model().path),
    }


def _quantized_row(path: Path) -> dict[str, str | int]:
    lineage, _ = _read_lineage(path)
    status = path.stat()
    return {
        "name": path.stem,
        "file": path.name,
        "quantization": split_quantization(path.stem)[1],
        "sha256": lineage.sha256 if lineage else "",
        "size": status.st_size,
        "quantized_at": int(status.st_mtime),
        "path": str(path),
    }


def _read_lineage(path: Path) -> tuple[Lineage | None, str]:
    """The record, and what is wrong with it when it is none."""
    try:
        return read_lineage(path), ""
    except MalformedModel as error:
        return None, error.message


def _find(reference: str) -> LocalModel:
    """What `reference` names, if it is on this machine: nothing is fetched. Raises: WrongUse."""
    found = parse_reference(reference)
    if not isinstance(found, HubModel):
        return resolve(found)
    if record := find_record(found.repository, found.tag):
        return record.local_model()
    raise WrongUse(f"{found} is not on this machine.", hint=f"cloister models pull {found}")


def _show(
    reference: Local,
    context: Annotated[int | None, typer.Option(min=64, help="Tokens per stream; absent: the model's own.")] = None,
    streams: Annotated[int, typer.Option(min=1, max=64, help="Conversations at the same time.")] = 16,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    template: Annotated[bool, typer.Option("--template", help="Print the chat template and nothing else.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a model is, where it comes from, and what memory it will take; without loading it."""
    found = _find(reference)
    model = read_description(found.path)
    if template:
        output.line(model.chat_template or "")
        return
    available = available_memory()
    lineage, trouble = _read_lineage(found.path)
    shown = Shown(
        name=found.name,
        source=found.source,
        path=str(found.path),
        model=model,
        digests=digest_model(found.path),
        lineage=lineage,
        memory={
            kind: estimate(model, context=context, streams=streams, kv_type=kind, available=available)
            for kind in KV_TYPES
        },
        available=available,
    )
    if trouble:
        output.note(output.styled(("warning: ", "bold yellow"), (trouble, "")))
    if as_json:
        output.json_value(shown.to_json(tensors=tensors))
    else:
        shown.write_lines(tensors=tensors)


def _quantize(
    source: Local,
    type: Annotated[str, typer.Argument(metavar="TYPE", help=", ".join(TYPES))],  # noqa: A002
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write; absent: among the models here.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, max=256, help="0: one for each physical core.")] = 0,
    requantize: Annotated[bool, typer.Option("--requantize", help="From a model that is quantized already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a smaller model of one that is here, with llama.cpp's own quantizer, and record how it was made."""
    wanted = parse_type(type)
    found = _find(source)
    before = read_description(found.path)
    name = quantized_name(split_quantization(found.path.stem)[0], wanted)
    target = out.expanduser().absolute() if out else quantized_path(name)
    if target.exists():
        raise WrongUse(f"{target} is there already.", hint=f"cloister models rm {out or name}")
    if before.quantized and requantize:
        lossy = f"{found.path.name} is quantized already: rounded twice, it answers worse than from the full model"
        output.note(output.styled(("warning: ", "bold yellow"), (lossy, "")))
    if out is None:
        target.parent.mkdir(parents=True, exist_ok=True)
    library = library_dir()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing half is left behind then, either
    with _tensor_bar(f"quantizing to {wanted}") as progress:
        lineage = quantize_traced(
            found.path,
            target,
            wanted,
            library=library,
            engine_sha256=library_digest(library),
            threads=threads or physical_cores(),
            progress=progress,
            requantize=requantize,
        )
    if as_json:
        told = {"file": str(target), "size": lineage.size, "sha256": lineage.sha256, "quantization": wanted}
        output.json_value(told)
        return
    share = f"{lineage.size / before.file_size:.1%}"
    output.line(f"{target.name}  {before.file_size:,} -> {lineage.size:,} bytes ({share})  sha256 {lineage.sha256}")
    kept = {kind: count for kind, (count, _) in read_description(target).by_type().items()}
    output.note(", ".join(f"{count} tensors {kind}" for kind, count in kept.items()), "dim")
    output.note(f"cloister serve {out or name}", "dim")


@contextmanager
def _tensor_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (tensors begun, tensors in all) that draws a bar on a terminal, and does nothing in a pipe."""
    if not output.is_terminal(sys.stderr):
        yield lambda _done, _total: None
        return
    columns = (TextColumn("{task.description}", style="dim"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _rm(
    reference: Local,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a model from this machine: its file, and what is recorded of it."""
    path = _find(reference).path
    check_removable(path)
    size = path.stat().st_size
    if not yes:
        output.note(f"Remove {output.one_line(str(path))} ({size / 1e6:,.1f} MB)? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            output.note("Nothing was removed.")
            raise typer.Exit(1)
    remove(path)
    if as_json:
        output.json_value({"removed": path.name, "size": size})
        return
    output.line(f"removed {path.name}  {size:,} bytes")
