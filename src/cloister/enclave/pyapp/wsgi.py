"""A WSGI app (PEP 3333) as an ASGI one: each request in one of a bounded number of threads, streamed part by part."""

import asyncio
import io
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from cloister.enclave.pyapp.asgi import Message, Receive, Send

__all__ = ["Wsgi"]

THREADS = 32
"""Requests that run at the same time; others wait."""
_PIECE = 1 << 16
_SEND_SECONDS = 60.0
"""For which so many bytes of an answer may wait for their reader. Then it breaks off, and its thread is another request's."""


class Wsgi:
    def __init__(self, app: Callable[..., Iterable[bytes]], threads: int = THREADS) -> None:
        self._app = app
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="wsgi")

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError("a WSGI app speaks HTTP only")
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        loop = asyncio.get_running_loop()

        def tell(message: Message) -> None:
            asyncio.run_coroutine_threadsafe(_awaited(send, message), loop).result()

        call = _Call(self._app, environ(scope, bytes(body)), tell)
        await loop.run_in_executor(self._pool, call.run)


async def _awaited(send: Send, message: Message) -> None:
    """Raises: TimeoutError."""
    async with asyncio.timeout(_SEND_SECONDS):
        await send(message)


class _Call:
    """One request in its thread."""

    def __init__(
        self, app: Callable[..., Iterable[bytes]], environ: dict[str, Any], tell: Callable[[Message], None]
    ) -> None:
        self._app = app
        self._environ = environ
        self._tell = tell
        self._head: Message | None = None
        self._begun = False

    def run(self) -> None:
        parts = self._app(self._environ, self._start)
        try:
            for part in parts:
                if part:
                    self._write(part)
            self._begin()
            self._tell({"type": "http.response.body", "body": b""})
        finally:
            close = getattr(parts, "close", None)
            if close is not None:
                close()

    def _start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
        if exc_info is not None and self._begun:
            raise exc_info[1].with_traceback(exc_info[2])
        if exc_info is None and self._head is not None:
            raise AssertionError("start_response was called twice")
        fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        self._head = {"type": "http.response.start", "status": int(status.split(" ", 1)[0]), "headers": fields}
        return self._write

    def _begin(self) -> None:
        if self._head is None:
            raise AssertionError("start_response was not called")
        if not self._begun:
            self._begun = True
            self._tell(self._head)

    def _write(self, part: bytes) -> None:
        self._begin()
        for at in range(0, len(part), _PIECE):
            self._tell({"type": "http.response.body", "body": part[at : at + _PIECE], "more_body": True})


def environ(scope: dict[str, Any], body: bytes) -> dict[str, Any]:
    """Of a request: nothing of this process's own environment."""
    server, port = scope["server"]
    found: dict[str, Any] = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": scope["root_path"],
        "PATH_INFO": scope["path"].encode().decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "REQUEST_URI": scope["raw_path"].decode("latin-1") or quote(scope["path"]),
        "SERVER_NAME": server,
        "SERVER_PORT": str(port),
        "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
        "REMOTE_ADDR": "",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope["scheme"],
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").upper().replace("-", "_"), raw_value.decode("latin-1")
        key = name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}"
        found[key] = f"{found[key]},{value}" if key in found else value
    return found
