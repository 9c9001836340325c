"""What every measuring command needs: a bar, the machine's name, models of random weights, its table."""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cloister.bench.shapes import SHAPES, write_random
from cloister.cli import output
from cloister.errors import WrongUse
from cloister.models.store import cache_directory

__all__ = ["machine", "measuring_bar", "random_model", "show", "stream_counts"]


@contextmanager
def measuring_bar(total: int) -> Iterator[Callable[[], None]]:
    """A function to be called `total` times, once after each piece of work. Shown on a terminal only."""
    columns = (TextColumn("measuring", style="dim"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not output.is_terminal(sys.stderr)) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def machine() -> dict[str, str | int]:
    """As far as the system says; enough to read the figures with."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else ""
    return {"cpu": model or platform.machine(), "cores": os.cpu_count() or 1, "python": platform.python_version()}


def random_model(shape: str) -> Path:
    """A q8_0 model of that shape, its weights random, written once. Raises: WrongUse when there is no such shape."""
    if shape not in SHAPES:
        raise WrongUse(f"There is no shape {output.one_line(shape, 40)!r}.", hint=f"Known: {', '.join(SHAPES)}.")
    return write_random(shape, cache_directory().parent / "bench", note=output.note)


def show(table: Table) -> None:
    """On standard output, 120 columns wide where that is no terminal."""
    Console(file=sys.stdout, width=None if output.is_terminal(sys.stdout) else 120).print(table)


def stream_counts(text: str) -> tuple[int, ...]:
    """Numbers of streams as a person writes them, `1,16`, smallest first. Raises: WrongUse."""
    try:
        counts = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise WrongUse("Numbers of streams look like 1,16.", got=text) from error
    if not all(1 <= count <= 64 for count in counts):
        raise WrongUse("A number of streams lies between 1 and 64.", got=text)
    return counts
