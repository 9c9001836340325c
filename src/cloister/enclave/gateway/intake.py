"""Reads one sealed request, under caps of size and of time, and opens it."""

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

from cloister.channel.limits import Limits
from cloister.enclave.gateway import problems
from cloister.enclave.gateway.problems import Problem, Receive
from cloister.errors import ChannelBroken, KeyUnknown, Malformed

__all__ = ["Intake", "Opener"]

Opened_co = TypeVar("Opened_co", covariant=True)
Opened = TypeVar("Opened")


class Opener(Protocol[Opened_co]):
    """One request being opened: `ohttp.RequestOpener` or `ehbp.RequestOpener`. `now` in Unix seconds."""

    def feed(self, data: bytes, now: float) -> None: ...
    def finish(self, now: float) -> Opened_co: ...


class Intake:
    """Of all requests, however they are sealed: they share what may wait here unopened."""

    def __init__(self, limits: Limits, now: Callable[[], float]) -> None:
        self._limits = limits
        self._now = now
        self._unopened = 0  # bytes, over all requests that have not opened to their end
        # The opener counts plaintext. Framing in whole chunks adds a thousandth; who sends far smaller ones may stop.
        self._wire_bytes = limits.request_bytes + (limits.request_bytes >> 6) + (1 << 16)

    async def open(
        self, receive: Receive, opener: Opener[Opened], *, key_unknown: Problem = problems.KEY_UNKNOWN
    ) -> Opened | Problem | None:
        """The opened request, or what to say instead, or None when the other side went away. `key_unknown` is said of a
        key that is not in use.

        Once it is known that a request cannot be opened, its rest is read and dropped (within the same caps): closing
        at once would reset the connection and take the answer with it.
        """
        refusal: Problem | None = None
        length = held = 0
        try:
            async with asyncio.timeout(self._limits.open_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    data: bytes = message.get("body", b"")
                    more = message.get("more_body", False)
                    length += len(data)
                    if length > self._wire_bytes:
                        return problems.TOO_LARGE
                    if refusal is not None:
                        continue
                    held += len(data)
                    self._unopened += len(data)
                    if self._unopened > self._limits.unauthenticated_bytes:
                        return problems.BUSY
                    refusal = self._feed(opener, data, key_unknown)
            return refusal or self._finish(opener, key_unknown)
        except TimeoutError:
            return problems.LATE
        finally:
            self._unopened -= held

    def _feed(self, opener: Opener[Opened], data: bytes, key_unknown: Problem) -> Problem | None:
        try:
            opener.feed(data, self._now())
        except (ChannelBroken, Malformed) as error:
            return _refusal(error, key_unknown)
        return None

    def _finish(self, opener: Opener[Opened], key_unknown: Problem) -> Opened | Problem:
        try:
            return opener.finish(self._now())
        except (ChannelBroken, Malformed) as error:
            return _refusal(error, key_unknown)


def _refusal(error: ChannelBroken | Malformed, key_unknown: Problem) -> Problem:
    if error.step == "size":
        return problems.TOO_LARGE
    return key_unknown if isinstance(error, KeyUnknown) else problems.CHANNEL
