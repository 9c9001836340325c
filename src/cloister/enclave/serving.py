"""The HTTP servers of the enclave's front: nothing is logged, nothing is said that a request does not need."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any, Self

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cloister.enclave.boot import Boot, EnclaveConfig
from cloister.enclave.gateway.certificate import TlsKey
from cloister.enclave.gateway.tls import Unsealed
from cloister.errors import WrongUse

__all__ = ["TlsFront", "server"]

_STOP_SECONDS = 5.0
_HEAD_SECONDS = 30.0
"""For which a request's head may take, from its first byte or, where it is the first, from the connection on."""


def server(app: Any) -> uvicorn.Server:
    """For an ASGI app, on a socket that is handed over when it serves."""
    return uvicorn.Server(_config(app))


class TlsFront:
    """The listener that ends TLS in here, beside the front that takes sealed requests: all that comes is for `app`. Until
    `start` connections wait. `key` is what the statement names."""

    def __init__(self, app: Any, key: TlsKey, sock: socket.socket) -> None:
        self.key = key
        self._socket = sock
        self._server = _Beside(_config(Unsealed(app), key.context))
        self._serving: asyncio.Task[None] | None = None

    @classmethod
    def open(cls, app: Any, config: EnclaveConfig, boot: Boot, now: float) -> Self | None:
        """None where the configuration asks for none. `now` in Unix seconds. Raises: WrongUse."""
        if config.tls != (boot.tls_fd is not None):
            hint = "Host and enclave must be the same release of cloister; `cloister host` has no TLS listener yet."
            raise WrongUse("The configuration and the sockets disagree about a TLS listener.", step="tls", hint=hint)
        return (
            None if boot.tls_fd is None else cls(app, TlsKey(boot.tls_origins, now), socket.socket(fileno=boot.tls_fd))
        )

    def start(self) -> None:
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def close(self) -> None:
        """Connections are refused from here on. Safe to call twice, and before the start."""
        self._server.should_exit = True
        if self._serving is not None:
            await asyncio.wait([self._serving], timeout=_STOP_SECONDS)
        self._socket.close()


class _Beside(uvicorn.Server):
    """Whose signals are the front's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Timely(HttpToolsProtocol):
    """Closes a connection whose next request's head is not there in time. Between requests uvicorn waits for five seconds."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._wait_no_more()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._wait_no_more()
        self._late = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def _wait_no_more(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def _config(app: Any, tls: ssl.SSLContext | None = None) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=_Timely,
        loop="uvloop",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=2,
    )
    config.load()
    config.ssl = tls
    return config
