"""Who holds which part of the key-value cache, and whose finished prefixes may be used again by whom.

Pure bookkeeping: it names sequences and counts cells; the loop carries out what `Place` says.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Place", "Sequences", "common_prefix", "divide"]

_ROW = 0.1
"""What one row more costs beside its attention, where reading the weights costs 1."""
_PADDING = 64
"""Cells: llama.cpp, as it is patched here, looks at whole ones of these (docs/adr/0014)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a new stream goes. First drop the sequences in `evict`; then, if `reused`, take the first `reused` cells
    of `source` (the same as `sequence` when it is taken over) and drop what `sequence` holds beyond them."""

    sequence: int
    reused: int
    source: int
    evict: tuple[int, ...]


@dataclass(slots=True)
class _Active:
    scope: bytes | None
    need: int


@dataclass(frozen=True, slots=True)
class _Kept:
    scope: bytes
    tokens: tuple[int, ...]


class Sequences:
    """`cells` shared by `count` sequences, of which `slots` may be active at once.

    An active stream has reserved the cells that it uses and will use soon, and asks for more with `grow`, so that
    decoding never fails for lack of them. What is left over may hold finished sequences of streams with a scope, the most
    recently used longest. A prefix is only ever found by the same scope: 32 bytes, compared whole.
    """

    def __init__(self, *, cells: int, count: int, slots: int) -> None:
        self._cells = cells
        self._slots = slots
        self._free = list(range(count))
        self._active: dict[int, _Active] = {}
        self._kept: OrderedDict[int, _Kept] = OrderedDict()

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def kept(self) -> int:
        return len(self._kept)

    def _reserved(self) -> int:
        return sum(stream.need for stream in self._active.values())

    def fits(self, need: int) -> bool:
        """Whether there is a place for one more stream that needs so many cells."""
        return len(self._active) < self._slots and self._reserved() + need <= self._cells

    def place(self, scope: bytes | None, prompt: Sequence[int], need: int, running: dict[int, Sequence[int]]) -> Place:
        """A place for a stream that needs `need` cells for now, and fits.

        `running`: for active sequences, the tokens already in their cells.
        """
        source, reused = self.best(scope, prompt, running)
        evict: list[int] = []
        if reused and source in self._kept and 2 * reused >= len(self._kept[source].tokens):
            sequence = source
            del self._kept[source]
        else:
            if source in self._kept:
                self._kept.move_to_end(source)
            sequence = self._take_free() if self._free else self._drop_oldest(evict)
            if sequence == source:  # the only one that is left: it is taken over after all
                evict.remove(sequence)
        self._active[sequence] = _Active(scope, need)
        self._make_room(evict)
        if source in evict:
            source, reused = -1, 0
        return Place(sequence, reused, source, tuple(evict))

    def grow(self, sequence: int, need: int) -> tuple[int, ...] | None:
        """Reserve `need` cells in all for an active sequence; returns the sequences to drop first, None without room."""
        stream = self._active[sequence]
        if self._reserved() - stream.need + need > self._cells:
            return None
        stream.need = need
        evict: list[int] = []
        self._make_room(evict)
        return tuple(evict)

    def drop_kept(self) -> None:
        """Keep nothing any longer. The caller erases all cells."""
        self._free.extend(self._kept)
        self._kept.clear()

    def held(self, sequence: int) -> int:
        """How many cells a sequence holds that is not active."""
        return len(self._kept[sequence].tokens) if sequence in self._kept else 0

    def _take_free(self) -> int:
        """The lowest: active ones had better be neighbours."""
        sequence = min(self._free)
        self._free.remove(sequence)
        return sequence

    def _make_room(self, evict: list[int]) -> None:
        while self._kept and self._reserved() + sum(len(k.tokens) for k in self._kept.values()) > self._cells:
            self._free.append(self._drop_oldest(evict))

    def _drop_oldest(self, evict: list[int]) -> int:
        sequence, _ = self._kept.popitem(last=False)
        evict.append(sequence)
        return sequence

    def best(self, scope: bytes | None, prompt: Sequence[int], running: dict[int, Sequence[int]]) -> tuple[int, int]:
        """The sequence of this scope that shares the longest prefix, and how long it is: (-1, 0) when none does.

        `running`: as in `place`.
        """
        if scope is None:
            return -1, 0
        best, longest = -1, 0
        limit = len(prompt) - 1  # at least one token must be evaluated, to have logits
        for sequence, kept in self._kept.items():
            if kept.scope == scope and (length := common_prefix(kept.tokens, prompt, limit)) > longest:
                best, longest = sequence, length
        for sequence, tokens in running.items():
            if self._active[sequence].scope == scope and (length := common_prefix(tokens, prompt, limit)) > longest:
                best, longest = sequence, length
        return best, longest

    def release(self, sequence: int, tokens: Sequence[int], *, keep: bool) -> bool:
        """The stream is over; `tokens` are in its cells. True: they are kept for its scope. False: drop them."""
        stream = self._active.pop(sequence)
        if keep and stream.scope is not None and tokens:
            self._kept[sequence] = _Kept(stream.scope, tuple(tokens))
            return True
        self._free.append(sequence)
        return False


def common_prefix(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    """How many leading tokens the two share, `limit` at most."""
    end = min(len(one), len(other), limit)
    known = 0
    while known < end:  # whole pieces at a time: the decoding thread asks this for every pair of prompts
        half = (known + end + 1) // 2
        if list(one[known:half]) == list(other[known:half]):
            known = half
        else:
            end = half - 1
    return known


def divide(running: Sequence[int], held: Mapping[int, int], *, cell: float, most: int) -> list[range]:
    """Which sequences had better be evaluated together: ranges that hold all of `running`, which ascend, and what lies
    between them.

    Where every sequence has a part of the cache, llama.cpp evaluates neighbours together, each as deep as the deepest; for
    every group it reads the weights anew. A row for what lies between, which is forgotten again, costs less than that,
    unless much is held there. Of all divisions the one that costs least. `held`: cells, of the first to the last; who
    holds `most`, which is none of `running`, has room for no row more. `cell`: a cell's bytes over those of the weights.
    """
    whole, depths = range(running[0], running[-1] + 1), [held[at] for at in running]
    if len(whole) == len(running) and len(whole) * (max(depths) - min(depths) + _PADDING) * cell <= 1:
        return [whole]  # no division saves what it costs
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first ones: what they cost, and where their last group begins
    for end in range(1, len(running) + 1):
        after, depth, at, choices = running[end - 1] + 1, 0, running[end - 1] + 1, list[tuple[float, int]]()
        for begin in range(end - 1, -1, -1):
            depth, at = max(depth, *(held[one] for one in range(running[begin], at))), running[begin]
            if depth >= most:
                break
            cells = (depth // _PADDING + 1) * _PADDING
            choices.append((best[begin][0] + 1 + (after - at) * (_ROW + cells * cell), begin))
        best.append(min(choices))
    groups, end = list[range](), len(running)
    while end:
        begin = best[end][1]
        groups.append(range(running[begin], running[end - 1] + 1))
        end = begin
    return groups[::-1]
