"""The host's clock, as far as it can be held to: it never runs backwards, nor slower than the monotonic one, nor stands
before the time that the owner's release named."""

import time
from collections.abc import Callable

__all__ = ["Clock"]


class Clock:
    """Call it for Unix seconds."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._floor = 0.0
        self._since = monotonic()
        self._latest = 0.0

    def __call__(self) -> float:
        counted = self._floor + (self._monotonic() - self._since)
        self._latest = max(self._latest, self._wall(), counted if self._floor else 0.0)
        return self._latest

    def raise_to(self, floor: float) -> None:
        """From here on at least `floor` (Unix seconds), and on from there."""
        if floor > self():
            self._floor, self._since = floor, self._monotonic()
        else:
            self._floor, self._since = self(), self._monotonic()
