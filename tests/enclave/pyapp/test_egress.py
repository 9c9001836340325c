"""Where a confined app may connect to, and that it connects nowhere else."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.enclave.pyapp.archives import ask, python_app

from cloister.enclave.pyapp.app import can_confine
from cloister.enclave.pyapp.egress import Connection, Egress, Target, _break_off, dial, may_reach, parse_targets
from cloister.errors import WrongUse

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """The enclave's own loop."""
    return "asyncio", {"use_uvloop": True}


API = Target("api.example.com", 443, "127.0.0.2")
PRIVATE = Target("10.0.0.5", 5432, "10.0.0.5")


def test_each_host_has_an_address_of_its_own_and_each_port_a_listener() -> None:
    declared = (
        "api.example.com",
        "db.example.com:5432",
        "api.example.com:8443",
        "10.0.0.5:5432",
        "api.example.com:443",
    )
    assert parse_targets(declared) == (
        API,
        Target("db.example.com", 5432, "127.0.0.3"),
        Target("api.example.com", 8443, "127.0.0.2"),
        PRIVATE,
    )


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "https://api.example.com",
        "API.example.com",
        "api.example.com:",
        "api.example.com:0",
        "api.example.com:65536",
        "api.example.com.",
        "*.example.com",
        "api.example.com 127.0.0.1",
        "api.example.com\n127.0.0.1 localhost",
        "user@api.example.com",
        "[::1]:443",
        "127.0.0.1:5432",
        "169.254.169.254:80",
        "0.0.0.0",
        "224.0.0.1",
    ],
)
def test_what_is_no_host_or_leads_back_into_the_machine_is_refused(entry: str) -> None:
    with pytest.raises(WrongUse):
        parse_targets([entry])


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07::1", "::ffff:93.184.215.14"])
def test_a_name_may_lead_to_public_addresses(address: str) -> None:
    assert may_reach(API, address)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "10.0.0.5",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
        ),
        *("224.0.0.1", "255.255.255.255", "240.0.0.1", "::", "::1", "fe80::1%eth0", "fd00::1", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.5", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("fec0::2", "64:ff9b:1::a00:1", "::127.0.0.1", "::ffff:0:10.0.0.1"),
    ],
)
def test_a_name_may_not_lead_into_the_machine_or_beside_it(address: str) -> None:
    assert not may_reach(API, address)


def test_a_declared_address_is_reached_itself_and_no_other() -> None:
    assert may_reach(PRIVATE, "10.0.0.5")
    assert not may_reach(PRIVATE, "10.0.0.6")


@asynccontextmanager
async def server(answer: bytes) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.read()
        writer.write(answer + asked)
        await writer.drain()
        writer.close()

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield running.sockets[0].getsockname()[1]
    running.close()


def resolved(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    async def getaddrinfo(_host: object, port: int, **_: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize("name", ["localhost", "rebound.example", "127.1", "2130706433"])
async def test_a_name_that_leads_into_the_enclave_is_not_followed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    async with server(b"secret ") as port:
        if "example" in name:
            resolved(monkeypatch, "127.0.0.1")
        with pytest.raises(OSError, match="no address that may be reached"):
            await dial(Target(name, port, "127.0.0.2"))


async def test_the_address_that_was_checked_is_the_one_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is not looked up a second time, where it could lead elsewhere."""
    asked: list[Any] = []

    async def connect(host: str, port: int) -> Connection:
        asked.append((host, port))
        raise ConnectionRefusedError

    resolved(monkeypatch, "127.0.0.1", "93.184.215.14")
    monkeypatch.setattr(asyncio, "open_connection", connect)
    with pytest.raises(OSError):
        await dial(API)
    assert asked == [("93.184.215.14", 443)]


@asynccontextmanager
async def relayed(port: int, targets: Sequence[Target] = (API,)) -> AsyncIterator[tuple[list[int], list[Target]]]:
    """The listeners' ports, and whom they dialled: in truth a server on this machine's loopback; 0: nobody."""
    dialled: list[Target] = []

    async def to_server(target: Target) -> Connection:
        dialled.append(target)
        if not port:
            raise ConnectionRefusedError
        return await asyncio.open_connection("127.0.0.1", port)

    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in targets]
    ports = [listener.getsockname()[1] for listener in listeners]
    egress = Egress(to_server)
    await egress.serve(targets, listeners)
    try:
        yield ports, dialled
    finally:
        await egress.close()


async def test_what_is_said_passes_both_ways_whole_and_so_does_its_end() -> None:
    said = bytes(range(256)) * 10_000
    async with server(b"heard ") as port, relayed(port) as ((listener,), dialled):
        reader, writer = await asyncio.open_connection("127.0.0.1", listener)
        writer.write(said)
        writer.write_eof()
        async with asyncio.timeout(20):
            assert await reader.read() == b"heard " + said
        writer.close()
    assert dialled == [API]


async def test_each_listener_leads_to_its_own_target() -> None:
    async with server(b"") as port, relayed(port, (API, PRIVATE)) as (ports, dialled):
        for listener in reversed(ports):
            reader, writer = await asyncio.open_connection("127.0.0.1", listener)
            writer.write_eof()
            await reader.read()
            writer.close()
    assert dialled == [PRIVATE, API]


async def test_a_host_that_is_not_there_breaks_the_connection_off() -> None:
    async with relayed(0) as ((listener,), _):
        reader, writer = await asyncio.open_connection("127.0.0.1", listener)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


async def test_a_reset_on_one_side_is_one_on_the_other() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        _break_off(writer)

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with relayed(running.sockets[0].getsockname()[1]) as ((listener,), _):
        reader, writer = await asyncio.open_connection("127.0.0.1", listener)
        writer.write(b"x")
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
    running.close()


async def test_closing_ends_what_runs() -> None:
    async with server(b"") as port:
        async with relayed(port) as ((listener,), dialled):
            reader, writer = await asyncio.open_connection("127.0.0.1", listener)
            writer.write(b"x")
            while not dialled:  # noqa: ASYNC110 (the relay's own task)
                await asyncio.sleep(0.001)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


# A real app, confined

ASKING = """
import json, socket
def tried(host, port):
    try:
        with socket.create_connection((host, port), 5) as sock:
            sock.sendall(b"hello")
            sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(4096), b"")).decode()
    except OSError as error:
        return type(error).__name__
AT_START = tried("api.example.com", 443) if EARLY else ""
def app(environ, start_response):
    found = {f"{host}:{port}": tried(host, port) for host, port in HOSTS}
    start_response("200 OK", [])
    return [json.dumps({**found, "at start": AT_START}).encode()]
"""


async def asked(hosts: Sequence[tuple[str, int]], egress: tuple[str, ...], *, early: bool = False) -> tuple[Any, Any]:
    """What each attempt of a confined app's came to, and whom the front went to."""
    if not await can_confine():
        pytest.fail("these tests need namespaces: root, or user namespaces")
    dialled: list[str] = []
    async with server(b"heard ") as port:

        async def to_server(target: Target) -> Connection:
            dialled.append(f"{target.host}:{target.port}")
            return await asyncio.open_connection("127.0.0.1", port)

        code = ASKING.replace("HOSTS", repr(list(hosts))).replace("EARLY", repr(early))
        app = python_app(code, kind="wsgi", confined=True, egress=egress, dial=to_server)
        await app.start()
        try:
            found = json.loads(b"".join((await ask(app))[2]))
        finally:
            await app.close()
    return found, dialled


async def test_an_app_reaches_what_it_declared_by_name_and_port_and_nothing_else() -> None:
    reached = [("api.example.com", 443), ("API.Example.com", 443), ("db.example.com", 5432), ("10.0.0.5", 5432)]
    refused = [
        ("api.example.com", 80),
        ("db.example.com", 443),
        ("10.0.0.5", 443),
        ("10.0.0.6", 5432),
        ("api.example.com.evil.example", 443),
        ("evil.example", 443),
        ("93.184.215.14", 443),
        ("127.0.0.1", 443),
        ("169.254.169.254", 80),
        ("::ffff:93.184.215.14", 443),
    ]
    egress = ("api.example.com", "db.example.com:5432", "10.0.0.5:5432")
    async with server(b"heard ") as port:  # of this machine, as the engine or another app would be
        refused.append(("127.0.0.1", port))
        found, dialled = await asked([*reached, *refused], egress)
    assert {found[f"{host}:{at}"] for host, at in reached} == {"heard hello"}
    assert {f"{host}:{at}" for host, at in refused if found[f"{host}:{at}"] == "heard hello"} == set()
    assert dialled == ["api.example.com:443", "api.example.com:443", "db.example.com:5432", "10.0.0.5:5432"]


async def test_it_may_connect_before_it_is_ready() -> None:
    found, dialled = await asked([], ("api.example.com",), early=True)
    assert found["at start"] == "heard hello"
    assert dialled == ["api.example.com:443"]


async def test_it_may_say_good_bye_when_it_ends() -> None:
    if not await can_confine():
        pytest.fail("these tests need namespaces: root, or user namespaces")
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read())
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    code = """
import socket
async def app(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    with socket.create_connection(("api.example.com", 443), 5) as sock:
        sock.sendall(b"good bye")
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
    await send({"type": "lifespan.shutdown.complete"})
"""
    app = python_app(
        code, confined=True, egress=("api.example.com",), dial=lambda _: asyncio.open_connection("127.0.0.1", port)
    )
    await app.start()
    await app.close()
    listening.close()
    assert heard == [b"good bye"]


async def test_an_app_that_declares_no_host_is_not_started_with_one_that_is_none() -> None:
    with pytest.raises(WrongUse, match="names no host"):
        await python_app("def app(*a): pass", kind="wsgi", confined=True, egress=("*",)).start()
