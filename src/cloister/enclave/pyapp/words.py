"""What an app writes to its standard output and error, as lines that may leave the enclave: short ones, and not too many.

Only for an app whose owner publishes its words (`logs` in the launch config, which every client sees). What is in them is the
app's own affair.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

__all__ = ["BURST", "LONGEST", "PER_SECOND", "Tell", "Words"]

Tell: TypeAlias = Callable[[str], None]
"""Called with each line that leaves."""

LONGEST = 500
"""Bytes of one line; the rest of it is left out."""

PER_SECOND = 20.0
BURST = 100
"""Lines that may leave at once, and how many a second come to that again."""


class Words:
    """Without I/O: bytes in as they come, lines out. What is over the rate is counted, and the number said with the next line
    that may leave."""

    def __init__(self, now: float) -> None:
        """`now`, here and later: seconds of a clock that does not go back."""
        self._line = bytearray()
        self._allowed = float(BURST)
        self._at = now
        self._left_out = 0

    def feed(self, data: bytes, now: float) -> Iterator[str]:
        """The lines that these bytes end."""
        *ended, rest = data.split(b"\n")
        for piece in ended:
            self._add(piece)
            yield from self._end(now)
        self._add(rest)

    def end(self, now: float) -> Iterator[str]:
        """What stands without its end, when nothing more comes."""
        if self._line:
            yield from self._end(now)
        if self._left_out:
            yield self._count()

    def _add(self, piece: bytes) -> None:
        self._line += piece[: max(0, LONGEST - len(self._line))]

    def _end(self, now: float) -> Iterator[str]:
        text = self._line.decode(errors="replace").rstrip()
        self._line.clear()
        self._allowed = min(float(BURST), self._allowed + (now - self._at) * PER_SECOND)
        self._at = now
        if not text:
            return
        if self._allowed < 1:
            self._left_out += 1
            return
        self._allowed -= 1
        if self._left_out:
            yield self._count()
        yield text

    def _count(self) -> str:
        left_out, self._left_out = self._left_out, 0
        return f"({left_out} lines were left out: more than {PER_SECOND:.0f} a second)"
