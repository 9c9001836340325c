"""The client's end of a request: its body, its leaving, and what is sent to it."""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from types import TracebackType

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Send

from cloister.enclave.llm.envelope import OPENAI, Dialect, Problem, Refused

__all__ = ["ClientGone", "Reply", "WhileConnected", "read_json_body"]

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
NO_STORE = (b"cache-control", b"no-store")
UNBUFFERED = (b"x-accel-buffering", b"no")


class ClientGone(Exception):  # noqa: N818 - not an error: nobody is left to tell
    """The client left before its request was whole."""


async def read_json_body(headers: Headers, receive: Receive, limit: int) -> bytes:
    """The whole body of at most `limit` bytes. Does not parse it.

    Raises:
        Refused: 415 unless it says application/json (a web page cannot send that to a stranger unasked), 413 if longer.
        ClientGone: it ended early.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "unsupported_media_type", "The body must be sent as application/json.")
    chunks: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise Refused(413, "request_too_large", f"The body may hold {limit} bytes at most.")
        more = message.get("more_body", False)
    return b"".join(chunks)


class WhileConnected:
    """`async with`: what runs inside is cancelled as soon as the client is gone, and the block is then left quietly.

    The body must have been read: a request's bytes that still arrive are dropped.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("outside a task")
        self._task = task
        self._watcher = asyncio.create_task(self._watch())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()  # not awaited: a cancelled watcher can no longer cancel anything
        if self.gone and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise ClientGone

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._task.cancel()


class Reply:
    """One HTTP response in plain ASGI. `status` is None until its first byte is on the way.

    `request_id` is fresh and says nothing of the request.
    """

    def __init__(self, send: Send, dialect: Dialect = OPENAI) -> None:
        self._deliver = send
        self.dialect = dialect
        self.request_id = f"req_{secrets.token_hex(12)}"
        self.status: int | None = None
        self.finished = False
        self.error_event = b""
        """What stands before `data:` in an event that reports an error."""
        self.failure: Callable[[Problem], bytes] | None = None
        """How a running stream reports an error in its own events, where the dialect's envelope is none of them."""

    async def _send(self, message: Message) -> None:
        try:
            await self._deliver(message)
        except OSError:  # how a server says that nobody listens (ASGI 2.4)
            raise ClientGone from None

    async def _start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.status = status
        own = [(self.dialect.id_header, self.request_id.encode())] if self.dialect.id_header else []
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *own]})

    async def json(self, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, [JSON, NO_STORE, length, *headers])
        await self._send({"type": "http.response.body", "body": body})
        self.finished = True

    async def event(self, data: bytes) -> None:
        """Server-sent events, whole ones. The head waits for the first, so that a failure before it keeps its status."""
        if self.status is None:
            await self._start(200, [EVENTS, NO_STORE, UNBUFFERED])
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes) -> None:
        """The last events; only this makes the stream whole."""
        if self.status is None:
            await self._start(200, [EVENTS, NO_STORE, UNBUFFERED])
        await self._send({"type": "http.response.body", "body": data})
        self.finished = True

    async def problem(self, found: Problem) -> None:
        """As a response of its own, or, once a stream runs, as an event in it; the stream is not ended here."""
        if self.status is not None:
            await self.event(self._failure(found))
            return
        await self.json(self.dialect.status(found), self.dialect.body(found, self.request_id), found.headers)

    def _failure(self, found: Problem) -> bytes:
        if self.failure is not None:
            return self.failure(found)
        return self.error_event + b"data: " + self.dialect.body(found, self.request_id) + b"\n\n"
