"""What a user writes never becomes a control token.

Where the text of one stands inside a message, a placeholder that cannot be guessed goes through the template in its
place, and comes out as a segment of plain text. The rest of a message goes through as it is, so that templates which
look at it (trim, split, `in`) see it.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["ControlTexts", "Placeholders", "Segment"]

Segment = tuple[str, bool]
"""Text, and whether control tokens in it are the template's own, and so meant."""


class ControlTexts:
    """Finds control tokens' texts; at a message's ends also part of one, which its neighbour might complete.

    In time that grows with the message alone, however many texts there are: nothing else runs meanwhile.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        wanted = {text for text in texts if text}
        self._whole = re.compile(_any_of(wanted)) if wanted else None
        self._heads = {text[:n] for text in wanted for n in range(2, len(text))}
        self._tails = {text[-n:] for text in wanted for n in range(2, len(text))}
        self._longest = max(map(len, wanted), default=0) - 1

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where they stand, in order."""
        if self._whole is None:
            return
        at = 0
        if not self._whole.match(text) and (at := self._part(text[: self._longest], self._tails, end=False)):
            yield 0, at
        for match in self._whole.finditer(text, at):
            at = match.end()
            yield match.span()
        end = len(text.rstrip())
        if length := self._part(text[max(at, end - self._longest) : end], self._heads, end=True):
            yield end - length, end

    def _part(self, text: str, parts: set[str], *, end: bool) -> int:
        """The length of the longest of `parts` at one end of `text`."""
        lengths = range(len(text), 1, -1)
        return next((n for n in lengths if (text[-n:] if end else text[:n]) in parts), 0)


def _any_of(texts: set[str]) -> str:
    """A pattern for the longest of `texts` that looks at each character once: what they share stands there once."""
    shared = os.path.commonprefix(list(texts))  # noqa: RUF071 - these are no paths
    rests: dict[str, set[str]] = {}
    for text in texts:
        if rest := text[len(shared) :]:
            rests.setdefault(rest[0], set()).add(rest)
    if not rests:
        return re.escape(shared)
    branches = "|".join(_any_of(group) for group in rests.values())
    return f"{re.escape(shared)}(?:{branches}){'?' if shared in texts else ''}"


class Placeholders:
    """Stand-ins for control-token texts in one conversation."""

    def __init__(self, control: ControlTexts) -> None:
        self._control = control
        self._nonce = str(int.from_bytes(os.urandom(12), "big"))
        self._hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        """A copy of `value` (what JSON can hold) with stand-ins in all its strings."""
        if isinstance(value, str):
            return "".join(self._pieces(value))
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(inner) for inner in value]
        return value

    def _pieces(self, text: str) -> Iterator[str]:
        shown = 0
        for start, end in self._control.spans(text):
            yield text[shown:start]
            self._hidden.append(text[start:end])
            yield f"\ufdd0{self._nonce}:{len(self._hidden) - 1}\ufdd1"  # noncharacters, with a number nobody knows
            shown = end
        yield text[shown:]

    def reveal(self, text: str) -> list[Segment]:
        """The rendered text in order: the template's, with True, and the hidden pieces as plain text, with False."""
        if not self._hidden:
            return [(text, True)]
        segments: list[Segment] = []
        pieces = re.split(f"\ufdd0{self._nonce}:([0-9]{{1,9}})\ufdd1", text)
        for at, piece in enumerate(pieces):
            if at % 2:
                index = int(piece)
                segments.append((self._hidden[index] if index < len(self._hidden) else "", False))
            elif piece:
                segments.append((piece, True))
        return segments
