"""The WSGI adapter, held against the standard library's own validator."""

import asyncio
import sys
import threading
from typing import Any
from wsgiref.validate import validator

import pytest
from tests.enclave.pyapp.archives import ask

from cloister.enclave.pyapp.wsgi import Wsgi

pytestmark = pytest.mark.anyio


async def test_keeps_pep_3333_by_the_validators_judgement() -> None:
    seen: dict[str, Any] = {}

    @validator
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.update(environ)
        seen["body"] = environ["wsgi.input"].read(100)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"a", b"b"]

    headers = [(b"content-type", b"text/x"), (b"content-length", b"4"), (b"x-one", b"1"), (b"x-one", b"2")]
    app_ = Wsgi(app)
    status, fields, parts = await ask(app_, "/ä", method="POST", body=b"body", headers=headers, query=b"q=%20")
    assert (status, fields, parts) == (200, [(b"Content-Type", b"text/plain")], [b"a", b"b"])
    assert seen["PATH_INFO"] == "/ä".encode().decode("latin-1")
    assert (seen["CONTENT_TYPE"], seen["CONTENT_LENGTH"], seen["HTTP_X_ONE"]) == ("text/x", "4", "1,2")
    assert (seen["QUERY_STRING"], seen["body"], seen["REMOTE_ADDR"]) == ("q=%20", b"body", "")


async def test_write_and_parts_come_in_their_order() -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        write = start_response("202 Accepted", [])
        write(b"first")
        return [b"", b"second"]

    assert await ask(Wsgi(app)) == (202, [], [b"first", b"second"])


async def test_the_iterable_is_closed_though_it_fails() -> None:
    closed = threading.Event()

    class Parts:
        def __iter__(self) -> Any:
            yield b"a"
            raise ValueError

        def close(self) -> None:
            closed.set()

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [])
        return Parts()

    with pytest.raises(ValueError):
        await ask(Wsgi(app))
    assert closed.is_set()


async def test_a_head_can_be_replaced_before_it_left_and_not_after() -> None:
    def early(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        try:
            raise KeyError
        except KeyError:
            start_response("500 Oh", [], sys.exc_info())
        return [b"sorry"]

    def late(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])(b"begun")
        try:
            raise KeyError
        except KeyError:
            start_response("500 Oh", [], sys.exc_info())
        return []

    assert (await ask(Wsgi(early)))[0] == 500
    with pytest.raises(KeyError):
        await ask(Wsgi(late))


async def test_a_reader_that_does_not_read_keeps_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.enclave.pyapp.wsgi._SEND_SECONDS", 0.05)
    closed = threading.Event()

    class Parts(list[bytes]):
        def close(self) -> None:
            closed.set()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return Parts([b"part"])

    one = Wsgi(app, threads=1)

    async def stuck(_scope: Any, receive: Any, _send: Any) -> None:
        async def send(_message: Any) -> None:
            await asyncio.Event().wait()

        await one(_scope, receive, send)

    async with asyncio.timeout(20):
        with pytest.raises(TimeoutError):
            await ask(stuck)
        assert closed.is_set()
        assert (await ask(one))[2] == [b"part"]


async def test_a_large_answer_has_its_time_piece_by_piece() -> None:
    whole = bytes(range(256)) * 1000

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [whole]

    parts = (await ask(Wsgi(app)))[2]
    assert b"".join(parts) == whole
    assert max(map(len, parts)) == 1 << 16


async def test_an_app_that_never_starts_a_response_fails() -> None:
    with pytest.raises(AssertionError):
        await ask(Wsgi(lambda environ, start_response: [b"body"]))
