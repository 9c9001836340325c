import importlib.util
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
import uvicorn
from tests.serving import ENDLESS, GET, HELD, LONG, SHORT, hold, overfill, serving, told

from cloister.patience import Patience
from cloister.proxy.serving import server

pytestmark = pytest.mark.anyio
Make = Callable[[Patience], uvicorn.Server]


async def app(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


async def echo(_scope: Any, receive: Any, send: Any) -> None:
    more, length = True, 0
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


@pytest.fixture(params=["httptools", "h11"], autouse=True)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`cloister[proxy]` alone has no httptools."""
    name: str = request.param
    if name == "h11":
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    return name


async def test_it_runs_with_the_parser_that_is_there(parser: str) -> None:
    running = server(app)
    running.config.load()
    assert any(parser in base.__module__ for base in running.config.http_protocol_class.__mro__)


@pytest.mark.parametrize("name", ENDLESS)
async def test_what_does_not_end_is_cut(name: str) -> None:
    async with serving(server(app, patience=LONG)) as port:
        assert (await overfill(port, name)).sent < 1 << 20


@pytest.mark.parametrize("name", HELD)
async def test_a_connection_is_not_held_for_ever(name: str) -> None:
    async with serving(server(app, patience=SHORT)) as port:
        await hold(port, name)


async def test_a_body_that_the_app_waits_for_may_not_trickle() -> None:
    async with serving(server(echo, patience=SHORT)) as port:
        assert (await hold(port, "a slow body")).answer == b""


async def test_a_slow_upload_that_goes_on_is_whole() -> None:
    patience = Patience(head_seconds=0.2, body_seconds=0.2, body_bytes=10)
    head = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 200\r\n\r\n"
    async with serving(server(echo, patience=patience)) as port:
        answer = (await told(port, [head, *[b"0123456789"] * 20], pause=0.03)).answer
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"200" in answer.partition(b"\r\n\r\n")[2]


async def test_requests_follow_each_other_on_one_connection() -> None:
    async with (
        serving(server(echo, patience=SHORT)) as port,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        for length in (0, 100, 300_000):
            assert (await client.post("/", content=b"a" * length)).text == str(length)


async def test_requests_sent_at_once_are_answered_in_turn() -> None:
    async with serving(server(app, patience=SHORT)) as port:
        answer = (await told(port, [(GET + b"\r\n") * 2 + GET + b"Connection: close\r\n\r\n"])).answer
    assert answer.count(b"HTTP/1.1 200") == 3
