"""`cloister bench quant`: the original's first table, one model in every quantization."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cloister.bench import plots
from cloister.bench.quant import TYPES, Comparison, Row, Text, compare
from cloister.bench.roofline import last_cache
from cloister.bench.shapes import SHAPES, write_random
from cloister.cli import output
from cloister.cli.measuring import machine, show
from cloister.cli.output import AsJson
from cloister.errors import WrongUse
from cloister.models.download import resolve
from cloister.models.quantizer import parse_type
from cloister.models.store import LocalModel, cache_directory

__all__ = ["quant"]


def quant(
    model: Annotated[str, typer.Argument(help="An f16, bf16 or f32 model, or a shape (pythia-1b): random weights.")],
    types: Annotated[str, typer.Option(metavar="A,B", help="Of these, in any order.")] = ",".join(TYPES),
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Measure perplexity on this text.")] = None,
    chunks: Annotated[int, typer.Option(min=0, help="Chunks of 512 tokens of the text; 0: all.")] = 100,
    context: Annotated[int, typer.Option(min=128, help="Tokens that memory is shown for.")] = 2048,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Write plots here, as PNG and SVG.")] = None,
    as_json: AsJson = False,
) -> None:
    """One model in every quantization: size, memory, speed, share of what memory gives, perplexity; and which to take."""
    wanted = _types(types)
    if plot is not None:
        plots.require()
    random = model in SHAPES
    if random and text is not None:
        raise WrongUse("Random weights foretell nothing: there is no perplexity to measure.", hint="Leave --text away.")
    found = _model(model)
    with _bar(len(wanted)) as progress:
        result = compare(
            found.path,
            cache_directory().parent / "bench",
            types=wanted,
            context=context,
            text=None if text is None else Text(text, chunks or None),
            progress=progress,
        )
    if plot is not None:
        _plot(plot, found.name, result)
    if as_json:
        output.json_value({"model": found.name, "random_weights": random, "machine": machine(), **result.to_json()})
    else:
        _show(found, result, random=random)


def _types(text: str) -> tuple[str, ...]:
    known = {name.upper(): name for name in TYPES}
    return tuple(known[kind] for kind in sorted({parse_type(part.strip()) for part in text.split(",")}))


def _model(name: str) -> LocalModel:
    if name in SHAPES:
        path = write_random(name, cache_directory().parent / "bench", note=output.note, type="f16")
        return LocalModel(path, f"{name} shape", "random weights")
    with output.download_bar() as bar:
        return resolve(name, progress=bar)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str, float], None]]:
    """A function of what is being done and how many types are done. Shown on a terminal only."""
    columns = (TextColumn("{task.description}", style="dim", markup=False), BarColumn(), TimeElapsedColumn())
    hidden = not output.is_terminal(sys.stderr)
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)
        yield lambda what, done: bar.update(task, description=what, completed=done)


def _show(model: LocalModel, result: Comparison, *, random: bool) -> None:
    here = machine()
    output.line(
        f"{output.one_line(model.name, 60)}{', random weights' if random else ''}; {here['cpu']}, {here['cores']} cores, "
        f"memory read at {result.bandwidth / 1e9:.1f} GB/s"
    )
    scored = result.rows[0].perplexity
    table = Table("type")
    titles = ["file MB", "memory MB", "ms/token", "tokens/s", "prompt tok/s", "roofline"]
    for title in titles + (["perplexity", f"to {result.rows[0].type}"] if scored else []):
        table.add_column(title, justify="right")
    for row in result.rows:
        table.add_row(*_cells(result, row))
    show(table)
    output.line(
        f"memory: resident with a cache of {result.context} tokens. tokens/s: one stream, medians. roofline: the share of "
        "the memory's bandwidth that decoding takes, runs and readings in turn."
    )
    if min(row.read for row in result.rows) < last_cache():
        output.line("Some of these weights fit the processor's last-level cache: there the roofline says nothing.")
    if scored:
        output.line(
            f"perplexity: on {scored.chunks} chunks of 512 tokens; {result.rows[0].type} takes "
            f"{scored.bits_per_byte:.3f} bits per byte of them."
        )
    else:
        output.line(f"perplexity: not measured, {'the weights are random' if random else 'no --text was given'}.")
    output.line(f"Take {result.recommend()[1]}")


def _cells(result: Comparison, row: Row) -> list[str]:
    cells = [
        row.type,
        f"{row.file_size / 1e6:,.1f}",
        f"{row.resident / 1e6:,.0f}",
        f"{row.token * 1000:.2f}",
        f"{row.tokens_per_second:.1f}",
        f"{row.prompt:.0f}",
        f"{100 * row.share:.0f} %",
    ]
    if row.perplexity is not None:
        loss, _ = result.loss(row)
        cells += [f"{row.perplexity.value:.3f} ± {row.perplexity.error:.3f}", f"{100 * loss:+.2f} %"]
    return cells


def _plot(folder: Path, name: str, result: Comparison) -> None:
    rows = result.rows
    plots.bars(folder / "quant-size", f"{name}: size of the file", "MB", {r.type: r.file_size / 1e6 for r in rows})
    speed = {row.type: row.tokens_per_second for row in rows}
    plots.bars(folder / "quant-speed", f"{name}: speed of one stream", "tokens/s", speed)
    if rows[0].perplexity is not None:
        values = {row.type: row.perplexity.value for row in rows if row.perplexity is not None}
        plots.bars(folder / "quant-perplexity", f"{name}: perplexity", "perplexity (lower is better)", values)
