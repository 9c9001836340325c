import contextlib
import socket
import threading

import pytest
from tests.host.stage import eventually

from cloister.host.process import listen
from cloister.host.relay import Relay


def _echo_once(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(connection.recv(100).upper())


def _ask(port: int, text: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(text)
        return client.recv(100)


def test_passes_every_byte_on_and_remembers_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_echo_once, args=(server,), daemon=True).start()
        relay = Relay(server.getsockname()[1])
        relay.start()
        try:
            assert _ask(relay.port, b"hello") == b"HELLO"
            seen = relay.take()
        finally:
            relay.stop()
    assert [(record.direction, record.data) for record in seen] == [
        ("to-enclave", b"hello"),
        ("from-enclave", b"HELLO"),
    ]
    assert relay.take() == []


def test_keeps_no_more_than_it_was_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_echo_once, args=(server,), daemon=True).start()
        relay = Relay(server.getsockname()[1], keep=6)
        relay.start()
        try:
            _ask(relay.port, b"hello")
            assert [record.data for record in relay.take()] == [b"HELLO"]
        finally:
            relay.stop()


def test_stops_without_a_word_while_somebody_is_connected(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay(server.getsockname()[1])
        relay.start()
        with socket.create_connection(("127.0.0.1", relay.port), timeout=60) as client:
            client.sendall(b"hello")
            upstream, _ = server.accept()
            with upstream:
                assert upstream.recv(100) == b"hello"
                relay.stop()
                assert client.recv(100) == b""  # cut, too
    assert caplog.records == []
    assert capfd.readouterr().err == ""


def test_without_an_enclave_it_answers_503_and_with_a_new_one_it_leads_there() -> None:
    listener = listen("127.0.0.1", 0)
    relay = Relay(0, keep=0, listener=listener)
    relay.start()
    try:
        assert relay.port == listener.getsockname()[1]
        assert _ask(relay.port, b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 503 ")
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=_echo_once, args=(server,), daemon=True).start()
            relay.upstream_port = server.getsockname()[1]
            assert _ask(relay.port, b"hello") == b"HELLO"
        assert relay.take() == []  # it was told to keep nothing
        assert (relay.connections, relay.received, relay.sent) == (2, 5, 5)
    finally:
        relay.stop()


def test_before_tls_it_closes_while_nobody_is_there() -> None:
    relay = Relay(0, keep=0, tls=True)
    relay.start()
    try:
        with contextlib.suppress(ConnectionResetError):  # it reads nothing, so it may be this
            assert _ask(relay.port, b"\x16\x03\x01") == b""
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=_echo_once, args=(server,), daemon=True).start()
            relay.upstream_port = server.getsockname()[1]
            assert _ask(relay.port, b"hello") == b"HELLO"
    finally:
        relay.stop()


def test_over_its_most_connections_it_answers_503_until_one_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.host.relay._MOST", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay(server.getsockname()[1], keep=0)
        relay.start()
        try:
            clients = [socket.create_connection(("127.0.0.1", relay.port), timeout=60) for _ in range(2)]
            enclave = [server.accept()[0] for _ in clients]
            with socket.create_connection(("127.0.0.1", relay.port), timeout=60) as third:
                answer = third.recv(1000)
                assert answer.startswith(b"HTTP/1.1 503 ")
                assert b"Too many" in answer
                assert third.recv(1) == b""
            for one in enclave:
                one.close()
            for client in clients:
                assert client.recv(1) == b""
                client.close()
            eventually(lambda: relay._open == 0)
            threading.Thread(target=_echo_once, args=(server,), daemon=True).start()
            assert _ask(relay.port, b"hello") == b"HELLO"
        finally:
            relay.stop()


def test_a_client_that_says_no_more_gets_its_answer_and_its_end_is_passed_on() -> None:
    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            asked = b""
            while more := connection.recv(100):
                asked += more
            connection.sendall(asked.upper())

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        relay = Relay(server.getsockname()[1])
        relay.start()
        try:
            with socket.create_connection(("127.0.0.1", relay.port), timeout=60) as client:
                client.sendall(b"hello")
                client.shutdown(socket.SHUT_WR)
                assert client.recv(100) == b"HELLO"
                assert client.recv(100) == b""
        finally:
            relay.stop()


def test_an_enclave_that_has_said_all_ends_the_connection() -> None:
    """A client that stays does not keep it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_echo_once, args=(server,), daemon=True).start()
        relay = Relay(server.getsockname()[1])
        relay.start()
        try:
            with socket.create_connection(("127.0.0.1", relay.port), timeout=60) as client:
                client.sendall(b"hello")
                assert client.recv(100) == b"HELLO"
                assert client.recv(100) == b""
                eventually(lambda: relay._open == 0)
        finally:
            relay.stop()


def test_who_connects_to_nobody_and_says_nothing_is_not_waited_for_at_the_end() -> None:
    relay = Relay(0, keep=0)
    relay.start()
    with socket.create_connection(("127.0.0.1", relay.port), timeout=60) as client:
        eventually(lambda: relay.connections == 1)
        relay.stop()
        assert client.recv(100) == b""
