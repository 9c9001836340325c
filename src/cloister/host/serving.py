"""The host's HTTP server, with TLS when it has a certificate."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import uvicorn

from cloister.patience import PATIENCE, Patience
from cloister.timely import timely

__all__ = ["serve", "server"]


def serve(app: Any, sock: socket.socket, *, certificate: Path | None = None, key: Path | None = None) -> None:
    """Until SIGTERM or Ctrl+C. Nobody else says who a client is, and no request is logged."""
    asyncio.run(server(app, certificate=certificate, key=key).serve(sockets=[sock]))


def server(
    app: Any, *, certificate: Path | None = None, key: Path | None = None, patience: Patience = PATIENCE
) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http=timely(patience),
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=3,
        ssl_certfile=None if certificate is None else str(certificate),
        ssl_keyfile=None if key is None else str(key),
    )
    return uvicorn.Server(config)
