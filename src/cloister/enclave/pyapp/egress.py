"""Where a confined app may connect to. Each host and port that it declared has a listener on the app's own loopback, under
that very name; what connects there ends in this process, which goes on to that host and port. There is nothing by which an
app could name another.

Who is at the other end, the app's own TLS has to check, as everywhere: names are resolved by the untrusted host's word.
"""

import asyncio
import contextlib
import errno
import ipaddress
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cloister.errors import WrongUse

__all__ = ["Dial", "Egress", "Target", "dial", "may_reach", "parse_targets"]

_ENTRY = re.compile(r"([a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)(?::([0-9]{1,5}))?")
_HTTPS = 443
_DIAL_SECONDS = 30.0
_MOST_CONNECTIONS = 1024
_PIECE = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PUBLIC = ipaddress.ip_network("2000::/3")  # what else there is of IPv6 leads to neighbours, or nowhere
_EACH_ADDRESS = 5.0  # seconds, for a name has several

Connection: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Target:
    """`address`: where on the app's loopback its listener stands; an address that was declared as such is its own."""

    host: str
    port: int
    address: str


Dial: TypeAlias = Callable[[Target], Awaitable[Connection]]


def parse_targets(egress: Sequence[str]) -> tuple[Target, ...]:
    """Of "host" (port 443) and "host:port", in order, each once.

    Raises: WrongUse for what is neither, and for an address that leads back into the enclave or its machine.
    """
    found: dict[tuple[str, int], Target] = {}
    places: dict[str, str] = {}
    for entry in egress:
        parts = _ENTRY.fullmatch(entry)
        port = int(parts[2] or _HTTPS) if parts else 0
        if parts is None or not 1 <= port <= 65_535:
            hint = 'Hosts, with a port if it is not 443: egress = ["api.example.com"]'
            raise WrongUse("The app's egress names no host.", step="egress", hint=hint, got=ascii(entry)[:80])
        host = parts[1]
        places.setdefault(host, host if _is_address(host) else f"127.0.0.{len(places) + 2}")
        target = Target(host, port, places[host])
        if _is_address(host) and not may_reach(target, host):
            hint = "An app reaches its own loopback without being allowed to."
            raise WrongUse(
                "The app's egress names an address of the machine itself.", step="egress", hint=hint, got=host
            )
        found[host, port] = target
    return tuple(found.values())


def _is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.IPv4Address(host))
    return False


def may_reach(target: Target, address: str) -> bool:
    """Whether a connection to `target` may go to what it resolved to: a name to public addresses alone, since whoever
    answers for it could point it into the enclave, at its machine's metadata or at a neighbour; a declared address may be a
    neighbour's."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inside = found.ipv4_mapped or found.sixtofour
        found = inside or (ipaddress.IPv4Address(found.packed[12:]) if found in _NAT64 else found)
    if address == target.host:
        own = found.is_loopback or found.is_link_local or found.is_unspecified
        return not (own or found.is_multicast or found.is_reserved)
    if isinstance(found, ipaddress.IPv6Address) and found not in _PUBLIC:
        return False
    return found.is_global and not found.is_multicast


async def dial(target: Target) -> Connection:
    """To what it resolves to now, and may. Raises: OSError; UnicodeError for what is no name."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    for address in dict.fromkeys(str(place[0]) for *_, place in found):
        if may_reach(target, address):
            with contextlib.suppress(OSError):  # a TimeoutError is one
                async with asyncio.timeout(_EACH_ADDRESS):
                    return await asyncio.open_connection(address, target.port)
    raise OSError(errno.EHOSTUNREACH, "no address that may be reached answers")


class Egress:
    """Takes the app's connections until it is closed. A connection that leads nowhere breaks off."""

    def __init__(self, dial: Dial = dial) -> None:
        self._dial = dial
        self._servers: list[asyncio.Server] = []
        self._running: set[asyncio.Task[None]] = set()

    async def serve(self, targets: Sequence[Target], listeners: Sequence[socket.socket]) -> None:
        """A listener for each target; they are closed with this. Raises: OSError, ValueError for what are none."""
        for target, listener in zip(targets, listeners, strict=True):
            self._servers.append(await asyncio.start_server(self._taker(target), sock=listener))

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        self._servers = []
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _taker(self, target: Target) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if len(self._running) >= _MOST_CONNECTIONS:
                _break_off(writer)
                return
            task = asyncio.create_task(self._relay(target, (reader, writer)))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

        return take

    async def _relay(self, target: Target, inner: Connection) -> None:
        try:
            async with asyncio.timeout(_DIAL_SECONDS):
                outer = await self._dial(target)
        except (OSError, UnicodeError, asyncio.CancelledError):  # TimeoutError is an OSError
            _break_off(inner[1])
            return
        whole = False
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_pass_on(inner[0], outer[1]))
                both.create_task(_pass_on(outer[0], inner[1]))
            whole = True
        except* (OSError, RuntimeError):  # RuntimeError: uvloop's for a connection that is closed already
            pass
        finally:
            for _, writer in (inner, outer):
                writer.close() if whole else _break_off(writer)


def _break_off(writer: asyncio.StreamWriter) -> None:
    """By a reset: a connection that was cut must not look like one that has ended."""
    with contextlib.suppress(OSError):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """To the end of what is read, which is told. Raises: OSError."""
    while data := await reader.read(_PIECE):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
