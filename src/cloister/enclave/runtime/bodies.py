"""Messages that anybody may send, read without one of them filling the enclave's memory or keeping others out."""

import asyncio

from starlette.types import Receive

from cloister.enclave.gateway import problems
from cloister.enclave.gateway.problems import Problem

__all__ = ["Bodies"]

_SECONDS = 30.0
_LARGEST_AT_ONCE = 16


class Bodies:
    """Of at most `most` bytes each, and all together as many as sixteen of the largest. What counts is what has come: who
    connects and sends nothing takes nobody's place."""

    def __init__(self, most: int, too_large: Problem) -> None:
        self._most = most
        self._too_large = too_large
        self._held = 0

    async def read(self, receive: Receive) -> bytes | Problem:
        """A message that came whole within half a minute; what to answer where it did not."""
        content = bytearray()
        more = True
        try:
            async with asyncio.timeout(_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return problems.LATE
                    part = message.get("body", b"")
                    if self._held + len(part) > _LARGEST_AT_ONCE * self._most:
                        return problems.BUSY
                    content += part
                    self._held += len(part)
                    more = message.get("more_body", False)
                    if len(content) > self._most:
                        return self._too_large
        except TimeoutError:
            return problems.LATE
        finally:
            self._held -= len(content)
        return bytes(content)
