"""HAProxy and nginx in front of a host, configured as docs/deploy.md shows: TLS ends there, and the pieces of an answer go on
at once."""

import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from tests.certificate import self_signed
from tests.host.stage import eventually
from tests.system.shell import ROOT, free_port, tool

pytestmark = pytest.mark.system

TEXT = (ROOT / "docs" / "deploy.md").read_text()
NAMES = ("host.example.org", "chat.example.org")


def shown(kind: str) -> str:
    (block,) = re.findall(rf"^```{kind}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return str(block)


class Answer(BaseHTTPRequestHandler):
    """Says who it is, then waits until it is told that this was seen."""

    protocol_version = "HTTP/1.1"
    seen = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        port = str(self.connection.getsockname()[1]).encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(port), port))
        assert self.seen.wait(60)
        self.wfile.write(b"4\r\nrest\r\n0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        """Nowhere."""


@contextmanager
def answering() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


@dataclass(frozen=True)
class Front:
    """A web server as shown, but for ports and places. `leads_to`: by name, whose address it has to be."""

    kind: str
    command: tuple[str, ...]
    listens: str
    leads_to: dict[str, str]
    around: str = "{}"

    def write(self, folder: Path, ports: dict[str, int]) -> int:
        port = free_port()
        config = shown(self.kind)
        for old, new in {
            self.listens: re.sub(" :?443", f" 127.0.0.1:{port}", self.listens),
            **{place: str(folder / "both.pem") for place in re.findall(r"/etc/\S+\.(?:pem|key)", config)},
            **{address: f"127.0.0.1:{ports[address]}" for address in self.leads_to.values()},
        }.items():
            assert config.count(old) == 1
            config = config.replace(old, new)
        (folder / "config").write_text(self.around.format(config).replace("FOLDER", str(folder)))
        return port


_NGINX = """daemon off; pid FOLDER/pid; error_log FOLDER/errors;
events {{}}
http {{
    access_log off; client_body_temp_path FOLDER/bodies; proxy_temp_path FOLDER/proxied;
    fastcgi_temp_path FOLDER/fcgi; uwsgi_temp_path FOLDER/uwsgi; scgi_temp_path FOLDER/scgi;
    {}
}}
"""
FRONTS = (
    Front(
        "haproxy",
        ("haproxy", "-db", "-f"),
        "bind :443",
        {"host.example.org": "127.0.0.1:8700", "chat.example.org": "127.0.0.1:8500"},
    ),
    Front("nginx", ("nginx", "-c"), "listen 443", {"chat.example.org": "127.0.0.1:8500"}, _NGINX),
)


@contextmanager
def started(front: Front, folder: Path, ports: dict[str, int]) -> Iterator[int]:
    port = front.write(folder, ports)
    program, *options = front.command
    with subprocess.Popen([tool(program), *options, str(folder / "config")], cwd=folder) as process:
        try:
            eventually(lambda: listening(port))
            yield port
        finally:
            process.terminate()


@contextmanager
def asking(client: httpx2.Client, port: int, name: str) -> Iterator[httpx2.Response]:
    """Of the name, wherever it would lead."""
    about = {"headers": {"host": name}, "extensions": {"sni_hostname": name}}
    with client.stream("GET", f"https://127.0.0.1:{port}/", **about) as answer:  # type: ignore[arg-type]
        yield answer


@pytest.mark.parametrize("front", FRONTS, ids=lambda front: front.kind)
def test_each_name_leads_to_its_own_and_pieces_arrive_one_by_one(front: Front, tmp_path: Path) -> None:
    (tmp_path / "both.pem").write_bytes(b"".join(self_signed(*NAMES)))
    trusted = ssl.create_default_context(cafile=str(tmp_path / "both.pem"))
    with (
        answering() as host,
        answering() as chat,
        started(front, tmp_path, {"127.0.0.1:8700": host, "127.0.0.1:8500": chat}) as port,
        httpx2.Client(verify=trusted, trust_env=False, timeout=60) as client,
    ):
        for name, address in front.leads_to.items():
            expected = host if address.endswith(":8700") else chat
            Answer.seen.clear()
            with asking(client, port, name) as answer:
                pieces = answer.iter_raw()
                assert next(pieces) == str(expected).encode()  # the rest is sent only after this was read
                Answer.seen.set()
                assert b"".join(pieces) == b"rest"


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_haproxy_does_not_hold_back_small_pieces() -> None:
    """What it costs without stands in the document: 200 ms. How long it takes here is no business of a test."""
    assert "option http-no-delay" in shown("haproxy").partition("frontend")[0]
