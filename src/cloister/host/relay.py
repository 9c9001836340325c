"""A hop between client and enclave: all that passes here is all that the untrusted host can ever see.

`cloister up` shows its record beside the conversation, and tests look in it for prompts; `cloister host` puts one with a
stable port before each app, records nothing, and points it at the enclave that runs now. It runs in a thread of its own.
"""

import asyncio
import contextlib
import json
import socket
import threading
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Record", "Relay"]

_CHUNK = 64 * 1024
_MOST = 512
"""Connections at once, of two descriptors each: who opens many to one app leaves some to the host and to other apps."""


def _unavailable(detail: str) -> bytes:
    problem = {"type": "about:blank", "status": 503, "title": "Service Unavailable", "detail": detail}
    body = json.dumps(problem).encode()
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 5\r\n"
        b"Cache-Control: no-store\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )


_NOBODY = _unavailable("The app is not running now.")
_FULL = _unavailable("Too many are connected to the app.")


@dataclass(frozen=True, slots=True)
class Record:
    """One piece of one connection, as it came out of a socket."""

    connection: int
    direction: Literal["to-enclave", "from-enclave"]
    data: bytes


@dataclass(slots=True)
class Relay:
    """Listens on a free loopback port, or on the `listener` given, and passes every byte on to `upstream_port`,
    remembering the last `keep` bytes. `upstream_port` may change; while it is 0, or when too many are connected, the answer
    is HTTP's 503, or with `tls` none. `received` and `sent` count bytes from and to clients."""

    upstream_port: int
    keep: int = 4 << 20
    listener: socket.socket | None = None
    tls: bool = False
    port: int = field(default=0, init=False)
    received: int = field(default=0, init=False)
    sent: int = field(default=0, init=False)
    _records: list[Record] = field(default_factory=list, init=False)
    _kept: int = field(default=0, init=False)
    _connections: int = field(default=0, init=False)
    _open: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _loop: asyncio.AbstractEventLoop | None = field(default=None, init=False)
    _stopping: asyncio.Event | None = field(default=None, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def start(self) -> None:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), name="relay", daemon=True)
        self._thread.start()
        started.wait()

    def stop(self) -> None:
        if self._loop is not None and self._stopping is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    @property
    def connections(self) -> int:
        """So far."""
        return self._connections

    def take(self) -> list[Record]:
        """What passed since the last call, oldest first."""
        with self._lock:
            taken, self._records, self._kept = self._records, [], 0
        return taken

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        if self.listener is not None:
            server = await asyncio.start_server(self._accept, sock=self.listener)
        else:
            server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._stopping.wait()
        server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        number = self._connections
        if self._open >= _MOST:
            if not self.tls:
                writer.write(_FULL)
            writer.close()
            return
        self._open += 1
        try:
            if self.upstream_port:
                await self._carry(number, reader, writer)
            elif not self.tls:
                await self._answer_nobody(reader, writer)
        except asyncio.CancelledError:
            pass  # the relay stops; asyncio's own callback would complain about a cancelled task
        finally:  # stopping the relay cuts what is still open
            self._open -= 1
            writer.close()

    async def _carry(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the enclave has said all: a client that says no more may wait for its answer still."""
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        except OSError:
            return
        asking = asyncio.create_task(self._pump(number, "to-enclave", reader, up_writer))
        try:
            await self._pump(number, "from-enclave", up_reader, writer)
        finally:
            asking.cancel()
            up_writer.close()
            await asyncio.wait([asking])

    async def _answer_nobody(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """After the first bytes, of which no notice is taken: who is answered before it asked may not listen."""
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(reader.read(_CHUNK), 10)
            writer.write(_NOBODY)
            await writer.drain()

    async def _pump(
        self,
        number: int,
        direction: Literal["to-enclave", "from-enclave"],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                self._remember(Record(number, direction, data))
                writer.write(data)
                await writer.drain()
            writer.write_eof()

    def _remember(self, record: Record) -> None:
        if record.direction == "to-enclave":
            self.received += len(record.data)
        else:
            self.sent += len(record.data)
        if not self.keep:
            return
        with self._lock:
            self._records.append(record)
            self._kept += len(record.data)
            while self._kept > self.keep and len(self._records) > 1:
                self._kept -= len(self._records.pop(0).data)
