"""The HTTP server of the enclave's front: nothing is logged, nothing is said that a request does not need."""

from typing import Any

import httptools  # noqa: F401  (uvicorn loads it by name; the import makes it part of what is measured)
import uvicorn

__all__ = ["server"]


def server(app: Any) -> uvicorn.Server:
    """For an ASGI app, on a socket that is handed over when it serves."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="httptools",
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
    )
