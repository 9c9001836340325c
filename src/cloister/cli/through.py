"""A local address for one enclave's app, whatever its paths: each request is sealed, each answer opened. For the tests of the
app's owner; a person's own tools go through `cloister connect`, which guards who may ask."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cloister.client import AUTHORITY, AsyncSession, InnerRequest
from cloister.errors import CloisterError
from cloister.host.process import listen
from cloister.proxy.serving import server
from cloister.verify import Policy

__all__ = ["opened_through"]

_NOT_SENT = frozenset(
    {b"host", b"connection", b"content-length", b"transfer-encoding", b"accept-encoding", b"keep-alive"}
)
_NOT_RETURNED = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"content-length"})


@contextmanager
def opened_through(url: str, policy: Policy) -> Iterator[str]:
    """The local address, for as long as the context lasts. What does not verify gets nothing, and is answered with 502."""
    sock = listen("127.0.0.1", 0)
    local = f"http://127.0.0.1:{sock.getsockname()[1]}"
    running = server(_Through(url, policy))
    thread = threading.Thread(target=_run, args=(running, sock), name="through", daemon=True)
    thread.start()
    try:
        yield local
    finally:
        running.should_exit = True
        thread.join()
        sock.close()


def _run(running: Any, sock: socket.socket) -> None:
    asyncio.run(running.serve(sockets=[sock]))


class _Through:
    def __init__(self, url: str, policy: Policy) -> None:
        self._session = AsyncSession(url, policy=policy, pin_measurement=True)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self._session.aclose()
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["type"] == "http":
            await self._exchange(scope, receive, send)

    async def _exchange(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        content = bytearray()
        while (message := await receive())["type"] == "http.request":
            content += message.get("body", b"")
            if not message.get("more_body", False):
                break
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        url = f"http://{AUTHORITY}" + (scope["raw_path"] + query).decode("ascii", "replace")
        headers = tuple(field for field in scope["headers"] if field[0] not in _NOT_SENT)
        try:
            answer = await self._session.send(InnerRequest(scope["method"], url, headers, bytes(content)))
        except CloisterError as error:
            words = f"{type(error).__name__}: {error.message}\n".encode()
            await send({"type": "http.response.start", "status": 502, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": words})
            return
        try:
            kept = [(name, value) for name, value in answer.headers if name.lower() not in _NOT_RETURNED]
            await send({"type": "http.response.start", "status": answer.status, "headers": kept})
            async for part in answer:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()
