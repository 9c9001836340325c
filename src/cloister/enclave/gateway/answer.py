"""Seals what the inner app sends, and decides when it leaves.

The outer head tells nothing, so it leaves before there is an answer, with the nonce of its keys: the client is done with
both when the first token comes. A stream's first event leaves at once; what follows leaves together on a grid of 50 ms, the
same for all streams (so that the front wakes once for many), each time as one sealed chunk, padded (`events`). Any other
answer leaves in whole chunks of 16 KiB, at its end padded to a power of two. The rhythm and length of tokens tell what is
being said: this reduces it and does not remove it.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Protocol

from cloister.channel.bhttp import encode_response_head
from cloister.channel.limits import MAX_CHUNK
from cloister.enclave.gateway import inner
from cloister.enclave.gateway.events import EventBuffer
from cloister.enclave.gateway.problems import Message, Send
from cloister.enclave.gateway.receipts import PendingReceipt
from cloister.errors import EngineDied

__all__ = ["Answer", "Grid", "Sealer"]

_GRID = 0.05  # seconds
_HIGH_WATER = 1 << 18  # bytes that wait here before the inner app has to
_HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade"})
_OUTER_HEADERS = [
    (b"content-type", b"message/ohttp-chunked-res"),
    (b"incremental", b"?1"),
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
]


Head = tuple[int, list[tuple[bytes, bytes]]]


class Sealer(Protocol):
    """What seals one answer, `ohttp.ResponseSealer` or `ehbp.ResponseSealer`: bytes to send at once, possibly none."""

    def start(self, status: int, headers: inner.Fields, *, stream: bool) -> bytes: ...
    def data(self, body: bytes) -> bytes: ...
    def finish(self, trailers: inner.Fields, *, pad: bool) -> bytes: ...


class Grid:
    """The moments at which events leave, for all streams of one event loop: one timer wakes all that wait for the next."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Event, None] = {}

    def wake(self, event: asyncio.Event) -> None:
        """Sets it at the next moment."""
        if not self._waiting:
            loop = asyncio.get_running_loop()
            loop.call_at(math.ceil(loop.time() / _GRID) * _GRID, self._wake)
        self._waiting[event] = None

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for event in waiting:
            event.set()


class Answer:
    """One answer: `send` is the inner app's, `pump` the gateway's; they meet in a buffer.

    `grid`: when the events of a stream leave, and all is padded; None: everything leaves as it comes, as long as it is.
    `opening` leaves at once, behind an outer head that tells nothing; or `outer` makes one of the inner status and headers.
    `receipt` leaves with the end, of an event stream as its last comment, of any other answer in its trailers.
    """

    def __init__(
        self,
        sealer: Sealer,
        *,
        grid: Grid | None,
        opening: bytes = b"",
        outer: Callable[[int, inner.Fields], Head] | None = None,
        receipt: PendingReceipt | None = None,
    ) -> None:
        self._sealer = sealer
        self._receipt = receipt
        self._opening = opening
        self._outer = outer
        self._grid = grid
        self._events: EventBuffer | None = None  # set when the answer is an event stream
        self._body = bytearray()  # of any other answer
        self._head: Head | None = None
        self._whole = False  # leaves in whole chunks only
        self._left = False  # something of it has gone out
        self._failed = False
        self._gone = False
        self._begun = False  # the first event is on its way
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self.complete = asyncio.Event()  # by the inner app's word: all of the answer is here, or nobody wants it

    async def send(self, message: Message) -> None:
        """The inner app's `send`. Raises OSError when nobody listens any more (ASGI 2.4)."""
        if self._gone:
            raise ConnectionResetError
        if message["type"] == "http.response.start" and self._head is None:
            self._start(message["status"], list(message.get("headers", ())))
        elif message["type"] == "http.response.body" and self._head is not None and not self.complete.is_set():
            await self._add(message.get("body", b""), more=message.get("more_body", False))
        else:
            raise EngineDied("the app inside broke the ASGI protocol", got=str(message["type"]))

    def app_ended(self, _: object = None) -> None:
        """The inner app returned or raised: a failure unless its answer was complete."""
        if not self.complete.is_set():
            self._failed = True
            self._wake()

    def abandon(self) -> None:
        """Nobody listens any more."""
        self._gone = True
        self.complete.set()
        self._work.set()
        self._room.set()

    async def pump(self, send: Send) -> None:
        """Sends until the answer is complete or nobody listens.

        Raises: EngineDied when the inner app failed with its answer half sent. The server then cuts the connection,
        and since nothing is sealed as "final", no client takes what came for the whole.
        """
        if self._outer is None:
            await send({"type": "http.response.start", "status": 200, "headers": list(_OUTER_HEADERS)})
            await send({"type": "http.response.body", "body": self._opening, "more_body": True})
        while not self._gone:
            await self._work.wait()
            self._work.clear()
            if self._failed and not self._left:
                self.replace(*inner.failure())
            if self._whole and not (self._failed or self.complete.is_set()) and len(self._body) <= MAX_CHUNK:
                continue
            if self._gone:
                return
            ended = self.complete.is_set()
            sealed = self._flush(ended)
            if sealed or ended:
                await self._leave(send, sealed, more=not ended)
            if ended:
                return
            if self._failed:
                raise EngineDied("the app inside failed after its answer had begun")
            if self._work.is_set():
                self._work.clear()  # it came while the last was leaving, and has its own time
                self._wake()

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        names = {name.lower(): value for name, value in headers}
        if names.get(b"content-type", b"").lower().startswith(b"text/event-stream"):
            self._events = EventBuffer(pad=self._grid is not None)
        self._whole = self._grid is not None and self._events is None
        dropped = _HOP_BY_HOP if self._events is None else _HOP_BY_HOP | {b"content-length"}
        fields = [(name, value) for name, value in headers if name.lower() not in dropped]
        encode_response_head(status, fields)  # MalformedMessage goes to the app that gave them
        self._head = status, fields

    async def _add(self, data: bytes, *, more: bool) -> None:
        buffer = self._body if self._events is None else self._events
        if isinstance(buffer, EventBuffer):
            buffer.add(data)
        else:
            buffer += data
        if not more:
            self.complete.set()
        self._wake()
        if more and len(buffer) > _HIGH_WATER:
            self._room.clear()
            await self._room.wait()

    def _wake(self) -> None:
        """Lets the pump send what is here: at once what is no stream, or its first event; the rest when its time comes."""
        if self._grid is not None and self._events is not None and self._begun:
            self._grid.wake(self._work)
        else:
            self._begun = True
            self._work.set()

    def _flush(self, ended: bool) -> bytes:
        sealed = []
        body, trailers = self._receipted(self._take(ended), ended)
        if (body or ended) and self._head is not None and not self._left:
            sealed.append(self._sealer.start(*self._head, stream=not self._whole))
        if body:
            sealed.append(self._sealer.data(body))
        if ended:
            sealed.append(self._sealer.finish(trailers, pad=self._grid is not None))
        self._room.set()
        return b"".join(sealed)

    def _receipted(self, body: bytes, ended: bool) -> tuple[bytes, inner.Fields]:
        """The content that leaves now, and what stands behind it."""
        if self._receipt is None:
            return body, ()
        self._receipt.add(body)
        if not ended:
            return body, ()
        if self._events is not None:
            return body + self._receipt.comment(pad=self._grid is not None), ()
        return body, self._receipt.trailers()

    def _take(self, ended: bool) -> bytes:
        if self._events is not None:
            return self._events.take(everything=ended)
        body = bytes(self._body)
        self._body.clear()
        return body

    async def _leave(self, send: Send, sealed: bytes, *, more: bool) -> None:
        if not self._left and self._head is not None:
            self._left = True
            if self._outer is not None:
                status, headers = self._outer(*self._head)
                await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": sealed, "more_body": more})

    def replace(self, status: int, headers: inner.Fields, body: bytes) -> None:
        """Answers with this, whole; only before anything has left."""
        self._events = None
        self._head = status, list(headers)
        self._body[:] = body
        self._whole = self._grid is not None
        self.complete.set()
        self._work.set()
