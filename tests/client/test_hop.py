"""What goes wrong on the hop itself, and what has to have ended when a request is given up."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Generator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpcore2
import httpx2
import pytest
from tests.certificate import self_signed

from cloister.client.exchange import READ, Arrived, Fetch, Reply, Step
from cloister.client.hop import AsyncHop, Hop, proxy, proxy_for
from cloister.client.network import Network
from cloister.errors import CloisterError, ConnectionFailed, TruncatedResponse
from cloister.verify import Verified

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"
SPOILT = b"\x17\x03\x03\x00\x20" + bytes(32)  # a record that nobody sealed


class Spoiling:
    """A TLS server whose answer is spoilt on the way: after these bytes comes a record that does not open."""

    def __init__(self, directory: Path) -> None:
        certificate, key = self_signed("127.0.0.1")
        (directory / "both.pem").write_bytes(certificate + key)
        self.trust = ssl.create_default_context(cadata=certificate.decode())
        self.whole = b""
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(directory / "both.pem")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "Spoiling":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        """One connection, as a relay between client and enclave has it in its hands."""
        client, _ = self._listener.accept()
        with client.dup() as beneath, self._context.wrap_socket(client, server_side=True) as sealed:
            sealed.recv(65536)
            sealed.sendall(self.whole)
            beneath.sendall(SPOILT)
            with contextlib.suppress(OSError):
                while sealed.recv(65536):
                    pass


@pytest.fixture
def spoiling(tmp_path: Path) -> Iterator[Spoiling]:
    with Spoiling(tmp_path) as server:
        yield server


def asks(url: str) -> Generator[Step, Reply, None]:
    assert isinstance((yield Fetch("POST", url, {}, b"x")), Arrived)
    while (yield READ):
        pass


def never(_stale: Verified | None) -> Any:
    raise NotImplementedError


EXCEPTIONS = [
    ("example.org", "https://a.example.org:8443", True),
    (".example.org", "https://example.org", True),
    ("*.example.org", "https://a.example.org:8443", True),
    ("example.org:8443", "https://example.org:8443", True),
    ("example.org:8443", "https://example.org", False),
    ("ample.org", "https://example.org", False),
    ("https://a.example.org", "https://a.example.org", True),
    ("http://a.example.org", "https://a.example.org", False),
    ("10.0.0.0/8", "https://10.0.0.5:8443", True),
    ("10.0.0.0/8", "https://11.0.0.5:8443", False),
    ("10.0.0.5", "https://10.0.0.5:8443", True),
    ("fd00::1", "https://[fd00::1]:8443", True),
    ("[fd00::1]", "https://[fd00::1]", True),
    ("a.b, *", "https://example.org", True),
    ("", "https://example.org", False),
    (" , ", "https://example.org", False),
]


@pytest.mark.parametrize(("entries", "url", "excepted"), EXCEPTIONS)
def test_a_proxy_of_the_environment_stands_before_what_is_not_excepted(
    monkeypatch: pytest.MonkeyPatch, entries: str, url: str, *, excepted: bool
) -> None:
    for name in ("HTTPS_PROXY", "ALL_PROXY", "all_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "proxy.example:3128")
    monkeypatch.setenv("no_proxy", entries)
    assert proxy_for(url) == (None if excepted else "http://proxy.example:3128")


def test_a_proxy_s_credentials_are_told_to_it_and_are_no_part_of_its_address() -> None:
    found = proxy("http://user:p%40ss@proxy.example:3128")
    assert (found.url.scheme, found.url.host, found.url.port) == (b"http", b"proxy.example", 3128)
    assert found.auth == (b"user", b"p@ss")
    assert dict(found.headers)[b"Proxy-Authorization"] == b"Basic dXNlcjpwQHNz"


@pytest.mark.parametrize("address", ["ftp://proxy.example", "http://proxy.example:port"])
def test_what_is_no_proxy_s_address_is_refused_before_anything_is_sent(address: str) -> None:
    with pytest.raises((ValueError, httpx2.InvalidURL)):
        proxy(address)


cases = pytest.mark.parametrize(("whole", "error"), [(b"", ConnectionFailed), (HEAD, TruncatedResponse)])


@cases
def test_an_answer_that_is_spoilt_beneath_the_hop_s_tls_is_a_typed_error(
    spoiling: Spoiling, whole: bytes, error: type[CloisterError]
) -> None:
    spoiling.whole = whole
    with httpcore2.ConnectionPool(ssl_context=spoiling.trust) as pool:
        hop = Hop(pool, never, None)
        with pytest.raises(error):
            hop.drive(asks(spoiling.url))
        hop.close()


@pytest.mark.anyio
@cases
async def test_so_it_is_for_the_async_hop(spoiling: Spoiling, whole: bytes, error: type[CloisterError]) -> None:
    spoiling.whole = whole
    async with httpcore2.AsyncConnectionPool(ssl_context=spoiling.trust, network_backend=Network()) as pool:
        hop = AsyncHop(pool, never, None)
        with pytest.raises(error):
            await hop.drive(asks(spoiling.url))
        await hop.close()


class Counting(BaseHTTPRequestHandler):
    """Answers in two pieces, and counts connections."""

    protocol_version = "HTTP/1.1"
    connections = 0

    def setup(self) -> None:
        type(self).connections += 1
        super().setup()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        for name, value in (("X-Twice", "1"), ("x-twice", "2"), ("Transfer-Encoding", "chunked")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"4\r\nhalf\r\n5\r\nwhole\r\n0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def counting() -> Iterator[str]:
    Counting.connections = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Counting) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def reads(url: str) -> Generator[Step, Reply, tuple[Arrived, bytes]]:
    arrived, body = (yield Fetch("POST", url, {}, b"x")), b""
    assert isinstance(arrived, Arrived)
    while data := (yield READ):
        assert isinstance(data, bytes)
        body += data
    return arrived, body


def test_an_answer_that_was_read_to_its_end_gives_its_connection_back(counting: str) -> None:
    with httpcore2.ConnectionPool() as pool:
        for _ in range(2):
            arrived, body = Hop(pool, never, None).drive(reads(counting))  # nobody closes
            assert (arrived.status, arrived.headers["x-twice"], body) == (200, "1, 2", b"halfwhole")
    assert Counting.connections == 1


@pytest.mark.anyio
async def test_so_it_does_for_the_async_hop(counting: str) -> None:
    async with httpcore2.AsyncConnectionPool(network_backend=Network()) as pool:
        for _ in range(2):
            assert (await AsyncHop(pool, never, None).drive(reads(counting)))[1] == b"halfwhole"
    assert Counting.connections == 1
