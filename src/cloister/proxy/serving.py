"""The local proxy's HTTP server, for a loopback socket that is handed over when it serves."""

from typing import Any

import uvicorn

from cloister.patience import PATIENCE, Patience
from cloister.timely import timely

__all__ = ["server"]


def server(app: Any, *, patience: Patience = PATIENCE) -> uvicorn.Server:
    """For `create_proxy`'s app, or one around it: nobody else says who a client is, and no request is logged."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=timely(patience),
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            ws="none",
        )
    )
