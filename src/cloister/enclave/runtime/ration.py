"""How often something costly is done for whoever asks: making evidence takes up to a second of some hardware."""

import time
from collections.abc import Callable

__all__ = ["Ration"]

_PER_SECOND = 5.0
_AT_ONCE = 20.0


class Ration:
    """Twenty at once, and five a second after that."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._left = _AT_ONCE
        self._asked = monotonic()

    def take(self) -> bool:
        """Whether there is one left, which is then gone."""
        now = self._monotonic()
        self._left = min(_AT_ONCE, self._left + (now - self._asked) * _PER_SECOND)
        self._asked = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
