import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from tests.collateral.service import Reply, Service
from tests.vendors import intel

from cloister.collateral.https import Https, check_address
from cloister.errors import ConnectionFailed, MalformedEvidence, WrongUse


@pytest.fixture
def https() -> Iterator[Https]:
    https = Https()
    yield https
    https.close()


@contextmanager
def _raw(*blocks: bytes, tls: ssl.SSLContext | None = None, every: float = 0, asked: bool = True) -> Iterator[str]:
    """A server of one answer, block by block, that asks the other side's leave for nothing. `every`: seconds between blocks;
    `asked`: after it has read a request."""

    class Handler(socketserver.StreamRequestHandler):
        def setup(self) -> None:
            if tls is not None:
                self.request = tls.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
            super().setup()

        def finish(self) -> None:
            super().finish()
            self.request.close()

        def handle(self) -> None:
            with suppress(OSError):  # the client had enough
                while asked and self.rfile.readline().strip():
                    pass
                for block in blocks:
                    self.wfile.write(block)
                    time.sleep(every)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


HEAD = b"HTTP/1.1 200 OK\r\n"


def test_gives_body_and_headers(service: Service, https: Https) -> None:
    service.serve({"/x": Reply(b"body", headers={"X-Chain": "a"})})
    fetched = https.get(service.url + "/x")
    assert fetched is not None
    assert (fetched.body, fetched.headers["x-chain"]) == (b"body", "a")


def test_what_is_not_there_is_none(service: Service, https: Https) -> None:
    assert https.get(service.url + "/x") is None


@pytest.mark.parametrize("status", [204, 206, 301, 302, 307, 308, 400, 401, 403, 429, 500, 502, 503])
def test_any_other_status_is_a_failed_connection(service: Service, https: Https, status: int) -> None:
    service.serve({"/x": Reply(status=status, headers={"Location": service.url + "/y"}), "/y": Reply(b"elsewhere")})
    with pytest.raises(ConnectionFailed) as refused:
        https.get(service.url + "/x")
    assert refused.value.got == str(status)
    assert refused.value.hint
    assert service.requests == ["/x"]


@pytest.mark.parametrize(
    ("retry_after", "hint"),
    [
        ("30", "Try again in 30 s."),
        ("", "Try again in a minute."),
        ("<b>", "Try again in a minute."),
        ("9" * 9, "Try again in a minute."),
    ],
)
def test_a_busy_service_tells_when_to_come_back(service: Service, https: Https, retry_after: str, hint: str) -> None:
    service.serve({"/x": Reply(status=429, headers={"Retry-After": retry_after})})
    with pytest.raises(ConnectionFailed) as refused:
        https.get(service.url + "/x")
    assert refused.value.hint == hint


def test_an_endless_answer_is_cut_off(https: Https) -> None:
    with _raw(HEAD + b"\r\n", *([b"x" * 65536] * 64)) as url, pytest.raises(MalformedEvidence, match="too much"):
        https.get(url)


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
DRIPS = {
    "a body in pieces": (CHUNKED, b"1\r\nx\r\n"),
    "a body of no stated length": (HEAD + b"\r\n", b"x"),
    "a head": (HEAD, b"x"),
    "answers that are none yet": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("name", DRIPS)
def test_a_dripping_answer_is_cut_off_at_the_deadline(name: str) -> None:
    first, again = DRIPS[name]
    _expect_too_long(first, again)


def test_a_dripping_handshake_is_cut_off_at_the_deadline() -> None:
    """A TLS record of 16 KiB, byte by byte."""
    _expect_too_long(b"\x16\x03\x03\x40\x00", b"\x02", scheme="https")


def _expect_too_long(first: bytes, again: bytes, scheme: str = "http") -> None:
    """Each byte comes well before a timeout of reading."""
    https = Https(deadline=0.5)
    before = time.monotonic()
    try:
        with (
            _raw(first, *[again] * 100, every=0.05, asked=scheme == "http") as url,
            pytest.raises(ConnectionFailed, match="takes too long"),
        ):
            https.get(url.replace("http:", f"{scheme}:"))
        assert time.monotonic() - before < 4
    finally:
        https.close()


def test_within_the_deadline_nothing_is_cut() -> None:
    https = Https(deadline=30)
    try:
        with _raw(CHUNKED, *[b"1\r\nx\r\n"] * 4, b"0\r\n\r\n", every=0.05) as url:
            fetched = https.get(url)
        assert fetched is not None
        assert fetched.body == b"xxxx"
    finally:
        https.close()


def test_a_broken_off_answer_is_a_failed_connection(https: Https) -> None:
    with _raw(HEAD + b"Content-Length: 100\r\n\r\n", b"x" * 50) as url, pytest.raises(ConnectionFailed):
        https.get(url)


def test_what_is_not_http_is_a_failed_connection(https: Https) -> None:
    for noise in (b"", b"SSH-2.0-x\r\n", HEAD + b"Content-Length: x\r\n\r\n", HEAD + b"\xff\x00: 1\r\n\r\n"):
        with _raw(noise) as url, pytest.raises(ConnectionFailed):
            https.get(url)


def test_a_compressed_answer_is_refused_unread(https: Https) -> None:
    head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nbomb"
    with _raw(head) as url, pytest.raises(MalformedEvidence, match="compresses"):
        https.get(url)


def test_too_many_headers_are_refused(https: Https) -> None:
    many = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(90))
    with _raw(HEAD + many + b"Content-Length: 0\r\n\r\n") as url, pytest.raises((MalformedEvidence, ConnectionFailed)):
        https.get(url)


def test_nobody_there_is_a_failed_connection(https: Https) -> None:
    with _raw() as url:
        pass
    with pytest.raises(ConnectionFailed):
        https.get(url)


def test_a_certificate_that_nobody_vouches_for_is_a_failed_connection(https: Https, tmp_path: Path) -> None:
    root = tmp_path / "root.pem"
    key = intel.intel().keys["root"]
    certificate = intel.intel().certificate("root", intel.Settings())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    root.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(*form))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(root)
    with _raw(HEAD + b"\r\n", tls=tls) as url, pytest.raises(ConnectionFailed):
        https.get(url)


def test_a_proxy_of_the_environment_never_stands_before_this_machine(
    service: Service, https: Https, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    service.serve({"/x": Reply(b"body")})
    assert https.get(service.url + "/x") is not None


@pytest.mark.parametrize(
    "url",
    [
        "https://pccs.example",
        "https://pccs.example:8081/base/",
        "http://127.0.0.1:8081",
        "http://localhost",
        "http://[::1]:8081",
    ],
)
def test_https_anywhere_and_http_on_this_machine_are_addresses(url: str) -> None:
    assert check_address(url) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "pccs.example",
        "http://pccs.example",
        "http://10.0.0.1",
        "http://127.0.0.1.evil.example",
        "http://localhost.evil.example",
        "ftp://127.0.0.1",
        "file:///etc/passwd",
        "https://",
        "https://u:p@pccs.example",
        "https://pccs.example?x=1",
        "https://pccs.example#x",
        "https://pccs.example:port",
        "http://[::1",
    ],
)
def test_anything_else_is_none(url: str) -> None:
    with pytest.raises(WrongUse):
        check_address(url)
