"""`cloister bench speed`: the original's second table, models of several kinds and sizes by number of streams."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cloister.bench import plots
from cloister.bench.load import PROMPT_TOKENS
from cloister.bench.speed import DEFAULT, FULL, Plan, Result, Subject, Watch, measure, parse_subject
from cloister.bench.timed import Timing
from cloister.cli import output
from cloister.cli.measuring import machine, show, stream_counts
from cloister.cli.output import AsJson
from cloister.models.download import resolve
from cloister.models.store import cache_directory

__all__ = ["speed"]

_MINUTES, _FULL_MINUTES = 20, 90


def speed(
    models: Annotated[
        str, typer.Option(help="Shapes (pythia-1b, pythia-1b:q4_0), .gguf files or hf.co references.", metavar="A,B")
    ] = "",
    full: Annotated[bool, typer.Option("--full", help="The original's three largest models, too.")] = False,
    streams: Annotated[str, typer.Option(help="Numbers of concurrent streams.")] = "1,2,4,8,16",
    tokens: Annotated[int, typer.Option(min=4, max=900, help="Of each stream, while all of them run.")] = 24,
    minutes: Annotated[
        int, typer.Option(min=0, max=1440, help=f"No run begins later; 0: {_MINUTES}, or {_FULL_MINUTES} with --full.")
    ] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Write speed.png and speed.svg here.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the models that are written for this.")] = False,
    as_json: AsJson = False,
) -> None:
    """First token, time between tokens, and tokens per second of whole models, by number of streams."""
    if plot is not None:
        plots.require()
    plan = Plan(
        streams=stream_counts(streams),
        tokens=tokens,
        seconds=60.0 * (minutes or (_FULL_MINUTES if full else _MINUTES)),
        folder=cache_directory().parent / "bench",
        keep=keep,
    )
    names = models.split(",") if models else (FULL if full else DEFAULT)
    subjects = [_subject(name.strip()) for name in names]
    with _bar(len(subjects) * len(plan.streams)) as watch:
        results = list(measure(subjects, plan, watch))
    if plot is not None:
        _plot(plot, results)
    if as_json:
        output.json_value(
            {
                "machine": machine(),
                "prompt_tokens": PROMPT_TOKENS,
                "tokens": tokens,
                "results": [result.to_json() for result in results],
            }
        )
    else:
        _show(results, plan)


def _subject(text: str) -> Subject:
    """A shape, or else a real model, fetched when it is not here."""
    if shape := parse_subject(text):
        return shape
    with output.download_bar() as progress:
        found = resolve(text, progress=progress)
    return Subject(found.name, found.path)


@contextmanager
def _bar(total: int) -> Iterator[Watch]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    hidden = not output.is_terminal(sys.stderr)
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)
        yield Watch(
            doing=lambda name, what: bar.update(task, description=output.one_line(f"{name}: {what}", 60)),
            ran=lambda: bar.advance(task),
        )


def _show(results: Sequence[Result], plan: Plan) -> None:
    here = machine()
    output.line(f"{here['cpu']}, {here['cores']} cores; the decode loop bare, without server and seal")
    output.line(
        f"each stream: a prompt of {PROMPT_TOKENS} tokens, all at once, then {plan.tokens} tokens while all of them run"
    )
    table = Table("model", "weights")
    for title in ("GB", "streams", "first token s", "between ms", "95 % under", "tokens/s", "with prompts"):
        table.add_column(title, justify="right")
    for result in results:
        _add_rows(table, result)
    show(table)
    output.line("GB: in memory while running. first token: median. tokens/s: of all streams, while all of them run;")
    output.line("with prompts: from the beginning, reading the prompts included.")
    if any(result.random and result.timings for result in results):
        output.line(
            "random: made here in the model's true shape, which runs as fast as the real one; what it writes is noise."
        )


def _add_rows(table: Table, result: Result) -> None:
    name = output.one_line(result.name, 40)
    weights = output.one_line(result.quantization, 20) + (", random" if result.random else "")
    for at, timing in enumerate(result.timings):
        first = (name, weights, f"{result.resident / 1e9:.1f}") if not at else ("", "", "")
        table.add_row(*first, *_figures(timing), end_section=at + 1 == len(result.timings) and not result.missing)
    if result.missing:
        why = output.one_line(f"not measured: {result.missing}")
        table.add_row("" if result.timings else name, why, *("-" for _ in range(7)), end_section=True)


def _figures(timing: Timing) -> tuple[str, ...]:
    return (
        str(timing.streams),
        f"{timing.first_token:.2f}",
        f"{timing.between * 1000:.1f}",
        f"{timing.between_p95 * 1000:.1f}",
        f"{timing.tokens_per_second:.1f}",
        f"{timing.with_prompts:.1f}",
    )


def _plot(folder: Path, results: Sequence[Result]) -> None:
    series = {
        f"{result.name} {result.quantization}": [(one.streams, one.tokens_per_second) for one in result.timings]
        for result in results
        if result.timings
    }
    plots.lines(folder / "speed", "Speed by number of streams", "streams", "tokens/s, all streams together", series)
