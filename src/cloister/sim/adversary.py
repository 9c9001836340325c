"""A hostile host: a reverse proxy on loopback that changes what passes through it, for `cloister demo attack` and tests.

Every answer is sent on as clean HTTP of exactly its length: what was done to it shows only to who checks the seal.
"""

import contextlib
import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Adversary", "Exchange"]

_HOP_BY_HOP = frozenset({"connection", "transfer-encoding", "content-length", "host"})


@dataclass(slots=True)
class Exchange:
    """One request and its answer; what a hook changes here is what is sent on."""

    method: str
    path: str
    request: bytes
    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    response: bytes = b""


Hook = Callable[[Exchange], None]


def _leave(_exchange: Exchange) -> None:
    pass


class Adversary:
    """`on_request` is called before the enclave sees a request, `on_response` before the client sees the answer.

    A request hook that sets `status` answers by itself, and the enclave never hears of it.
    """

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        self.on_request: Hook = _leave
        self.on_response: Hook = _leave
        self.seen: list[Exchange] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="adversary", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Adversary":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def behave(self, *, on_request: Hook = _leave, on_response: Hook = _leave) -> None:
        """Exactly these hooks from here on, and nothing remembered of what was seen before."""
        self.on_request, self.on_response = on_request, on_response
        self.seen = []

    def forward(self, exchange: Exchange, headers: dict[str, str]) -> None:
        """Ask the enclave; fills in its answer, or as much of it as came."""
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream_port, timeout=60)
        with contextlib.closing(upstream):
            upstream.request(exchange.method, exchange.path, exchange.request, headers)
            answer = upstream.getresponse()
            exchange.status = answer.status
            exchange.headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
            try:
                exchange.response = answer.read()
            except http.client.IncompleteRead as broken:
                exchange.response = broken.partial

    def _serve(self, exchange: Exchange, headers: dict[str, str]) -> None:
        self.on_request(exchange)
        if not exchange.status:
            self.forward(exchange, headers)
        self.seen.append(exchange)
        self.on_response(exchange)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        adversary = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                exchange = Exchange(self.command, self.path, body)
                headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
                adversary._serve(exchange, headers)
                self.send_response_only(exchange.status)
                for name, value in exchange.headers:
                    self.send_header(name, value)
                self.send_header("content-length", str(len(exchange.response)))
                self.end_headers()
                self.wfile.write(exchange.response)

            do_GET = do_POST = _pass  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Nothing that passes is logged."""

        return Handler
