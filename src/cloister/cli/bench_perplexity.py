"""`cloister bench perplexity`: how well a model foretells a text."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cloister.bench import plots
from cloister.bench.perplexity import WINDOW, Perplexity, measure
from cloister.cli import output
from cloister.cli.output import AsJson
from cloister.models.download import resolve

__all__ = ["perplexity"]


def perplexity(
    text: Annotated[Path, typer.Argument(metavar="FILE", help="Plain text, of 5,000 letters or more.")],
    model: Annotated[str, typer.Option(help="default, tiny, a .gguf file, or hf.co/org/repo[:quant].")] = "default",
    chunks: Annotated[
        int | None, typer.Option(min=1, help=f"Only the first so many chunks of {WINDOW} tokens; absent: all.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write perplexity.png and perplexity.svg here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How well a model foretells a text, measured exactly as llama.cpp measures it; lower is better."""
    if plot is not None:
        plots.require()
    with output.download_bar() as bar:
        found = resolve(model, progress=bar)
    with _bar() as progress:
        result = measure(found.path, text, chunks=chunks, progress=progress)
    if plot is not None:
        title = f"{found.name} on {text.name}: perplexity, lower is better"
        plots.lines(plot / "perplexity", title, "chunks read", "perplexity", {found.name: result.course})
    if as_json:
        output.json_value({"model": found.name, "text": text.name, **result.to_json()})
    else:
        _show(found.name, text.name, result)


@contextmanager
def _bar() -> Iterator[Callable[[int, int, float], None]]:
    """A function of chunks done, chunks in all, and the perplexity so far. Shown on a terminal only."""
    columns = (TextColumn("{task.description}", style="dim"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not output.is_terminal(sys.stderr)
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("reading the text", total=None)
        yield lambda done, total, value: bar.update(
            task, completed=done, total=total, description=f"perplexity {value:.2f}"
        )


def _show(model: str, text: str, result: Perplexity) -> None:
    output.line(f"perplexity {result.value:.4f} ± {result.error:.4f}, {result.bits_per_byte:.4f} bits per byte")
    output.line(
        f"{output.one_line(model, 60)} on {output.one_line(text, 60)}: {result.chunks} chunks of {WINDOW} tokens, "
        f"{result.scored:,} tokens scored ({result.scored_bytes:,} bytes), in {result.seconds:.1f} s"
    )
