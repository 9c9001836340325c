"""A streamed answer as markdown on a terminal: finished blocks are printed for good, the one that grows is redrawn."""

import re
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.text import Text

from cloister.cli import output

__all__ = ["finished", "show_markdown"]

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_PER_SECOND = 8  # redraws


def finished(text: str) -> int:
    """How many characters of `text` are whole markdown blocks, which nothing that follows can change: up to the last
    empty line outside of code between fences. A list's items count as blocks of their own."""
    end = at = 0
    fence = ""
    for line in text.splitlines(keepends=True):
        at += len(line)
        if not line.endswith("\n"):
            break
        marks = found.group(1) if (found := _FENCE.match(line)) else ""
        if fence:
            if marks.startswith(fence) and not line.strip().strip(fence[0]):
                fence, end = "", at
        elif marks:
            fence = marks
        elif not line.strip():
            end = at
    return end


def show_markdown(pieces: Iterable[str]) -> None:
    """Draw the answer as it comes, to standard output. What came is drawn whatever ends it, and nothing is lost by it.

    No link is made clickable, no picture is fetched: what a model wrote may lead anywhere.
    """
    console = Console(file=sys.stdout, highlight=False, emoji=False)
    rest, drawn = "", False
    try:
        with Live(console=console, transient=True, refresh_per_second=_PER_SECOND, vertical_overflow="crop") as live:
            for piece in pieces:
                rest += output.printable(piece)
                if cut := finished(rest):
                    live.update(Text(""))
                    drawn = _draw(console, rest[:cut], after=drawn)
                    rest = rest[cut:]
                live.update(_tail(rest, console.height))
            live.update(Text(""))
    finally:
        _draw(console, rest, after=drawn)


def _draw(console: Console, text: str, *, after: bool) -> bool:
    """Blocks, an empty line between them and those before. Returns whether anything was drawn by now."""
    if not text.strip():
        return after
    markdown = Markdown(text.strip("\n"), hyperlinks=False, code_theme="ansi_dark")
    lines = console.render_lines(markdown, pad=False)
    drawn = Segments([*([Segment.line()] if after else []), *(part for line in lines for part in _unpadded(line))])
    console.print(drawn, end="", soft_wrap=True)
    return True


def _unpadded(line: list[Segment]) -> list[Segment]:
    """A line without the spaces that fill it, which whoever copies it does not want."""
    while line and not line[-1].text.strip():
        line = line[:-1]
    if line:
        line = [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)]
    return [*line, Segment.line()]


def _tail(text: str, height: int) -> Text:
    """As much of the end as fits the screen, as it was written."""
    return Text("\n".join(text.splitlines()[-max(height - 2, 1) :]))
