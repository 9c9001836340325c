"""How long an HTTP server of ours waits for what a peer owes it, and how large a request's head may grow meanwhile."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["PATIENCE", "Deadline", "Patience", "Wait"]


@dataclass(frozen=True, slots=True)
class Patience:
    """With one connection.

    head_bytes: of one request's URL and fields, trailers included; each field counts 32 more than it has, for what keeping
        it costs (as RFC 9113, section 6.5.2 counts).
    head_seconds: for which a head may take, from its first byte or, where it is the first, from the connection on; and the
        rest of a request that has its whole answer.
    body_seconds: in which at least `body_bytes` more of a body must come before its answer begins, unless it is we who do
        not read. Longer than what the apps give (30 s): theirs is the better answer.
    """

    head_bytes: int = 64 << 10
    head_seconds: float = 30.0
    body_seconds: float = 60.0
    body_bytes: int = 1 << 10


PATIENCE = Patience()


@dataclass(frozen=True, slots=True)
class Wait:
    """For a part of the request `of`, which is anything that differs from one request to the next."""

    part: Literal["next", "head", "body", "rest"]
    of: object
    seconds: float


class Deadline:
    """Runs `late` when what `wanted` tells stayed the same for its time, without `progress`. A time in which the peer was
    `excused` at its beginning counts for nothing. Whoever changes what is wanted calls `look`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        wanted: Callable[[], Wait | None],
        excused: Callable[[], bool],
        late: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._wanted = wanted
        self._is_excused = excused
        self._late = late
        self._wait: Wait | None = None
        self._excused = False
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def look(self) -> None:
        wait = self._wanted()
        if wait == self._wait:
            return
        self.stop()
        if wait is not None:
            self._wait = wait
            self.progress()
            self._timer = self._loop.call_later(wait.seconds, self._ring)

    def progress(self) -> None:
        """From now on the peer has the whole time once more."""
        self._since = self._loop.time()
        self._excused = self._is_excused()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._wait = None

    def _ring(self) -> None:
        wait = self._wait
        self.look()
        if wait is None or self._wait is not wait:
            return
        if self._excused:
            self.progress()
        left = self._since + wait.seconds - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._ring)
        else:
            self.stop()
            self._late()
