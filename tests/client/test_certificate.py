import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cloister.client.certificate import fetch_certificate, find_listener
from cloister.enclave.gateway.certificate import TlsKey
from cloister.errors import ConnectionFailed, WrongUse
from cloister.verify import Verified


def named(*aud: str) -> Verified:
    return cast("Verified", SimpleNamespace(statement=SimpleNamespace(aud=aud)))


def test_the_listener_is_at_the_host_that_was_asked_and_the_port_that_is_attested() -> None:
    """Whoever runs it chose the names: a client is not sent to other machines by them."""
    verified = named("https://localhost:8443", "https://elsewhere.example:8443")
    assert find_listener(verified, "http://10.0.0.7:8484/#owner=x") == ("10.0.0.7", 8443)
    assert find_listener(verified, "http://[::1]:8484") == ("::1", 8443)
    ours_and_a_balancers = named("https://chat.example", "https://tls.chat.example:443")
    assert find_listener(ours_and_a_balancers, "https://chat.example") == ("chat.example", 443)


@pytest.mark.parametrize(
    "aud", [(), ("https://a:1", "https://a:2"), ("http://a:1",), ("https://a",), ("https://a:none",)]
)
def test_without_one_port_the_address_must_be_named(aud: tuple[str, ...]) -> None:
    with pytest.raises(WrongUse) as caught:
        find_listener(named(*aud), "http://127.0.0.1:8484")
    assert "--tls HOST:PORT" in caught.value.hint


@dataclass
class Seen:
    port: int
    data: bytes = b""


@contextmanager
def server(context: ssl.SSLContext | None) -> Iterator[Seen]:
    """One connection; None: it speaks no TLS."""
    listening = socket.create_server(("127.0.0.1", 0))
    seen = Seen(listening.getsockname()[1])

    def serve() -> None:
        sock, _ = listening.accept()
        with sock:
            try:
                if context is None:
                    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                else:
                    with context.wrap_socket(sock, server_side=True) as tls:
                        seen.data = tls.recv(100)
            except OSError:
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield seen
    finally:
        thread.join(10)
        listening.close()


def test_nothing_is_sent_but_a_handshake() -> None:
    key = TlsKey(("https://localhost:1",), 1_800_000_000.0)  # not valid now: that is another's to judge
    with server(key.context) as seen:
        assert fetch_certificate("127.0.0.1", seen.port)
    assert seen.data == b""


def older() -> ssl.SSLContext:
    context = TlsKey(("https://localhost:1",), 1_800_000_000.0).context
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


@pytest.mark.parametrize("make", [older, lambda: None])
def test_what_speaks_no_tls_1_3_gives_none(make: Any) -> None:
    with server(make()) as seen, pytest.raises(ConnectionFailed, match=r"TLS 1\.3"):
        fetch_certificate("127.0.0.1", seen.port)


def test_where_nobody_listens_it_says_so() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionFailed):
            fetch_certificate("127.0.0.1", bound.getsockname()[1])


def test_a_host_that_no_name_can_be_is_not_reached() -> None:
    with pytest.raises(ConnectionFailed):
        fetch_certificate(f"{'a' * 64}.example", 443)
