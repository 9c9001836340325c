"""A bar while a model is loaded: on a terminal only, and only when it takes long enough to be seen."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cloister.cli import output

__all__ = ["loading_bar"]


@contextmanager
def loading_bar() -> Iterator[Callable[[float], None]]:
    """A function of the loaded share, 0 to 1."""
    if not output.is_terminal(sys.stderr):
        yield lambda _share: None
        return
    columns = (TextColumn("loading the model", style="dim"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share: bar.update(task, completed=share)
