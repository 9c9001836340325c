"""Connections of our own under httpcore2's pool, on both event loops that our users run."""

import asyncio
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import httpcore2
import pytest
import uvloop
from tests.certificate import self_signed

from cloister.client import network
from cloister.client.network import Network

Run: TypeAlias = Callable[[Coroutine[Any, Any, None]], None]
Serve: TypeAlias = Callable[[socket.socket], object]
HANG = 20.0


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def run(coroutine: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(asyncio.wait_for(coroutine, HANG))

    return run


@contextmanager
def served(serve: Serve) -> Iterator[int]:
    """The port of a server whose one connection `serve` is given."""

    def accept() -> None:
        with suppress(OSError):
            client, _ = listener.accept()
            client.settimeout(HANG)
            with client, suppress(OSError):
                serve(client)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield int(listener.getsockname()[1])
    thread.join(HANG)
    assert not thread.is_alive()


async def connect(port: int, **options: Any) -> httpcore2.AsyncNetworkStream:
    return await Network().connect_tcp("127.0.0.1", port, timeout=HANG, **options)


async def read_all(stream: httpcore2.AsyncNetworkStream) -> bytes:
    found = b""
    while data := await stream.read(65536, HANG):
        found += data
    return found


def echo(client: socket.socket) -> None:
    while data := client.recv(65536):
        client.sendall(data)


def until_closed(client: socket.socket) -> None:
    while client.recv(65536):
        pass


def test_gives_out_what_comes_and_not_more_than_was_asked_for_until_the_end(run: Run) -> None:
    async def ask() -> None:
        stream = await connect(port)
        assert [await stream.read(4, HANG) for _ in range(4)] == [b"abcd", b"efgh", b"i", b""]
        assert await stream.read(4, HANG) == b""
        await stream.aclose()

    with served(lambda client: client.sendall(b"abcdefghi")) as port:
        run(ask())


def test_what_is_written_arrives_whole_and_more_than_fits_is_waited_for(run: Run) -> None:
    sent, got = bytes(range(256)) * (1 << 14), bytearray()

    def slowly(client: socket.socket) -> None:
        while len(got) < len(sent):
            got.extend(client.recv(1 << 20))
        client.sendall(b".")

    async def ask() -> None:
        stream = await connect(port)
        await stream.write(b"", HANG)
        await stream.write(sent, HANG)
        assert await stream.read(1, HANG) == b"."
        await stream.aclose()

    with served(slowly) as port:
        run(ask())
    assert got == sent


def test_silence_and_a_reader_that_does_not_read_are_timeouts(run: Run) -> None:
    over = threading.Event()

    async def ask() -> None:
        stream = await connect(port)
        with pytest.raises(httpcore2.ReadTimeout):
            await stream.read(1, 0.05)
        with pytest.raises(httpcore2.WriteTimeout):
            await stream.write(bytes(1 << 26), 0.05)
        await stream.aclose()
        over.set()

    with served(lambda _client: over.wait(HANG)) as port:
        run(ask())


def test_nothing_is_lost_when_a_read_is_given_up(run: Run) -> None:
    async def ask() -> None:
        stream = await connect(port)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.read(65536, HANG), 0.02)
        await stream.write(b"later", HANG)
        assert await stream.read(65536, HANG) == b"later"
        await stream.aclose()

    with served(echo) as port:
        run(ask())


def test_what_nobody_reads_is_not_taken_in_without_end(run: Run) -> None:
    sent = 1 << 24

    async def ask() -> None:
        stream = await connect(port)
        await asyncio.sleep(0.3)
        protocol = stream._protocol  # type: ignore[attr-defined]
        assert 0 < protocol.held < network._MOST_HELD + (1 << 20)
        assert len(await read_all(stream)) == sent
        await stream.aclose()

    with served(lambda client: client.sendall(bytes(sent))) as port:
        run(ask())


def test_a_connection_that_is_reset_is_an_error_and_not_an_end(run: Run) -> None:
    def resets(client: socket.socket) -> None:
        client.recv(1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def ask() -> None:
        stream = await connect(port)
        await stream.write(b"x", HANG)
        with pytest.raises(httpcore2.ReadError):
            await stream.read(1, HANG)
        with pytest.raises(httpcore2.WriteError):
            await stream.write(b"x", HANG)
        await stream.aclose()

    with served(resets) as port:
        run(ask())


def test_an_idle_connection_that_the_other_side_closed_is_seen_before_it_is_used(run: Run) -> None:
    close, closed = threading.Event(), threading.Event()

    def closes(client: socket.socket) -> None:
        close.wait(HANG)
        client.close()
        closed.set()

    async def ask() -> None:
        stream = await connect(port)
        assert not stream.get_extra_info("is_readable")
        close.set()
        assert closed.wait(HANG)  # no turn of the event loop since
        assert stream.get_extra_info("is_readable")
        await stream.aclose()

    with served(closes) as port:
        run(ask())


def test_an_idle_connection_in_which_something_came_unasked_is_seen_too(run: Run) -> None:
    def unasked(client: socket.socket) -> None:
        client.sendall(b"x")
        until_closed(client)

    async def ask() -> None:
        stream = await connect(port)
        await asyncio.sleep(0.1)
        assert stream.get_extra_info("is_readable")
        await stream.aclose()

    with served(unasked) as port:
        run(ask())


def test_a_closed_connection_is_closed_for_the_other_side(run: Run) -> None:
    ended = threading.Event()

    def waits(client: socket.socket) -> None:
        until_closed(client)
        ended.set()

    async def ask() -> None:
        stream = await connect(port)
        await stream.aclose()
        await stream.aclose()
        assert ended.wait(HANG)
        with pytest.raises(httpcore2.WriteError):
            await stream.write(b"x", HANG)

    with served(waits) as port:
        run(ask())


@pytest.mark.parametrize("host", ["127.0.0.1", "name.invalid", "a" * 64 + ".invalid"])
def test_nobody_there_is_an_error_of_the_connection(run: Run, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    async def ask() -> None:
        with pytest.raises(httpcore2.ConnectError):
            await Network().connect_tcp(host, port, timeout=HANG)

    run(ask())


def info(port: int, family: socket.AddressFamily = socket.AF_INET) -> Any:
    return family, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)


def known(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    async def addresses(_host: str, _port: int) -> list[Any]:
        return [info(port) for port in ports]

    monkeypatch.setattr(network, "_addresses", addresses)


def test_an_address_that_refuses_is_followed_by_the_next_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_NEXT_ADDRESS", HANG)

    async def ask() -> None:
        stream = await connect(0)
        assert stream.get_extra_info("peername")[1] == port
        await stream.aclose()

    with served(until_closed) as port, socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        known(monkeypatch, unheard.getsockname()[1], port)
        run(ask())


class Hanging:
    """Attempts to port 1 never end. `closed`: their number, once they are given up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.closed = 0
        self._attempt = network._attempt
        monkeypatch.setattr(network, "_attempt", self)

    async def __call__(self, one: Any, local: str | None) -> socket.socket:
        if one[4][1] != 1:
            return await self._attempt(one, local)
        try:
            await asyncio.sleep(3600)
        finally:
            self.closed += 1
        raise AssertionError


def test_an_address_that_keeps_silent_does_not_keep_the_others_waiting(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "_NEXT_ADDRESS", 0.02)
    hanging = Hanging(monkeypatch)

    async def ask() -> None:
        stream = await connect(0)
        assert stream.get_extra_info("peername")[1] == port
        await stream.aclose()
        assert hanging.closed == 1

    with served(until_closed) as port:
        known(monkeypatch, 1, port)
        run(ask())


def test_silent_addresses_alone_are_a_timeout_and_are_given_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_NEXT_ADDRESS", 0.01)
    hanging = Hanging(monkeypatch)
    known(monkeypatch, 1, 1)

    async def ask() -> None:
        with pytest.raises(httpcore2.ConnectTimeout):
            await Network().connect_tcp("two.example", 443, timeout=0.1)
        await asyncio.sleep(0.01)
        assert hanging.closed == 2

    run(ask())


def test_the_kinds_of_addresses_take_turns() -> None:
    six, four = socket.AF_INET6, socket.AF_INET
    infos = [info(1, six), info(2, six), info(3, six), info(4, four), info(5, four)]
    assert [one[4][1] for one in network._by_turns(infos)] == [1, 4, 2, 5, 3]


def test_local_address_and_options_are_used(run: Run) -> None:
    async def ask() -> None:
        options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        stream = await connect(port, local_address="127.0.0.2", socket_options=options)
        sock = stream.get_extra_info("socket")
        assert sock.getsockname()[0] == "127.0.0.2"
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        await stream.aclose()

    with served(until_closed) as port:
        run(ask())


class Tls:
    """A server's certificate: `seal` makes its end of a connection, `trust` is for clients."""

    def __init__(self, directory: Path) -> None:
        certificate, key = self_signed("localhost")
        (directory / "both.pem").write_bytes(certificate + key)
        self.trust = ssl.create_default_context(cadata=certificate.decode())
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(directory / "both.pem")

    def seal(self, client: socket.socket) -> ssl.SSLSocket:
        return self.context.wrap_socket(client, server_side=True)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return Tls(tmp_path_factory.mktemp("tls"))


def test_tls_is_begun_on_a_connection_that_spoke_plainly(run: Run, tls: Tls) -> None:
    def upgrades(client: socket.socket) -> None:
        client.sendall(client.recv(5))
        with tls.seal(client) as sealed:
            echo(sealed)

    async def ask() -> None:
        plain = await connect(port)
        await plain.write(b"plain", HANG)
        assert await plain.read(65536, HANG) == b"plain"
        stream = await plain.start_tls(tls.trust, "localhost", HANG)
        assert stream.get_extra_info("ssl_object").version() == "TLSv1.3"
        for word in (b"sealed", bytes(1 << 20)):
            await asyncio.gather(stream.write(word, HANG), read_exactly(stream, word))
        assert not stream.get_extra_info("is_readable")
        await stream.aclose()

    with served(upgrades) as port:
        run(ask())


async def read_exactly(stream: httpcore2.AsyncNetworkStream, expected: bytes) -> None:
    found = b""
    while len(found) < len(expected):
        found += await stream.read(65536, HANG)
    assert found == expected


@pytest.mark.parametrize("trusted", [True, False])
def test_another_name_or_another_issuer_is_an_error_of_the_connection(run: Run, tls: Tls, *, trusted: bool) -> None:
    async def ask() -> None:
        stream = await connect(port)
        context, name = (tls.trust, "other.example") if trusted else (ssl.create_default_context(), "localhost")
        with pytest.raises(httpcore2.ConnectError):
            await stream.start_tls(context, name, HANG)
        with pytest.raises(httpcore2.WriteError):
            await stream.write(b"secret", HANG)

    with served(lambda client: until_closed(tls.seal(client))) as port:
        run(ask())


def test_a_handshake_that_nobody_answers_is_a_timeout(run: Run, tls: Tls) -> None:
    async def ask() -> None:
        stream = await connect(port)
        with pytest.raises(httpcore2.ConnectTimeout):
            await stream.start_tls(tls.trust, "localhost", 0.1)

    with served(until_closed) as port:
        run(ask())


def test_a_handshake_that_is_hung_up_on_is_an_error_of_the_connection(run: Run, tls: Tls) -> None:
    async def ask() -> None:
        stream = await connect(port)
        with pytest.raises(httpcore2.ConnectError):
            await stream.start_tls(tls.trust, "localhost", HANG)

    with served(lambda client: client.recv(1)) as port:
        run(ask())


def test_words_before_the_handshake_are_never_taken_for_sealed_ones(run: Run, tls: Tls) -> None:
    def injects(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        until_closed(client)

    async def ask() -> None:
        stream = await connect(port)
        await asyncio.sleep(0.1)
        with pytest.raises(httpcore2.ConnectError):
            await stream.start_tls(tls.trust, "localhost", HANG)

    with served(injects) as port:
        run(ask())


def test_tls_goes_through_tls(run: Run, tls: Tls) -> None:
    """To an HTTPS proxy and, through it, to an address that ends TLS itself."""

    def doubly(client: socket.socket) -> None:
        with tls.seal(client) as outer:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            inner = tls.context.wrap_bio(incoming, outgoing, server_side=True)
            while not handshaken(inner):
                outer.sendall(outgoing.read())
                incoming.write(outer.recv(65536))
            outer.sendall(outgoing.read())
            data = b""
            while not data:
                with suppress(ssl.SSLWantReadError):
                    data = inner.read(65536)
                    continue
                incoming.write(outer.recv(65536))
            inner.write(data)
            outer.sendall(outgoing.read())

    def handshaken(inner: ssl.SSLObject) -> bool:
        try:
            inner.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    async def ask() -> None:
        outer = await (await connect(port)).start_tls(tls.trust, "localhost", HANG)
        inner = await outer.start_tls(tls.trust, "localhost", HANG)
        await inner.write(b"twice", HANG)
        assert await inner.read(65536, HANG) == b"twice"
        await inner.aclose()

    with served(doubly) as port:
        run(ask())


def test_what_came_before_a_record_that_does_not_open_is_given_out(run: Run, tls: Tls) -> None:
    spoilt = threading.Event()

    def spoils(client: socket.socket) -> None:
        with client.dup() as beneath, tls.seal(client) as sealed:
            sealed.sendall(b"good")
            beneath.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
            spoilt.set()
            until_closed(sealed)

    async def ask() -> None:
        stream = await (await connect(port)).start_tls(tls.trust, "localhost", HANG)
        assert spoilt.wait(HANG)  # no turn of the event loop since: both come at once
        assert await stream.read(65536, HANG) == b"good"
        with pytest.raises(httpcore2.ReadError):
            await stream.read(65536, HANG)
        await stream.aclose()

    with served(spoils) as port:
        run(ask())


@pytest.mark.parametrize("says_so", [True, False])
def test_the_end_of_tls_is_an_end_with_its_record_or_without(run: Run, tls: Tls, *, says_so: bool) -> None:
    """That an answer is whole is what its seal says."""

    def ends(client: socket.socket) -> None:
        sealed = tls.seal(client)
        sealed.sendall(b"all")
        if says_so:
            with suppress(OSError):
                sealed.unwrap()
        sealed.close()

    async def ask() -> None:
        stream = await (await connect(port)).start_tls(tls.trust, "localhost", HANG)
        assert await read_all(stream) == b"all"
        await stream.aclose()

    with served(ends) as port:
        run(ask())
