"""`.cloisterignore`: what of a folder is not the app, one rule a line.

    # a comment                  *.log        any file or folder of that name, wherever it is
    /notes.txt                   only at the top; a rule with a / inside is read from the top too
    data/                        a folder, and all that is in it
    !keep.log                    kept after all; the last rule that fits decides

`*`, `?` and `[…]` as in a shell; `*` stops at a slash, `**` does not. What is in a folder that is left out stays out.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cloister.errors import MalformedApp

__all__ = ["ALWAYS", "FILE", "Ignored", "app_files"]

FILE = ".cloisterignore"

ALWAYS = (
    *(".git/", ".hg/", ".venv/", "venv/", "__pycache__/", "*.pyc", "node_modules/", ".mypy_cache/", ".pytest_cache/"),
    *(
        ".env",
        ".env.*",
        "secrets.toml",
        "*.pem",
        "*.key",
        "*.cloister",
        ".*.part",
        "/cloister.toml",
        "/.cloisterignore",
    ),
)
"""Before the file's own rules: never code, or never to leave this machine. `!` takes one back."""

_MOST_FILES = 100_000


@dataclass(frozen=True, slots=True)
class _Rule:
    pattern: re.Pattern[str]
    folders_only: bool
    keeps: bool


class Ignored:
    """What `ALWAYS` and the lines of a file leave out. Raises: MalformedApp for a line that is no rule."""

    def __init__(self, lines: Iterable[str]) -> None:
        numbered = [*((0, line) for line in ALWAYS), *enumerate(lines, 1)]
        self._rules = [rule for number, line in numbered if (rule := _rule(line, number))]

    def __contains__(self, place: tuple[str, bool]) -> bool:
        """`place`: a path from the top with slashes, and whether it is a folder."""
        path, is_folder = place
        left_out = False
        for rule in self._rules:
            if (is_folder or not rule.folders_only) and rule.pattern.fullmatch(path):
                left_out = not rule.keeps
        return left_out


def _rule(line: str, number: int) -> _Rule | None:
    text = line.rstrip()
    if not text or text.startswith("#"):
        return None
    keeps, text = text.startswith("!"), text.removeprefix("!")
    folders_only, text = text.endswith("/"), text.rstrip("/")
    if not text:
        return None
    anywhere = "/" not in text
    pattern = _translate(text.removeprefix("/"))
    try:
        compiled = re.compile(f"(?:.*/)?{pattern}" if anywhere else pattern)
    except re.error as error:
        raise MalformedApp(
            f"{FILE}, line {number}: what is between [ and ] is no set of letters.",
            step=FILE,
            got=line[:80],
            hint="Letters and ranges that go upwards, as in [a-z] or [!0-9]; a [ itself is [[].",
        ) from error
    return _Rule(compiled, folders_only, keeps)


def _translate(text: str) -> str:
    found, at = "", 0
    while at < len(text):
        letter = text[at]
        close = text.find("]", at + 2) if letter == "[" else -1
        if text.startswith("**", at):
            found, at = found + ".*", at + 1
        elif letter == "*":
            found += "[^/]*"
        elif letter == "?":
            found += "[^/]"
        elif close > 0:
            inside = text[at + 1 : close].replace("\\", r"\\")
            found, at = found + f"[{'^' + inside[1:] if inside.startswith('!') else inside}]", close
        else:
            found += re.escape(letter)
        at += 1
    return found


def app_files(folder: Path) -> list[tuple[str, Path]]:
    """Every file that is the app's: (path with slashes, file), sorted.

    Raises: MalformedApp for a link, what is no file, a folder without any, or a rule that is none.
    """
    try:
        lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    except (OSError, ValueError) as error:
        raise MalformedApp(f"{FILE} cannot be read.", step=FILE) from error
    found = sorted(_walk(folder, "", Ignored(lines)))
    if not found:
        raise MalformedApp(f"There is no file of the app in {folder}.", step="code", hint=f"See {FILE}.")
    if len(found) > _MOST_FILES:
        raise MalformedApp("The app has over 100,000 files.", step="code", hint=f"Leave some out in {FILE}.")
    return found


def _walk(folder: Path, prefix: str, ignored: Ignored) -> Iterator[tuple[str, Path]]:
    for path in folder.iterdir():
        name = prefix + path.name
        is_folder = path.is_dir() and not path.is_symlink()
        if (name, is_folder) in ignored:
            continue
        if is_folder:
            yield from _walk(path, f"{name}/", ignored)
        elif path.is_symlink() or not path.is_file():
            hint = f"Put the file itself there, or leave it out in {FILE}."
            raise MalformedApp(f"{name} is no file, but a link or something else.", step="code", hint=hint)
        else:
            yield name, path
