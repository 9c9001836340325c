"""Numbers between bounds as GBNF."""

import math
from dataclasses import dataclass

__all__ = ["Bounds", "decimals_between", "integers_between"]

_DIGITS = 15
"""Of a number without an upper bound: what every JSON reader keeps exactly."""
_FRACTION = '"." [0-9]{0,14} [1-9]'


@dataclass(frozen=True, slots=True)
class Bounds:
    """None: no bound. `above` and `below`: the bound itself is not allowed."""

    low: int | float | None = None
    high: int | float | None = None
    above: bool = False
    below: bool = False

    @property
    def least(self) -> int | None:
        """The smallest integer allowed."""
        if self.low is None:
            return None
        least = math.ceil(self.low)
        return least + 1 if self.above and least == self.low else least

    @property
    def most(self) -> int | None:
        if self.high is None:
            return None
        most = math.floor(self.high)
        return most - 1 if self.below and most == self.high else most

    def mirrored(self) -> "Bounds":
        """The magnitudes of the negative numbers among these."""
        low = None if self.high is None else -self.high
        high = None if self.low is None else -self.low
        return Bounds(low, high, above=self.below, below=self.above)


def integers_between(bounds: Bounds) -> list[str]:
    """Alternatives for the integers within; none when there is no integer."""
    mirrored = bounds.mirrored()
    options = [f'"-" ( {" | ".join(run)} )' for run in [_range(max(mirrored.least or 1, 1), mirrored.most)] if run]
    return [*_range(max(bounds.least or 0, 0), bounds.most), *options]


def decimals_between(bounds: Bounds) -> list[str]:
    """Alternatives for numbers within: the integers, and decimals that lie between two of its integers."""
    options = integers_between(bounds)
    for side, sign in ((bounds, ""), (bounds.mirrored(), '"-" ')):
        low = max(0 if side.low is None else math.ceil(side.low), 0)
        high = None if side.high is None else math.floor(side.high) - 1
        if wholes := _range(low, high):
            options.append(f"{sign}( {' | '.join(wholes)} ) {_FRACTION}")
    return options


def _range(low: int, high: int | None) -> list[str]:
    """Alternatives for the integers from `low` (0 or more) to `high`."""
    if high is None:
        high = 10 ** max(_DIGITS, len(str(low)) + 1) - 1
    options = []
    while low <= high:
        end = min(high, 10 ** len(str(low)) - 1)
        options.append(_same_length(str(low), str(end)))
        low = end + 1
    return options


def _same_length(low: str, high: str) -> str:
    if not low:
        return '""'
    rest = len(low) - 1
    if low[0] == high[0]:
        return f'"{low[0]}" {_same_length(low[1:], high[1:])}' if rest else f'"{low[0]}"'
    first, last = int(low[0]), int(high[0])
    options = []
    if low[1:] != "0" * rest:
        options.append(f'"{first}" {_same_length(low[1:], "9" * rest)}')
        first += 1
    ending = high[1:] != "9" * rest
    if first <= last - ending:
        any_rest = f" [0-9]{{{rest}}}" if rest else ""
        options.append(f"[{first}-{last - ending}]{any_rest}")
    if ending:
        options.append(f'"{last}" {_same_length("0" * rest, high[1:])}')
    return f"( {' | '.join(options)} )"
