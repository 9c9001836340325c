import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.client.deployment import Served

from cloister.errors import WrongUse
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


ASKS = """
import encodings.idna, http.client, json, os, sys
user, port = map(int, sys.argv[1:])
if user != os.getuid():
    os.setgroups([]), os.setgid(user), os.setuid(user)
proxy = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
proxy.request("GET", "/")
answer = proxy.getresponse()
print(json.dumps([os.getuid(), answer.status, json.load(answer)]))
"""
NOBODY = 65534


def answer_to(user: int, proxy: Served) -> tuple[int, str]:
    """Status, and the code of a refusal, as a process of this user's sees them."""
    command = [sys.executable, "-I", "-c", ASKS, str(user), str(proxy.port)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    asked, status, told = json.loads(ran.stdout)
    assert asked == user
    return status, told.get("error", {}).get("code", "")


def test_a_process_of_another_user_is_refused_and_ones_own_is_served(
    proxy: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root starts processes of other users; without root there are none, and the proxy is made to believe that it is one."""
    me = os.getuid()
    proxys_askers_served = [(me, me, True), (me + 1, me, False)]
    if me == 0:
        proxys_askers_served = [(0, 0, True), (0, NOBODY, False), (NOBODY, NOBODY, True), (NOBODY, NOBODY - 1, False)]
    for owner, asker, served in proxys_askers_served:
        monkeypatch.setattr("cloister.proxy.guard.os.getuid", partial(int, owner))
        assert answer_to(asker, proxy) == ((200, "") if served else (403, "other_user")), (owner, asker)


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


KEY = "k" * 43


def asked(guard: Guard, *headers: tuple[bytes, bytes], known: bool = False, app_host: str = "", host: str = "") -> Any:
    """What a GET is refused with, whose connection no kernel was asked about; or None."""
    named = (b"host", (host or "127.0.0.1:1234").encode())
    scope = {"method": "GET", "headers": [named, *headers], "client": None, "server": None}
    refused = guard.refusal(scope, app_host, known=known)
    return refused and (refused.status, refused.code)


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_elsewhere_than_on_linux_there_is_no_proxy_without_a_key(platform: str) -> None:
    with pytest.raises(WrongUse) as caught:
        Guard(1234, platform=platform)
    assert "own_key" in caught.value.hint
    guard = Guard(1234, key=KEY, platform=platform)
    assert asked(guard) == (401, "proxy_key")
    assert asked(guard, (b"x-api-key", KEY.encode())) is None


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        (b"authorization", b"Bearer " + KEY.encode(), True),
        (b"authorization", b"bearer " + KEY.encode(), True),
        (b"x-api-key", KEY.encode(), True),
        (b"authorization", KEY.encode(), False),
        (b"authorization", b"Basic " + KEY.encode(), False),
        (b"authorization", b"Bearer " + KEY.encode()[:-1], False),
        (b"authorization", b"Bearer ", False),
        (b"x-api-key", b"", False),
        (b"x-api-key", b"\xff" * 43, False),
        (b"x-key", KEY.encode(), False),
        (b"cookie", KEY.encode(), False),
    ],
)
def test_a_key_is_shown_as_an_api_key_and_in_no_other_way(name: bytes, value: bytes, shown: bool) -> None:
    assert (asked(Guard(1234, key=KEY, platform="darwin"), (name, value)) is None) == shown


def test_beside_another_key_it_counts_too_and_is_the_only_one_taken_out() -> None:
    guard = Guard(1234, key=KEY, platform="darwin")
    theirs, ours = (b"authorization", b"Bearer ck-enclaves"), (b"x-api-key", KEY.encode())
    assert asked(guard, theirs, ours) is None
    kept = guard.without_key({"headers": [theirs, ours], "path": "/v1/models"})
    assert kept == {"headers": [theirs], "path": "/v1/models"}
    none = Guard(1234, platform="linux").without_key({"headers": [theirs, (b"x-api-key", b"")]})
    assert none == {"headers": [theirs, (b"x-api-key", b"")]}


def test_a_key_opens_nothing_to_a_foreign_page_or_name() -> None:
    guard = Guard(1234, key=KEY, platform="darwin")
    shown = (b"x-api-key", KEY.encode())
    assert asked(guard, shown, host="evil.example") == (421, "wrong_host")
    assert asked(guard, shown, (b"sec-fetch-site", b"cross-site")) == (403, "foreign_page")


@pytest.mark.parametrize(("port", "refusal"), [(80, None), (1234, (421, "wrong_host"))])
def test_a_name_without_a_port_is_that_of_port_80(port: int, refusal: tuple[int, str] | None) -> None:
    guard = Guard(port, key=KEY, platform="darwin")
    assert asked(guard, (b"x-api-key", KEY.encode()), (b"origin", b"http://localhost"), host="localhost") == refusal
    assert asked(guard, app_host=f"abc.localhost:{port}", host="ABC.localhost") == refusal
    assert asked(guard, app_host=f"abc.localhost:{port}", host="abd.localhost") == (421, "wrong_host")


def test_who_is_known_or_knows_the_apps_name_needs_no_key() -> None:
    guard = Guard(1234, key=KEY, platform="darwin")
    assert asked(guard, known=True) is None
    assert asked(guard, app_host="abc.localhost:1234", host="abc.localhost:1234") is None
    assert asked(guard, app_host="abc.localhost:1234") == (401, "proxy_key")
    assert asked(guard, app_host="abc.localhost:1234", host="abd.localhost:1234") == (421, "wrong_host")


def test_on_linux_a_key_does_not_let_another_user_in(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(1234, key=KEY, platform="linux")
    monkeypatch.setattr("cloister.proxy.guard.peer_uid", lambda client, server: os.getuid() + 1)
    scope = {
        "method": "GET",
        "headers": [(b"host", b"127.0.0.1:1234"), (b"x-api-key", KEY.encode())],
        "client": ("127.0.0.1", 40000),
        "server": ("127.0.0.1", 1234),
    }
    refused = guard.refusal(scope)
    assert refused is not None
    assert refused.code == "other_user"
    monkeypatch.setattr("cloister.proxy.guard.peer_uid", lambda client, server: os.getuid())
    assert guard.refusal(scope) is None
    assert guard.refusal({**scope, "headers": scope["headers"][:1]}) is not None
