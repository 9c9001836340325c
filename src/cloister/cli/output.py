"""The one place that writes to the terminal.

Much of what the commands show was written by somebody who may be hostile: a model, an enclave's evidence, a server's
error. Control characters in it could paint over what cloister says ("verified"), write the clipboard (OSC 52) or turn
the order of letters around, so every string passes through `printable` on its way out, in pipes too.

Answers and tables go to standard output, everything about them to standard error. Colour and progress bars appear on a
terminal only.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from cloister.errors import CloisterError, VerificationFailed

__all__ = [
    "AsJson",
    "download_bar",
    "is_terminal",
    "json_value",
    "line",
    "note",
    "one_line",
    "printable",
    "show_error",
    "styled",
    "write",
]

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
"""The option of every command that tells something."""

# C0 without tab and newline, DEL and C1; soft hyphen; Arabic letter mark; Mongolian vowel separator; zero width space,
# left-to-right and right-to-left marks; line and paragraph separator, bidi embeddings and overrides; word joiner,
# invisible operators, bidi isolates and deprecated controls; byte order mark; interlinear annotations; musical and
# shorthand controls; tags; lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff\ud800-\udfff]"
)
# Joiners are letters' business in Persian, Indic scripts and emoji. Beside ASCII, or repeated, they only hide something.
_JOINERS = re.compile(
    "(?<=[\x00-\x7f])[\u200c\u200d]+|[\u200c\u200d]+(?=[\x00-\x7f])|(?<=[\u200c\u200d])[\u200c\u200d]+"
)


def printable(text: str) -> str:
    """`text` without anything that a terminal would obey or hide; newlines and tabs stay."""
    return _JOINERS.sub("", _UNSAFE.sub("", text))


def one_line(text: str, most: int = 200) -> str:
    """`text` as a field of a line: no newline, no tab, at most `most` characters."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty()


def _console(stream: TextIO) -> Console:
    return Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True)


def styled(*parts: tuple[str, str]) -> Text:
    """Pieces of a line with their styles (`("VERIFIED", "bold green")`), made printable."""
    return Text.assemble(*((printable(text), style) for text, style in parts))


def line(text: str | Text = "", style: str = "", *, hang: int | None = None) -> None:
    """One line of the command's result, to standard output. `hang`: on a terminal it breaks between words, and goes on
    below that column; without it, it stays in one piece for who copies it."""
    _print(sys.stdout, text, style, hang)


def note(text: str | Text = "", style: str = "", *, hang: int | None = None) -> None:
    """One line about what is going on, to standard error. `hang` as in `line`."""
    _print(sys.stderr, text, style, hang)


def _print(stream: TextIO, text: str | Text, style: str, hang: int | None) -> None:
    console = _console(stream)
    shown = Text(printable(text), style=style) if isinstance(text, str) else text
    if hang is not None and is_terminal(stream):
        shown = Text("\n" + " " * hang).join(shown.wrap(console, max(console.width - hang, 20)))
    console.print(shown)
    stream.flush()


def write(text: str) -> None:
    """A piece of an answer, at once, to standard output."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def json_value(value: Any) -> None:
    """`value` as JSON in ASCII: what a terminal would obey is escaped, and nothing is lost."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=True) + "\n")
    sys.stdout.flush()


def show_error(error: CloisterError, *, factors: bool = True) -> None:
    """What went wrong, what was expected and found, and what to do next; to standard error."""
    note(styled(("error: ", "bold red"), (one_line(error.message, 1000), "")), hang=7)
    for name, value in (("expected:", error.expected), ("got:", error.got)):
        if value is not None:
            note(f"  {name:<9} {one_line(value) or 'nothing'}")
    if factors and isinstance(error, VerificationFailed):
        _show_failed(error.factors)
    if error.hint:
        note(styled(("hint: ", "bold"), (one_line(error.hint, 1000), "")), hang=6)


def _show_failed(factors: Sequence[Any]) -> None:
    for factor in factors:
        if factor.verdict == "fail":
            note(f"  failed: {one_line(factor.step)}")
            note(f"    expected: {one_line(factor.expected)}")
            note(f"    got:      {one_line(factor.got)}")


@contextmanager
def download_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function of (name, bytes so far, bytes in all) that draws a bar on a terminal, and does nothing in a pipe."""
    if not is_terminal(sys.stderr):
        yield lambda name, done, total: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=_console(sys.stderr)) as bar:
        task = bar.add_task("", total=None, visible=False)  # nothing to see unless something is fetched
        yield lambda name, done, total: bar.update(
            task, description=one_line(name), completed=done, total=total, visible=True
        )
