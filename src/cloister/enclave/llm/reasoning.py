"""What a model says to itself before it answers: `<think>…</think>` at the beginning of its text."""

import re
from typing import Literal, TypeAlias, get_args

__all__ = ["MOST_BLANKS", "THINKINGS", "ThinkSplitter", "Thinking", "overlap", "thinking_of"]

Thinking: TypeAlias = Literal["", "tagged", "opened"]
"""tagged: the model may begin with `<think>`. opened: its template has written that tag already, so that an answer
begins in the midst of it. "": its template knows no such tag, and one in an answer is text like any other."""
THINKINGS: tuple[Thinking, ...] = get_args(Thinking)

MOST_BLANKS = 1024
"""Blanks that are held back where they may be dropped; what comes next costs as much as there are."""
_OPEN, _CLOSE = "<think>", "</think>"
_BLANKS = " \t\r\n"
_PROMPTED = re.compile(r"<think>(?!(?:\\n|\s)*</think>)")


def thinking_of(template: str | None) -> Thinking:
    """Whether a model with this chat template thinks aloud. Looks at the template's source only, and runs nothing."""
    if template is None or (_CLOSE not in template and _OPEN not in template):
        return ""
    prompted = template.rpartition("add_generation_prompt")[2] if "add_generation_prompt" in template else ""
    return "opened" if _PROMPTED.search(prompted) else "tagged"


class ThinkSplitter:
    """Cuts an answer into what is thought and what is said, as it comes. Blanks at both ends of the thought are dropped.

    Of more than `MOST_BLANKS` at its end only as many are, and an answer that begins with more says all of itself. One
    that ends inside the tag was all thought.
    """

    def __init__(self, thinking: Thinking) -> None:
        self._state = {"": "said", "tagged": "start", "opened": "open"}[thinking]
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """What is thought, and what is said after it."""
        if self._state == "said":
            return "", text
        self._held += text
        thought = ""
        if self._state == "start":
            self._start()
        if self._state == "open":
            self._held = self._held.lstrip(_BLANKS)
            self._state = "inside" if self._held else "open"
        if self._state == "inside":
            thought = self._inside()
        if self._state == "after":
            self._held = self._held.lstrip(_BLANKS)
            if self._held:
                self._state = "said"
        if self._state == "said":
            said, self._held = self._held, ""
            return thought, said
        return thought, ""

    def _start(self) -> None:
        bare = self._held.lstrip(_BLANKS)
        if len(self._held) - len(bare) > MOST_BLANKS:
            self._state = "said"
        elif bare.startswith(_OPEN):
            self._held, self._state = bare[len(_OPEN) :], "open"
        elif not _OPEN.startswith(bare):
            self._state = "said"

    def _inside(self) -> str:
        thought, found, rest = self._held.partition(_CLOSE)
        if found:
            self._held, self._state = rest, "after"
            return thought[: _bare(thought)]
        end = _bare(thought[: len(thought) - overlap(thought, _CLOSE)])
        self._held = thought[end:]
        return thought[:end]

    def finish(self) -> tuple[str, str]:
        """What was held back because it might have been a tag, or a blank at an end."""
        held, self._held = self._held, ""
        if self._state == "start":
            return "", held
        return (held.rstrip(_BLANKS), "") if self._state in ("open", "inside") else ("", "")


def _bare(text: str) -> int:
    """Length without the blanks at its end, of which the last `MOST_BLANKS` are looked at."""
    tail = text[-MOST_BLANKS:]
    return len(text) - len(tail) + len(tail.rstrip(_BLANKS))


def overlap(text: str, marker: str) -> int:
    """Length of the longest proper beginning of `marker` that `text` ends with."""
    lengths = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(marker[:length])), 0)
