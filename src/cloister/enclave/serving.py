"""The HTTP servers of the enclave's front: nothing is logged, nothing is said that a request does not need."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any, Self

import uvicorn

from cloister.enclave.boot import Boot, EnclaveConfig
from cloister.enclave.gateway.certificate import TlsKey
from cloister.enclave.gateway.tls import Unsealed
from cloister.errors import WrongUse
from cloister.patience import PATIENCE, Patience
from cloister.timely import timely

__all__ = ["TlsFront", "server"]

_STOP_SECONDS = 5.0


def server(app: Any, *, patience: Patience = PATIENCE) -> uvicorn.Server:
    """For an ASGI app, on a socket that is handed over when it serves."""
    return uvicorn.Server(_config(app, patience=patience))


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
            hint = "Host and enclave must be the same release of cloister."
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


def _config(app: Any, tls: ssl.SSLContext | None = None, *, patience: Patience = PATIENCE) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=timely(patience),
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
