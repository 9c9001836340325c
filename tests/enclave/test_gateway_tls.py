"""What of a request by TLS reaches the app inside, and what of its answer comes back."""

import asyncio
import time
from typing import Any

import httpx2
import pytest

from cloister.channel.limits import Limits
from cloister.enclave.gateway.tls import Unsealed
from cloister.errors import EngineDied

pytestmark = pytest.mark.anyio


async def told(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    await send(
        {"type": "http.response.start", "status": 201, "headers": [(b"X-Kind", b"a"), (b"Connection", b"close")]}
    )
    await send({"type": "http.response.body", "body": repr({**scope, "body": body}).encode()})


def client(app: Any, **options: Any) -> httpx2.AsyncClient:
    unsealed: Any = Unsealed(app, **options)
    transport = httpx2.ASGITransport(unsealed, client=("192.0.2.7", 4000), raise_app_exceptions=True)
    return httpx2.AsyncClient(transport=transport, base_url="https://localhost:8443")


async def test_the_app_gets_the_request_without_the_address_of_who_asks() -> None:
    async with client(told) as http:
        headers = {"X-Api-Key": "k", "Connection": "close", "Transfer-Encoding": "chunked", "Expect": "100-continue"}
        answer = await http.post("/a%20b?q=1", content=b"hello", headers=headers)
    scope: dict[str, Any] = eval(answer.text)  # our own words
    assert answer.status_code == 201
    assert answer.headers["x-kind"] == "a"
    assert "connection" not in answer.headers
    assert (scope["method"], scope["path"], scope["raw_path"]) == ("POST", "/a b", b"/a%20b")
    assert (scope["query_string"], scope["body"], scope["scheme"]) == (b"q=1", b"hello", "https")
    assert scope["client"] is None
    sent = dict(scope["headers"])
    assert (sent[b"host"], sent[b"x-api-key"], sent[b"content-length"]) == (b"localhost:8443", b"k", b"5")
    assert not {b"connection", b"transfer-encoding", b"expect"} & set(sent)


async def test_nothing_is_padded_and_each_part_leaves_as_it_comes() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for part in (b"data: a\n\n", b"data: b\n\n"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async with client(app) as http:
        assert (await http.get("/")).content == b"data: a\n\ndata: b\n\n"


async def test_an_app_that_fails_is_told_of_without_its_words() -> None:
    async def app(*_: Any) -> None:
        raise ValueError("what was asked")

    async with client(app) as http:
        answer = await http.get("/")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "what was asked" not in answer.text


async def test_an_answer_that_breaks_off_breaks_the_connection_off() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: a\n\n", "more_body": True})
        await asyncio.sleep(0)
        raise ValueError("what was asked")

    with pytest.raises(EngineDied) as caught:
        async with client(app) as http:
            await http.get("/")
    assert "asked" not in f"{caught.value}{caught.value.__cause__}{caught.value.__context__}"


async def test_a_body_over_the_limit_is_refused_before_the_app_runs() -> None:
    async def app(*_: Any) -> None:
        raise AssertionError

    async with client(app, limits=Limits(request_bytes=1000)) as http:
        assert (await http.post("/", content=bytes(1001))).status_code == 413
    async with client(told, limits=Limits(request_bytes=1000)) as http:
        assert (await http.post("/", content=bytes(1000))).status_code == 201


async def test_an_app_whose_asker_has_gone_is_ended() -> None:
    ended = asyncio.Event()
    running = asyncio.Event()

    async def app(*_: Any) -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await running.wait()
        return {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        raise AssertionError

    scope = {"type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b"", "headers": []}
    async with asyncio.timeout(10):
        await Unsealed(app, clock=time.time)(scope, receive, send)
    assert ended.is_set()


async def test_web_sockets_are_refused() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await Unsealed(told)({"type": "websocket"}, None, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_bytes_that_no_url_has_reach_the_app_escaped_once() -> None:
    targets: list[Any] = []

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        targets.append((scope["raw_path"], scope["query_string"], scope["path"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        return await asyncio.Event().wait()

    async def send(_message: Any) -> None:
        pass

    target = {"raw_path": b"/\xc3\xa4%20b", "query_string": b"q=\xe9&r=%41"}
    async with asyncio.timeout(10):
        await Unsealed(app)({"type": "http", "method": "GET", "path": "", "headers": [], **target}, receive, send)
    assert targets == [(b"/%C3%A4%20b", b"q=%E9&r=%41", "/ä b")]
