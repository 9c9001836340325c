"""Reads one sealed request, under caps of size and of time, and opens it."""

import asyncio
from collections.abc import Callable

from cloister.channel.keys import KeyRing
from cloister.channel.limits import Limits
from cloister.channel.ohttp import OpenedRequest, RequestOpener
from cloister.enclave.gateway import problems
from cloister.enclave.gateway.problems import Problem, Receive
from cloister.errors import ChannelBroken, KeyUnknown, Malformed

__all__ = ["Intake"]


class Intake:
    def __init__(self, ring: KeyRing, limits: Limits, now: Callable[[], float]) -> None:
        self._ring = ring
        self._limits = limits
        self._now = now
        self._unopened = 0  # bytes, over all requests that have not opened to their end
        # The opener counts plaintext. Framing in whole chunks adds a thousandth; who sends far smaller ones may stop.
        self._wire_bytes = limits.request_bytes + (limits.request_bytes >> 6) + (1 << 16)

    async def open(self, receive: Receive) -> OpenedRequest | Problem | None:
        """The opened request, or what to say instead, or None when the other side went away.

        Once it is known that a request cannot be opened, its rest is read and dropped (within the same caps): closing
        at once would reset the connection and take the answer with it.
        """
        opener = RequestOpener(self._ring, limits=self._limits)
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
                    refusal = self._feed(opener, data)
            return refusal or self._finish(opener)
        except TimeoutError:
            return problems.LATE
        finally:
            self._unopened -= held

    def _feed(self, opener: RequestOpener, data: bytes) -> Problem | None:
        try:
            opener.feed(data, self._now())
        except (ChannelBroken, Malformed) as error:
            return _refusal(error)
        return None

    def _finish(self, opener: RequestOpener) -> OpenedRequest | Problem:
        try:
            return opener.finish(self._now())
        except (ChannelBroken, Malformed) as error:
            return _refusal(error)


def _refusal(error: ChannelBroken | Malformed) -> Problem:
    if error.step == "size":
        return problems.TOO_LARGE
    return problems.KEY_UNKNOWN if isinstance(error, KeyUnknown) else problems.CHANNEL
