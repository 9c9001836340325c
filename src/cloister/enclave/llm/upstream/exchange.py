"""HTTP/1.1 to the upstream: one connection per request, closed as soon as nobody waits for the answer any more.

Sends what it is given and nothing of anybody's headers; follows no redirect, takes no cookie, and bounds all that comes.
"""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httptools

from cloister.enclave.llm.upstream.address import Address
from cloister.errors import EngineDied

__all__ = ["Limits", "Response", "ask", "opened"]

_MAX_HEAD = 64 << 10
_READ = 64 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds to connect, until an answer's first byte, between two bytes; bytes of one whole answer."""

    connect: float = 5.0
    first: float = 600.0
    between: float = 120.0
    size: int = 64 << 20


@dataclass(slots=True)
class _Parser:
    """What httptools calls, as the bytes come."""

    status: int = 0
    head: int = 0
    begun: bool = False
    whole: bool = False
    body: deque[bytes] = field(default_factory=deque)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head += len(name) + len(value)

    def on_headers_complete(self) -> None:
        self.begun = True

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        self.whole = True


class Response:
    """A status, and a body that comes in pieces. Ends only where HTTP says that it ends: raises EngineDied else."""

    def __init__(self, reader: asyncio.StreamReader, limits: Limits) -> None:
        self._reader = reader
        self._limits = limits
        self._parser = _Parser()
        self._http = httptools.HttpResponseParser(self._parser)
        self._read = 0
        self.status = 0

    async def begin(self) -> None:
        """Until the head is there."""
        while not self._parser.begun:
            await self._more(self._limits.first)
            if self._parser.head > _MAX_HEAD or (not self._parser.begun and self._read > _MAX_HEAD):
                raise nonsense()
        self.status = self._http.get_status_code()

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body, undone of its framing."""
        body = self._parser.body
        waits = self._limits.first
        while True:
            while body:
                yield body.popleft()
                waits = self._limits.between
            if self._parser.whole:
                return
            await self._more(waits)

    async def _more(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                data = await self._reader.read(_READ)
        except TimeoutError:
            raise EngineDied("The upstream does not answer.", hint="See its own log.") from None
        except OSError as error:
            raise broken() from error
        self._read += len(data)
        if not data:
            raise broken()
        if self._read > self._limits.size:
            raise nonsense()
        try:
            self._http.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise nonsense() from error


@asynccontextmanager
async def opened(
    address: Address, method: str, path: str, body: Mapping[str, Any] | None = None, *, limits: Limits
) -> AsyncIterator[Response]:
    """One request and the head of its answer. Leaving closes the connection, which is how an upstream is told to stop.

    Raises: EngineDied when nobody listens, or what comes is no HTTP.
    """
    try:
        async with asyncio.timeout(limits.connect):
            reader, writer = await asyncio.open_connection(address.host, address.port)
    except (OSError, TimeoutError) as error:
        raise EngineDied("The upstream cannot be reached.", hint="Is it running?") from error
    try:
        try:
            writer.write(_request(address, method, path, body))
            async with asyncio.timeout(limits.first):
                await writer.drain()
        except (OSError, TimeoutError) as error:
            raise broken() from error
        response = Response(reader, limits)
        await response.begin()
        yield response
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            writer.transport.abort()


async def ask(
    address: Address, method: str, path: str, body: Mapping[str, Any] | None = None, *, limits: Limits
) -> tuple[int, Any]:
    """The status, and the body's JSON; None for one that is no JSON, unless the status is 200.

    Raises: EngineDied.
    """
    async with opened(address, method, path, body, limits=limits) as response:
        data = b"".join([piece async for piece in response.pieces()])
    try:
        return response.status, json.loads(data)
    except (ValueError, RecursionError):
        if response.status == 200:
            raise nonsense() from None
        return response.status, None


def _request(address: Address, method: str, path: str, body: Mapping[str, Any] | None) -> bytes:
    content = b"" if body is None else json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    head = [f"{method} {path} HTTP/1.1", f"Host: {address.authority}", "Accept-Encoding: identity", "Connection: close"]
    if body is not None:
        head += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*head, "", ""]).encode("ascii") + content


def broken() -> EngineDied:
    return EngineDied("The upstream broke off.", hint="See its own log.")


def nonsense() -> EngineDied:
    return EngineDied("The upstream answers what no such server would.", hint="Is it OpenAI-compatible?")
