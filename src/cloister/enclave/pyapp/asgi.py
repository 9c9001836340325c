"""Runs an ASGI app: its lifespan once, and each request over a socket of its own."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from cloister.enclave.pyapp import wire

__all__ = ["App", "Lifespan", "answer"]

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]


class Lifespan:
    """`state` is what the app left for its requests. An app that knows no lifespan just has none."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._events: asyncio.Queue[Message] = asyncio.Queue()
        self._told: asyncio.Queue[Message] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        self.state: dict[str, Any] = {}

    async def start(self) -> None:
        """Raises: what the app raised when it says that it cannot start; RuntimeError when it raised nothing."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        self._task = asyncio.create_task(self._run(scope))
        await self._events.put({"type": "lifespan.startup"})
        if (await self._told.get())["type"] == "lifespan.startup.failed":
            await asyncio.wait([self._task], timeout=1.0)
            raise self._error or RuntimeError("the app's startup failed")

    async def stop(self) -> None:
        if self._task is not None and not self._task.done():
            await self._events.put({"type": "lifespan.shutdown"})
            await self._told.get()
            self._task.cancel()

    async def _run(self, scope: dict[str, Any]) -> None:
        try:
            await self._app(scope, self._events.get, self._told.put)
        except Exception as error:  # noqa: BLE001 (by the specification: such an app has no lifespan)
            self._error = error
        finally:
            await self._told.put({"type": "lifespan.ended"})


async def answer(app: App, sock: socket.socket, state: dict[str, Any]) -> None:
    """One request. Whatever the app raises ends here, and the answer breaks off: its words may hold what was asked."""
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        first = await wire.read(reader)
        if first is not None and first[0] == wire.REQUEST:
            scope = wire.decode_scope(first[1])
            scope["state"] = dict(state)
            exchange = _Exchange(reader, writer)
            await app(scope, exchange.receive, exchange.send)
    except Exception:  # noqa: BLE001, S110 (the process's edge)
        pass
    finally:
        await _leave(reader, writer)


async def _leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says that nothing more comes, and goes when the other side has: to close before all was read would reset the
    socket, and take the answer's end with it."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: something that the app left behind reads still
        writer.write_eof()
        while await reader.read(1 << 16):
            pass
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


class _Exchange:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._asked = False  # the request has come to its end
        self._done = False  # the answer too

    async def receive(self) -> Message:
        found = await wire.read(self._reader)
        if self._asked or found is None:
            return {"type": "http.disconnect"}
        self._asked = found[0] != wire.BODY
        return {"type": "http.request", "body": found[1], "more_body": not self._asked}

    async def send(self, message: Message) -> None:
        """Raises: OSError when nobody listens any more (ASGI 2.4)."""
        if message["type"] == "http.response.start":
            headers = [(bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())]
            self._writer.write(wire.frame(wire.HEAD, wire.encode_head(message["status"], headers)))
        elif message["type"] == "http.response.body" and not self._done:
            self._writer.write(wire.frames(bytes(message.get("body", b""))))
            if not message.get("more_body", False):
                self._done = True
                self._writer.write(wire.frame(wire.END))
        await self._writer.drain()
