"""Every HTTP server of ours against strangers: what all three share is tried on the enclave's."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import httpx2
import pytest
import uvicorn
from tests.serving import CHUNKED, ENDLESS, GET, HELD, LONG, SHORT, SOON, hold, overfill, serving, told

import cloister.host.serving
import cloister.proxy.serving
from cloister.enclave.serving import server

pytestmark = pytest.mark.anyio
Make: TypeAlias = Callable[..., uvicorn.Server]
SERVERS = [
    pytest.param(server, id="enclave"),
    pytest.param(cloister.host.serving.server, id="host"),
    pytest.param(cloister.proxy.serving.server, id="proxy"),
]


async def app(scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"{scope['scheme']} {scope['client']}".encode()})


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /"])
async def test_a_connection_whose_requests_head_does_not_come_is_closed(sent: bytes) -> None:
    async with serving(server(app, patience=SHORT)) as port:
        answer = (await told(port, [sent])).answer
    assert answer.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


@pytest.mark.parametrize("make", SERVERS)
@pytest.mark.parametrize("name", HELD)
async def test_a_connection_is_not_held_for_ever(make: Make, name: str) -> None:
    async with serving(make(app, patience=SHORT)) as port:
        answer = (await hold(port, name)).answer
    assert answer.count(b"HTTP/1.1 200") == HELD[name][0].count(b"\r\n\r\n")


@pytest.mark.parametrize("make", SERVERS)
@pytest.mark.parametrize("name", ENDLESS)
async def test_what_does_not_end_fills_no_memory(make: Make, name: str) -> None:
    """Cut after 64 KiB and what was under way; not by time."""
    async with serving(make(app, patience=LONG)) as port:
        assert (await overfill(port, name)).sent < 1 << 20


@pytest.mark.parametrize(("rest", "blank"), [(b"", b"\r\n"), (b"0\r\n\r\n", b"\r\n"), (b"0\r\n\r\n", b"")])
async def test_blank_lines_and_late_ends_after_an_answer_hold_nothing(rest: bytes, blank: bytes) -> None:
    """Each byte stops uvicorn's own timer."""
    start = CHUNKED if rest else GET + b"\r\n"
    async with serving(server(app, patience=SHORT)) as port:
        answer = (await told(port, itertools.chain([start, rest], itertools.repeat(blank)), pause=0.02)).answer
    assert answer.count(b"HTTP/1.1 200") == 1


async def test_a_head_just_small_enough_is_answered_and_one_byte_more_is_refused() -> None:
    start = b"GET / HTTP/1.1\r\nConnection: close\r\nA: "
    most = LONG.head_bytes - len(b"/") - len(b"Connectionclose") - len(b"A") - 2 * 32
    async with serving(server(app, patience=LONG)) as port:
        assert (await told(port, [start + b"a" * most + b"\r\n\r\n"])).answer.startswith(b"HTTP/1.1 200")
        assert (await told(port, [start + b"a" * most + b"a\r\n\r\n"])).answer.startswith(b"HTTP/1.1 400")


async def test_an_idle_connection_is_closed_as_before() -> None:
    front = server(app, patience=LONG)
    front.config.timeout_keep_alive = 0
    async with serving(front) as port:
        assert (await told(port, [GET + b"\r\n"])).answer.startswith(b"HTTP/1.1 200")


class Reading:
    """Waits, reads all, waits, and says in pieces how long it was."""

    def __init__(self, *, before: float = 0.0, after: float = 0.0, pieces: int = 1, between: float = 0.0) -> None:
        self.before, self.after, self.pieces, self.between = before, after, pieces, between

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(self.before)
        more, length = True, 0
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            length += len(message.get("body", b""))
            more = message.get("more_body", False)
        await asyncio.sleep(self.after)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(self.pieces):
            await asyncio.sleep(self.between)
            await send({"type": "http.response.body", "body": f"[{length}]".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


POST = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
LARGE = b"Content-Length: 400000\r\n\r\n"


async def test_a_slow_upload_that_goes_on_is_whole() -> None:
    patience = replace(SHORT, body_bytes=10)
    async with serving(server(Reading(), patience=patience)) as port:
        head = POST + b"Content-Length: 200\r\n\r\n"
        answer = (await told(port, [head, *[b"0123456789"] * 20], pause=0.03)).answer
    assert b"[200]" in answer


async def test_an_upload_that_the_app_is_slow_to_read_is_whole() -> None:
    async with serving(server(Reading(before=0.7), patience=SHORT)) as port:
        answer = (await told(port, [POST + LARGE, b"a" * 400_000])).answer
    assert b"[400000]" in answer


async def test_who_waits_to_be_told_to_go_on_is_not_late() -> None:
    async with serving(server(Reading(before=0.7), patience=SHORT)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        async with asyncio.timeout(SOON):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"abc")
            assert b"[3]" in await reader.read()
        writer.close()


@pytest.mark.parametrize("slow", [Reading(after=0.7), Reading(pieces=14, between=0.05)])
async def test_an_answer_takes_the_time_it_takes(slow: Reading) -> None:
    async with serving(server(slow, patience=SHORT)) as port:
        answer = (await told(port, [POST + b"Content-Length: 3\r\n\r\nabc"])).answer
    assert answer.count(b"[3]") == slow.pieces
    assert answer.endswith(b"0\r\n\r\n")


async def test_requests_sent_at_once_are_answered_in_turn_however_long_it_takes() -> None:
    async with serving(server(Reading(after=0.3), patience=SHORT)) as port:
        three = POST.replace(b"close", b"keep-alive") + b"Content-Length: %d\r\n\r\n%b"
        last = POST + b"Content-Length: 3\r\n\r\nabc"
        answer = (await told(port, [three % (1, b"a") + three % (2, b"ab") + last])).answer
    assert [answer.count(b"[%d]" % length) for length in (1, 2, 3)] == [1, 1, 1]
    assert answer.index(b"[1]") < answer.index(b"[2]") < answer.index(b"[3]")


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_an_upgrade_that_nobody_offers_is_a_request_like_others(method: str) -> None:
    upgrade = b"Host: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    async with serving(server(app, patience=SHORT)) as port:
        answer = (await told(port, [b"%b / HTTP/1.1\r\n" % method.encode() + upgrade, b"G"], pause=0.05)).answer
    assert answer.startswith(b"HTTP/1.1 200")


async def test_a_body_that_the_app_waits_for_may_not_trickle() -> None:
    async with serving(server(Reading(), patience=SHORT)) as port:
        assert (await hold(port, "a slow body")).answer == b""


async def test_requests_follow_each_other_on_one_connection() -> None:
    async with (
        serving(server(Reading(), patience=SHORT)) as port,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        for length in (0, 100, 300_000):
            assert (await client.post("/", content=b"a" * length)).text == f"[{length}]"
