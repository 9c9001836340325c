import socket

import pytest

from cloister.enclave.gateway.plaintext import demand_loopback, is_local
from cloister.errors import WrongUse


def asked(host: str = "127.0.0.1:8484", client: str = "127.0.0.1", *origins: str) -> dict[str, object]:
    headers = [(b"host", host.encode()), *((b"origin", origin.encode()) for origin in origins)]
    return {"client": (client, 40_000), "headers": headers}


@pytest.mark.parametrize(
    "scope",
    [
        asked(),
        asked("localhost"),
        asked("[::1]:8484", "::1"),
        asked("127.0.0.1:8484", "127.0.0.1", "http://localhost:3000"),
    ],
)
def test_programs_of_this_machine_are_local(scope: dict[str, object]) -> None:
    assert is_local(scope)


@pytest.mark.parametrize(
    "scope",
    [
        asked("evil.example"),
        asked("127.0.0.1.evil.example:8484"),
        asked("127.0.0.1@evil.example"),
        asked("[::1"),
        asked("\u0661"),
        asked(""),
        asked("127.0.0.1:8484", "10.0.0.7"),
        asked("127.0.0.1:8484", "nobody"),
        asked("127.0.0.1:8484", "127.0.0.1", "https://evil.example"),
        asked("127.0.0.1:8484", "127.0.0.1", "http://localhost", "https://evil.example"),
        asked("127.0.0.1:8484", "127.0.0.1", "null"),
        {**asked(), "client": None},
        {**asked(), "headers": []},
        {**asked(), "headers": [(b"host", b"localhost"), (b"host", b"evil.example")]},
    ],
)
def test_others_and_web_pages_are_not(scope: dict[str, object]) -> None:
    assert not is_local(scope)


def test_a_socket_that_others_reach_is_refused() -> None:
    with socket.create_server(("0.0.0.0", 0)) as everywhere, pytest.raises(WrongUse, match="loopback"):
        demand_loopback(everywhere)
    with socket.create_server(("127.0.0.1", 0)) as local:
        demand_loopback(local)
