"""GBNF grammars: read under limits, and followed character by character without an explosion to fear.

llama.cpp has a sampler for such grammars. It is not used: a few lines of a client's can make it compute for ever or take
all memory, in the thread that decodes for everybody, where nothing can stop it. Here every step is counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cloister.enclave.llm.gbnf import TOP, Chars, Choice, Node, Repeat, Rule, Series, read_grammar
from cloister.errors import WrongUse

__all__ = ["Grammar", "State"]

_MOST_WAYS = 256
"""Ways in which one text may be understood at the same time."""
_MOST_STEPS = 4096
"""Steps that one character may take, all ways together."""
_MOST_STEPS_OF_PIECE = 8192
"""Steps that one piece of text may take,"""
_STEPS_OF_BYTE = 32
"""and so many more for each of its bytes."""
_DEEPEST = 256
"""What may be open at the same time, on one way."""

Way: TypeAlias = "tuple[Node, int, Way, int] | None"
"""What is still to come: a node, how much of it is done, what comes after it, and how many that are. None: nothing."""


@dataclass(frozen=True, slots=True)
class State:
    """What a text may go on with: each way begins with a `Chars`, or is None where the text may end here.

    `pending`: bytes of a character that is not whole yet.
    """

    ways: tuple[Way, ...]
    pending: bytes = b""

    @property
    def may_end(self) -> bool:
        return not self.pending and None in self.ways

    @property
    def must_end(self) -> bool:
        return not self.pending and self.ways == (None,)

    def first_bytes(self) -> frozenset[int]:
        """What the next byte may be, and perhaps some more."""
        if self.pending:
            return frozenset(range(0x80, 0xC0))
        return frozenset().union(*(chars.leads for chars in set(_heads(self.ways))))


class Grammar:
    """A grammar in GBNF, to be followed. `start` is the state before any text; `steps` counts what following it took.

    Raises: WrongUse, in words that repeat nothing of the text, as `read_grammar` does, and when already the beginning can
    be understood in more ways than the limits allow.
    """

    def __init__(self, text: str) -> None:
        self.steps = 0
        start = self._down([(read_grammar(text), 0, None, 1)])
        if start is None:
            raise WrongUse("The grammar can be understood in too many ways.")
        self.start = State(start)

    def after(self, state: State, piece: bytes) -> State | None:
        """The state after `piece`, UTF-8 that may end inside a character; None where it does not fit.

        Nor does it fit where it could be understood in more ways than the limits allow.
        """
        data, ways, at = state.pending + piece, state.ways, 0
        limit = self.steps + _MOST_STEPS_OF_PIECE + _STEPS_OF_BYTE * len(data)
        while at < len(data):
            length = _length(data[at])
            part = data[at : at + length]
            self.steps += 1 + len(ways) // 8
            if length == 0:
                return None
            if len(part) < length:
                return State(ways, part) if _completes(ways, part, length) else None
            try:
                code = ord(part.decode())
            except UnicodeDecodeError:
                return None
            rests = [way[2] for way in ways if way is not None and isinstance(way[0], Chars) and way[0].has(code)]
            found = self._down(rests) if rests and self.steps < limit else None
            if found is None:
                return None
            ways = found
            at += length
        return State(ways)

    def _down(self, todo: list[Way]) -> tuple[Way, ...] | None:
        """Every way on, down to its next character. None: there are too many."""
        seen: set[Way] = set()
        found: list[Way] = []
        steps = 0
        while todo and steps <= _MOST_STEPS and len(found) <= _MOST_WAYS:
            way = todo.pop()
            steps += 1 + (0 if way is None else way[3] // 16)
            if way in seen:
                continue
            seen.add(way)
            if way is None or isinstance(way[0], Chars):
                found.append(way)
            elif way[3] < _DEEPEST:
                inner = _into(*way)
                steps += len(inner) // 16
                todo += inner
        self.steps += steps
        return tuple(found) if found and steps <= _MOST_STEPS and len(found) <= _MOST_WAYS else None


def _into(node: Node, done: int, rest: Way, depth: int) -> list[Way]:
    """The ways that begin inside a node."""
    match node:
        case Rule(body=body) if body is not None:
            return [(body, 0, rest, depth)]
        case Choice(options=options):
            return [(option, 0, rest, depth) for option in options]
        case Series(items=items):
            if done == len(items):
                return [rest]
            if done == len(items) - 1:
                return [(items[done], 0, rest, depth)]
            return [(items[done], 0, (node, done + 1, rest, depth), depth + 1)]
        case Repeat(item=item, least=least, most=most):
            ways: list[Way] = [rest] if done >= least else []
            if most is None:
                ways.append((item, 0, (node, min(done + 1, least), rest, depth), depth + 1))
            elif done + 1 == most:
                ways.append((item, 0, rest, depth))
            elif done < most:
                ways.append((item, 0, (node, done + 1, rest, depth), depth + 1))
            return ways
    return []


def _heads(ways: Sequence[Way]) -> Iterator[Chars]:
    for way in ways:
        if way is not None and isinstance(way[0], Chars):
            yield way[0]


# UTF-8.


def _length(lead: int) -> int:
    """How many bytes a character takes that begins with this one; 0: none does."""
    if lead < 0x80:
        return 1
    if 0xC2 <= lead < 0xE0:
        return 2
    if 0xE0 <= lead < 0xF0:
        return 3
    return 4 if 0xF0 <= lead < 0xF5 else 0


def _completes(ways: Sequence[Way], part: bytes, length: int) -> bool:
    """Whether `part` can become a character of `length` bytes that is allowed."""
    code = part[0] & (0xFF >> (length + 1))
    for byte in part[1:]:
        if byte & 0xC0 != 0x80:
            return False
        code = code << 6 | byte & 0x3F
    missing = 6 * (length - len(part))
    low = max(code << missing, (0, 0, 0x80, 0x800, 0x10000)[length])
    high = min((code + 1 << missing) - 1, TOP - 1)
    if low >= 0xD800 and high <= 0xDFFF:
        return False
    return low <= high and any(chars.meets(low, high) for chars in _heads(ways))
