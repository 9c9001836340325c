import io
import json
import socket

import pytest
from tests.enclave.test_boot import BOOT
from tests.system.shell import free_port

from cloister.enclave.sgx import read_boot
from cloister.errors import ConnectionFailed, WrongUse


def lines(place: object, boot: bytes = BOOT.encode()) -> io.BytesIO:
    return io.BytesIO((place if isinstance(place, bytes) else json.dumps(place).encode()) + b"\n" + boot)


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_listens_where_the_first_line_says(host: str, family: int) -> None:
    port = free_port()
    boot = read_boot(lines({"host": host, "port": port}))
    with socket.socket(fileno=boot.listen_fd) as sock:
        assert (sock.family, sock.getsockname()[:2]) == (family, (host, port))
        with socket.create_connection((host, port)), sock.accept()[0]:
            pass
    assert (boot.launch, boot.model_path) == (BOOT.launch, BOOT.model_path)


@pytest.mark.parametrize(
    "place",
    [
        b"",
        b"{",
        b"[" * 1000,
        [],
        {"host": "127.0.0.1"},
        {"host": 1, "port": 1},
        {"host": "127.0.0.1", "port": 0},
        {"host": "127.0.0.1", "port": 65536},
        {"host": "127.0.0.1", "port": True},
        {"host": "127.0.0.1", "port": "80"},
    ],
)
def test_a_first_line_that_says_nothing_is_refused(place: object) -> None:
    with pytest.raises(WrongUse):
        read_boot(lines(place))


def test_a_boot_line_that_is_none_is_refused_before_anything_listens() -> None:
    port = free_port()
    with pytest.raises(WrongUse):
        read_boot(lines({"host": "127.0.0.1", "port": port}, b"{}"))
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_that_is_taken_is_for_another_start_to_mend() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConnectionFailed):
        read_boot(lines({"host": "127.0.0.1", "port": taken.getsockname()[1]}))
