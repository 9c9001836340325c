"""TCP and TLS by asyncio itself, for httpcore2's async pool.

httpcore2's own way, through anyio, serves every event loop there is and pays for it with each piece of an answer: a cancel
scope, two turns of the loop, reading turned off and on again. Here a piece is handed on as it is
(`docs/adr/0018-asyncio-under-the-async-hop.md`).
"""

import asyncio
import functools
import select
import socket
import ssl
from asyncio.staggered import staggered_race
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import httpcore2

__all__ = ["Network"]

_Option: TypeAlias = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]
_Info: TypeAlias = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]

T = TypeVar("T")
_NO_DELAY: _Option = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
_NEXT_ADDRESS = 0.25  # seconds; RFC 8305, section 5: another address is tried beside one that keeps us waiting
_PIECE = 1 << 16  # bytes that are written before it is looked whether they leave
_MOST_HELD = 1 << 18  # bytes that were received and not read, from where on no more are taken in


class Network(httpcore2.AsyncNetworkBackend):
    """Connections of the running event loop, which must be asyncio's or one like it."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore2's interface)
        local_address: str | None = None,
        socket_options: Iterable[_Option] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """To the first of the host's addresses that answers. Raises: httpcore2.ConnectError, httpcore2.ConnectTimeout."""
        try:
            async with asyncio.timeout(timeout):
                sock = await _connect(host, port, local_address)
                return await _Stream.over(sock, (_NO_DELAY, *(socket_options or ())))
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(str(error)) from error
        except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
            raise httpcore2.ConnectError(str(error)) from error

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def _connect(host: str, port: int, local_address: str | None) -> socket.socket:
    """Happy eyeballs (RFC 8305): the kinds of addresses by turns, the next one as soon as one fails or takes long."""
    infos = await _addresses(host, port)
    attempts = [functools.partial(_attempt, info, local_address) for info in _by_turns(infos)]
    found: socket.socket | None
    found, _, errors = await staggered_race(attempts, _NEXT_ADDRESS)
    if found is None:
        raise OSError(f"none of {len(infos)} addresses answered") from next(filter(None, errors), None)
    return found


async def _addresses(host: str, port: int) -> Sequence[_Info]:
    return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)


def _by_turns(infos: Iterable[_Info]) -> list[_Info]:
    """In the resolver's order within each kind."""
    seen: Counter[int] = Counter()
    ranked = []
    for info in infos:
        ranked.append((seen[info[0]], info))
        seen[info[0]] += 1
    return [info for _, info in sorted(ranked, key=lambda item: item[0])]


async def _attempt(info: _Info, local_address: str | None) -> socket.socket:
    family, kind, protocol, _, address = info
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)  # noqa: FBT003
        if local_address is not None:
            sock.bind((local_address, 0))
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


class _Protocol(asyncio.Protocol):
    """What came in and was not read yet; who waits for more, or for what was written to leave."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.pieces: deque[bytes] = deque()
        self.held = 0
        self.ended = False
        self.error: Exception | None = None
        self.paused = False
        self._full = False
        self._waiting: set[asyncio.Future[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.pieces.append(data)
        self.held += len(data)
        if self.held > _MOST_HELD and self.transport is not None:
            self._full = True
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self.ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended, self.error, self.paused = True, exc, False
        self._wake()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._wake()

    def take(self, most: int) -> bytes:
        """What came first, of that not more than `most`."""
        data = self.pieces.popleft()
        if len(data) > most:
            self.pieces.appendleft(data[most:])
            data = data[:most]
        self.held -= len(data)
        if self._full and not self.held and self.transport is not None:
            self._full = False
            self.transport.resume_reading()
        return data

    async def wait(self, timeout: float | None) -> None:  # noqa: ASYNC109
        """Until something changes. Raises: TimeoutError."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiting.add(waiter)
        timer = loop.call_later(timeout, _expire, waiter) if timeout is not None else None
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)


def _expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


class _Sealable(httpcore2.AsyncNetworkStream):
    """A connection that TLS may go over, whether it is one itself or not."""

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore2.AsyncNetworkStream:
        """TLS over this connection. Raises: httpcore2.ConnectError, httpcore2.ConnectTimeout."""
        return await _tls_over(self, ssl_context, server_hostname, timeout)


class _Stream(_Sealable):
    """One connection. One task may read while another writes."""

    def __init__(self, transport: asyncio.Transport, protocol: _Protocol) -> None:
        self._transport = transport
        self._protocol = protocol

    @classmethod
    async def over(cls, sock: socket.socket, options: Iterable[_Option]) -> "_Stream":
        try:
            for option in options:
                sock.setsockopt(*option)
            return cls(*await asyncio.get_running_loop().create_connection(_Protocol, sock=sock))
        except BaseException:
            sock.close()
            raise

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        """b"" at the end; `timeout` in seconds without anything. Raises: httpcore2.ReadError, httpcore2.ReadTimeout."""
        protocol = self._protocol
        try:
            while not protocol.pieces and not protocol.ended:
                await protocol.wait(timeout)
        except TimeoutError as error:
            raise httpcore2.ReadTimeout("nothing came") from error
        if protocol.pieces:
            return protocol.take(max_bytes)
        if protocol.error is not None:
            raise httpcore2.ReadError(str(protocol.error)) from protocol.error
        return b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """`timeout` in seconds in which nothing leaves. Raises: httpcore2.WriteError, httpcore2.WriteTimeout."""
        protocol = self._protocol
        try:
            for at in range(0, len(buffer), _PIECE):
                if self._transport.is_closing():
                    raise httpcore2.WriteError("the connection is closed") from protocol.error
                self._transport.write(buffer[at : at + _PIECE])
                while protocol.paused:
                    await protocol.wait(timeout)
        except TimeoutError as error:
            raise httpcore2.WriteTimeout("nothing left") from error

    async def aclose(self) -> None:
        self._transport.abort()
        await asyncio.sleep(0)  # the turn in which it is closed

    def get_extra_info(self, info: str) -> Any:
        """Of what httpcore2 asks for: `is_readable`: nobody asked, and yet something came, or the end."""
        if info == "is_readable":
            protocol = self._protocol
            return bool(protocol.pieces) or protocol.ended or self._transport.is_closing() or self._has_unread()
        return self._transport.get_extra_info(info)

    def _has_unread(self) -> bool:
        """By the kernel's word: the event loop may not have had its turn since."""
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket"), select.POLLIN)
        return bool(poll.poll(0))


class _TlsStream(_Sealable):
    """TLS over another connection, which may be one itself. It opens record by record (asyncio's own opens what came at
    once as one, and loses it with a record that does not open)."""

    def __init__(self, beneath: httpcore2.AsyncNetworkStream, context: ssl.SSLContext, name: str | None) -> None:
        self._beneath = beneath
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        self._leaving = asyncio.Lock()

    async def handshake(self) -> None:
        """Raises: ssl.SSLError, httpcore2.ReadError, httpcore2.WriteError."""
        await self._carry_out(self._tls.do_handshake, None)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        """As `_Stream.read`; a record that does not open is a ReadError too, an end without its record is an end."""
        try:
            return await self._carry_out(functools.partial(self._tls.read, max_bytes), timeout)
        except ssl.SSLEOFError:
            return b""
        except ssl.SSLError as error:
            raise httpcore2.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """As `_Stream.write`."""
        try:
            for at in range(0, len(buffer), _PIECE):
                await self._carry_out(functools.partial(self._tls.write, buffer[at : at + _PIECE]), timeout)
        except ssl.SSLError as error:
            raise httpcore2.WriteError(str(error)) from error

    async def aclose(self) -> None:
        await self._beneath.aclose()

    def get_extra_info(self, info: str) -> Any:
        return self._tls if info == "ssl_object" else self._beneath.get_extra_info(info)

    async def _carry_out(self, call: Callable[[], T], timeout: float | None) -> T:  # noqa: ASYNC109
        """What TLS wants to read is read, what it gives out leaves."""
        while True:
            try:
                result = call()
            except ssl.SSLWantReadError:
                await self._flush(timeout)
            else:
                await self._flush(timeout)
                return result
            if data := await self._beneath.read(_PIECE, timeout):
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    async def _flush(self, timeout: float | None) -> None:  # noqa: ASYNC109
        async with self._leaving:
            await self._beneath.write(self._outgoing.read(), timeout)


async def _tls_over(
    beneath: httpcore2.AsyncNetworkStream,
    context: ssl.SSLContext,
    name: str | None,
    timeout: float | None,  # noqa: ASYNC109
) -> _TlsStream:
    try:
        stream = _TlsStream(beneath, context, name)
        async with asyncio.timeout(timeout):
            await stream.handshake()
    except BaseException as error:
        await beneath.aclose()
        if isinstance(error, TimeoutError):
            raise httpcore2.ConnectTimeout("the handshake took too long") from error
        if isinstance(error, (OSError, httpcore2.NetworkError)):  # ssl.SSLError is an OSError
            raise httpcore2.ConnectError(str(error)) from error
        raise
    return stream
