"""A stranger at one of our HTTP servers, over a real loopback socket."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

import uvicorn

from cloister.patience import Patience

SHORT = Patience(head_seconds=0.2, body_seconds=0.2)
"""For what must be closed by time."""
LONG = Patience(head_seconds=60, body_seconds=60)
"""For what must be closed by size."""

SOON = 4.0
"""Less than uvicorn's five seconds between requests."""

GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"
CHUNKED = GET + b"Transfer-Encoding: chunked\r\n\r\n"

ENDLESS = {
    "URL": (b"GET /", b"a"),
    "field's name": (GET, b"a"),
    "field's value": (GET + b"a: ", b"a"),
    "fields": (GET, b"a: b\r\n"),
    "trailer's name": (CHUNKED + b"0\r\n", b"a"),
    "trailer's value": (CHUNKED + b"0\r\na: ", b"a"),
    "trailers": (CHUNKED + b"0\r\n", b"a: b\r\n"),
    "chunk's extension": (CHUNKED + b"1;", b"a"),
}
"""What opens it, and what is then repeated."""

HELD = {
    "nothing": (b"", b""),
    "one byte": (b"G", b""),
    "a slow head": (GET, b"a"),
    "a slow trailer": (CHUNKED + b"0\r\n", b"a"),
    "a slow body": (CHUNKED, b"1\r\na\r\n"),
    "a body that stands still": (CHUNKED + b"1\r\n", b""),
    "a rest that comes late": (CHUNKED + b"1\r\na", b""),
}
"""With nothing but the second now and then."""


@dataclass
class Told:
    """What the server said until it closed, and how many bytes it was sent."""

    answer: bytes
    sent: int


@contextlib.asynccontextmanager
async def serving(server: uvicorn.Server) -> AsyncIterator[int]:
    """The port."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        running = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            await running


async def told(port: int, pieces: Iterable[bytes], *, pause: float = 0.0) -> Told:
    """`pause` seconds between the pieces. Raises: TimeoutError when the connection is not closed soon."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    one = Told(b"", 0)
    sending = asyncio.create_task(_send(writer, one, pieces, pause))
    try:
        async with asyncio.timeout(SOON):
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(1 << 16):
                    one.answer += data
    finally:
        sending.cancel()
        await asyncio.wait([sending])
        writer.close()
    return one


async def _send(writer: asyncio.StreamWriter, one: Told, pieces: Iterable[bytes], pause: float) -> None:
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            one.sent += len(piece)
            await asyncio.sleep(pause)


async def overfill(port: int, name: str) -> Told:
    """At most 16 MiB, with no end."""
    start, more = ENDLESS[name]
    block = more * ((16 << 10) // len(more))
    return await told(port, itertools.chain([start], itertools.repeat(block, 1024)), pause=0.001)


async def hold(port: int, name: str) -> Told:
    start, more = HELD[name]
    return await told(port, itertools.chain([start], itertools.repeat(more)), pause=0.02)
