import os
import socket
import sys
from pathlib import Path

import pytest

from cloister.proxy.guard import Guard, Refusal, peer_uid

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")


def test_the_kernel_says_whose_connection_it_is() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as client:
        near, far = client.getsockname(), listener.getsockname()
        assert peer_uid(near, far) == os.getuid()
        assert peer_uid((near[0], near[1] ^ 1), far) is None


def test_reads_the_kernels_table_of_version_6_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a row as Linux writes it on a little-endian machine: a test machine may have no ::1."""
    head = "  sl  local_address remote_address st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
    one = "00000000000000000000000001000000"
    row = f"   0: {one}:9C40 {one}:1F90 01 00000000:00000000 00:00000000 00000000  1234        0 5 1\n"
    (tmp_path / "tcp").write_text(head)
    (tmp_path / "tcp6").write_text(head + row)
    monkeypatch.setattr("cloister.proxy.guard._TABLES", (tmp_path / "tcp", tmp_path / "tcp6"))
    assert peer_uid(("::1", 40000), ("::1", 8080)) == 1234
    assert peer_uid(("::1", 40001), ("::1", 8080)) is None
    assert peer_uid(("127.0.0.1", 40000), ("127.0.0.1", 8080)) is None


def test_asks_once_for_each_connection_and_again_for_the_next_on_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = iter([os.getuid(), os.getuid() + 1])
    monkeypatch.setattr("cloister.proxy.guard.peer_uid", lambda client, server: next(owners))
    guard = Guard(1234)

    def asks(client: tuple[str, int]) -> bool:
        scope = {
            "method": "GET",
            "headers": [(b"host", b"127.0.0.1:1234")],
            "client": client,
            "server": ("127.0.0.1", 1),
        }
        return guard.refusal(scope) is None

    first = ("127.0.0.1", int("40000"))
    second = ("127.0.0.1", int("40000"))
    assert [asks(first), asks(first), asks(second)] == [True, True, False]


def test_a_connection_without_addresses_is_nobody_s() -> None:
    assert peer_uid(None, ("127.0.0.1", 1)) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"host", b"evil.example"),
        (b"origin", b"http://evil.example"),
        (b"sec-fetch-site", b"cross-site"),
        (b"sec-fetch-mode", b"no-cors"),
        (b"content-type", b"text/plain"),
        (b"content-length", b"0"),
    ],
)
def test_a_header_that_stands_twice_is_refused_whichever_would_count(
    name: bytes, value: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.proxy.guard.peer_uid", lambda client, server: os.getuid())
    good = [
        (b"host", b"127.0.0.1:1234"),
        (b"origin", b"http://127.0.0.1:1234"),
        (b"sec-fetch-site", b"same-origin"),
        (b"sec-fetch-mode", b"cors"),
        (b"content-type", b"application/json"),
        (b"content-length", b"2"),
    ]

    def refusal(headers: list[tuple[bytes, bytes]]) -> Refusal | None:
        scope = {"method": "POST", "headers": headers, "client": ("127.0.0.1", 40000), "server": ("127.0.0.1", 1)}
        return Guard(1234).refusal(scope)

    assert refusal(good) is None
    for headers in ([(name, value), *good], [*good, (name, value)]):
        refused = refusal(headers)
        assert refused is not None
        assert (refused.status, refused.code) == (400, "header_twice")
