"""Receipts at the gateway: asked for inside, over exactly what the client gets, delivered in band."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.channel.bhttp import Request, ResponseEnd
from cloister.channel.keys import KeyRing
from cloister.channel.ohttp import seal_to
from cloister.channel.padding import EVENT_MULTIPLE
from cloister.enclave.gateway import Gateway
from cloister.enclave.gateway.receipts import ASKED, PendingReceipt, asked_for
from cloister.errors import EngineDied
from cloister.evidence.receipt import find_comment, open_receipt, parse_delivered, salted

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]
KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw()
STATEMENT, MODEL = "ab" * 32, "cd" * 32


def begin(request: Request) -> PendingReceipt | None:
    if asked_for(request.headers) != STATEMENT:
        return None
    return PendingReceipt(
        request.content, bytes(range(32)), statement_sha256=STATEMENT, models=(MODEL,), iat=7, sign=KEY.sign
    )


def answers(media_type: bytes, *pieces: bytes, ends: bool = True) -> App:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", media_type)]})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if not ends:
            raise RuntimeError
        await send({"type": "http.response.body"})

    return app


def ask(app: App, *asked: bytes, padding: bool = True) -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    """The answer's content and trailers."""
    ring = KeyRing(0.0)

    async def attest(nonce: bytes) -> bytes:
        raise NotImplementedError

    gateway = Gateway(app, ring, attest, receipt=begin, padding=padding, clock=lambda: 0.0)
    fields = tuple((ASKED, value) for value in asked)
    sealed = seal_to(ring.ohttp_keys, Request("POST", "https", "enclave.invalid", "/v1/x", fields, b"question"))
    parts = [{"type": "http.request", "body": sealed.body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return parts.pop() if parts else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    path = "/.well-known/ohttp-gateway"
    headers = [(b"content-type", b"message/ohttp-chunked-req")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    asyncio.run(gateway(scope, receive, send))
    events = sealed.response.feed(b"".join(message["body"] for message in sent[1:]))
    sealed.response.finish()
    end = events[-1]
    assert isinstance(end, ResponseEnd)
    return b"".join(event for event in events if isinstance(event, bytes)), end.trailers


@pytest.mark.parametrize("padding", [True, False])
def test_a_whole_answers_receipt_is_in_its_trailers(*, padding: bool) -> None:
    content, trailers = ask(answers(b"application/json", b"x" * 40_000, b"{}"), STATEMENT.encode(), padding=padding)
    found = dict(trailers)
    delivered = parse_delivered(f"{found[b'cloister-receipt'].decode()} {found[b'cloister-receipt-salt'].decode()}")
    receipt = open_receipt(delivered.jws, PUBLIC)
    assert content == b"x" * 40_000 + b"{}"
    assert receipt.response_sha256 == salted(delivered.salt, content)
    assert receipt.request_sha256 == salted(delivered.salt, b"question")
    assert (receipt.models, receipt.statement_sha256, receipt.iat) == ((MODEL,), STATEMENT, 7)


@pytest.mark.parametrize("padding", [True, False])
def test_a_streams_receipt_is_its_last_comment_and_covers_all_before_it(*, padding: bool) -> None:
    app = answers(b"text/event-stream", b"data: one\n\n", b"data: two\n\ndata: [DONE]\n\n")
    whole, trailers = ask(app, STATEMENT.encode(), padding=padding)
    content, delivered = find_comment(whole)
    receipt = open_receipt(delivered.jws, PUBLIC)
    assert receipt.response_sha256 == salted(delivered.salt, content)
    assert content.count(b"data: ") == 3
    assert b"data:" not in whole[len(content) :]
    assert trailers == ()
    if padding:
        assert len(content) % EVENT_MULTIPLE == len(whole) % EVENT_MULTIPLE == 0


@pytest.mark.parametrize("asked", [(), (b"?1",), (b"ee" * 32,), (STATEMENT.encode(),) * 2])
@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
def test_nobody_gets_one_who_did_not_name_a_statement(kind: bytes, asked: tuple[bytes, ...]) -> None:
    content, trailers = ask(answers(kind, b"data: one\n\n"), *asked)
    assert trailers == ()
    assert b"receipt" not in content


def test_a_stream_that_ends_inside_of_an_event_is_left_as_it_is() -> None:
    content, _ = ask(answers(b"text/event-stream", b"data: one\n\ndata: tw"), STATEMENT.encode())
    assert content.endswith(b"data: tw")


def test_an_answer_that_broke_off_has_no_receipt() -> None:
    with pytest.raises(EngineDied):
        ask(
            answers(b"text/event-stream", b"data: one\n\n" + b"data: " + b"x" * 300_000, ends=False), STATEMENT.encode()
        )
