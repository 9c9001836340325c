"""Requests that came by TLS, which ends in here: taken and answered as sealed ones are, with nothing to open or to seal.

For tools that speak nothing but TLS, and weaker than the sealed channel: no padding, no grid, no receipts, and only where
nobody in between ends TLS.
"""

import time
from collections.abc import Callable

from cloister.channel import bhttp
from cloister.channel.limits import DEFAULT_LIMITS, Limits
from cloister.channel.ohttp import AUTHORITY
from cloister.enclave.gateway import inner
from cloister.enclave.gateway.answer import Answer
from cloister.enclave.gateway.inside import App, Inside, Scope
from cloister.enclave.gateway.intake import Intake
from cloister.enclave.gateway.problems import Problem, Receive, Send
from cloister.errors import MalformedMessage

__all__ = ["Unsealed"]

_HOP_BY_HOP = frozenset(
    {b"connection", b"expect", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)


class Unsealed:
    """An ASGI app that hands all that comes to `app`, under the caps of size and time that sealed requests have."""

    def __init__(self, app: App, *, limits: Limits = DEFAULT_LIMITS, clock: Callable[[], float] = time.time) -> None:
        self._limits = limits
        self._intake = Intake(limits, clock)
        self._inside = Inside(app, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        content = await self._intake.open(receive, _Opener(self._limits))
        if isinstance(content, Problem):
            await content.answer(send)
        elif content is not None:
            answer = Answer(_Sealer(), grid=None, outer=_outer_head)
            await self._inside.answer(_request_of(scope, content), answer, scope, receive, send)


class _Opener:
    """The body of one request."""

    def __init__(self, limits: Limits) -> None:
        self._most = limits.request_bytes
        self._content = bytearray()

    def feed(self, data: bytes, _now: float) -> None:
        """Raises: MalformedMessage for a body that is too large."""
        self._content += data
        if len(self._content) > self._most:
            raise MalformedMessage("The request is too large.", step="size")

    def finish(self, _now: float) -> bytes:
        return bytes(self._content)


class _Sealer:
    """Content leaves as it is."""

    def start(self, _status: int, _headers: inner.Fields, *, stream: bool) -> bytes:
        return b""

    def data(self, body: bytes) -> bytes:
        return body

    def finish(self, _trailers: inner.Fields, *, pad: bool) -> bytes:
        return b""


def _request_of(scope: Scope, content: bytes) -> bhttp.Request:
    """As the app inside shall see it: without the address that it came from. Bytes of its target that no URL has are
    escaped."""
    query = scope["query_string"]
    target = scope["raw_path"] + (b"?" + query if query else b"")
    path = "".join(chr(byte) if 0x21 <= byte < 0x7F else f"%{byte:02X}" for byte in target)
    headers = tuple((name, value) for name, value in scope["headers"] if name not in _HOP_BY_HOP)
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    return bhttp.Request(scope["method"], "https", hosts[0] if len(hosts) == 1 else AUTHORITY, path, headers, content)


def _outer_head(status: int, headers: inner.Fields) -> tuple[int, list[tuple[bytes, bytes]]]:
    return status, [(name.lower(), value) for name, value in headers]
