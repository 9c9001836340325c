"""The gateway, spoken to in ASGI: what it opens, what it refuses unread, and how its answers leave."""

import asyncio
import base64
import json
import selectors
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.client.deployment import HANG, Deployment, Served, frames

from cloister.channel.bhttp import Request, ResponseEnd, ResponseHead
from cloister.channel.freshness import http_date
from cloister.channel.limits import Limits
from cloister.channel.ohttp import SealedRequest, seal_to
from cloister.channel.padding import EVENT_MULTIPLE
from cloister.enclave.gateway import Gateway
from cloister.enclave.gateway.events import EventBuffer
from cloister.errors import EngineDied, TruncatedResponse, Unreachable
from cloister.sim import Device

pytestmark = pytest.mark.anyio

Message = dict[str, Any]
App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]
SEALED = (b"content-type", b"message/ohttp-chunked-req")


class _NoSleep(selectors.SelectSelector):
    """Where its loop would sleep, the time that it would sleep has passed."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("everybody waits, and nothing is left that could happen")
        self.now += max(timeout, 0.0)
        return super().select(0)


class StillTime(asyncio.SelectorEventLoop):
    """An event loop whose time stands still while anything runs: what happens when does not depend on the machine."""

    def __init__(self) -> None:
        self._clock = _NoSleep()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": StillTime}


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    return Device.open(tmp_path_factory.mktemp("sim") / "state")


@pytest.fixture
def deployment(device: Device) -> Deployment:
    return Deployment(device)


class Call:
    """One outer request. Its body is given in parts; `sent` is what the server was told to send, with times."""

    def __init__(self, gateway: Gateway, method: str, path: str, parts: list[bytes], query: bytes = b"") -> None:
        self._gateway = gateway
        self.scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query,
            "headers": [SEALED],
        }
        self._parts = list(parts)
        self.received = 0
        self.sent: list[Message] = []
        self.times: list[float] = []
        self.gone = asyncio.Event()
        self.sending = asyncio.Event()
        self.stalled: asyncio.Event | None = None

    async def receive(self) -> Message:
        self.received += 1
        if self._parts:
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        self.times.append(now())
        self.sending.set()
        if self.stalled is not None:
            await self.stalled.wait()

    async def until(self, count: int) -> None:
        while len(self.sent) < count:
            self.sending.clear()
            await self.sending.wait()

    async def run(self) -> "Call":
        await self._gateway(self.scope, self.receive, self.send)
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])

    @property
    def problem(self) -> str:
        assert self.headers[b"content-type"] == b"application/problem+json"
        return str(json.loads(self.body)["type"])


def get(deployment: Deployment, path: str, query: bytes = b"") -> Call:
    return Call(deployment.gateway, "GET", path, [], query)


def sealed_to(deployment: Deployment, path: str = "/v1/echo", content: bytes = b"", **headers: bytes) -> SealedRequest:
    fields = tuple((name.encode(), value) for name, value in headers.items())
    return seal_to(deployment.ring.ohttp_keys, Request("POST", "https", "enclave.invalid", path, fields, content))


def post(deployment: Deployment, *parts: bytes) -> Call:
    return Call(deployment.gateway, "POST", "/.well-known/ohttp-gateway", list(parts))


async def ask(deployment: Deployment, path: str = "/v1/echo", content: bytes = b"") -> tuple[int, bytes]:
    sealed = sealed_to(deployment, path, content)
    call = await post(deployment, sealed.body).run()
    head, body = opened(sealed, call.body)
    return head.status, body


def opened(sealed: SealedRequest, body: bytes) -> tuple[ResponseHead, bytes]:
    head, *rest, end = sealed.response.feed(body)
    sealed.response.finish()
    assert isinstance(head, ResponseHead)
    assert isinstance(end, ResponseEnd)
    return head, b"".join(part for part in rest if isinstance(part, bytes))


def inner(app: App, device: Device, **options: Any) -> Deployment:
    return Deployment(device, app, **options)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/health", "/", "/metrics", "/healthz/", "/v1"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_plaintext_is_refused_and_its_body_never_read(deployment: Deployment, path: str, method: str) -> None:
    call = await Call(deployment.gateway, method, path, [b"marked prompt"]).run()
    assert (call.status, call.received) == (403, 0)
    assert call.problem.endswith("/plaintext-refused")
    assert call.headers[b"connection"] == b"close"
    assert b"marked" not in call.body


def test_plaintext_is_refused_before_its_body_was_sent(device: Device) -> None:
    with Served(Deployment(device).gateway) as served, socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        client.settimeout(HANG)
        answer = b""
        while data := client.recv(65536):
            answer += data
    assert answer.startswith(b"HTTP/1.1 403")


async def test_publishes_the_keys_that_the_statement_names(deployment: Deployment) -> None:
    call = await get(deployment, "/.well-known/ohttp-gateway").run()
    assert (call.status, call.headers[b"content-type"], call.body) == (
        200,
        b"application/ohttp-keys",
        deployment.ring.ohttp_keys,
    )


async def test_rotates_its_keys_when_they_are_used(deployment: Deployment) -> None:
    before = deployment.ring.ohttp_keys
    deployment.offset = 1900
    assert (await get(deployment, "/.well-known/ohttp-gateway").run()).body != before


def nonce_query(nonce: bytes) -> bytes:
    return b"nonce=" + base64.urlsafe_b64encode(nonce).rstrip(b"=")


async def test_gives_evidence_over_the_nonce_and_lets_nobody_store_it(deployment: Deployment) -> None:
    call = await get(deployment, "/.well-known/cloister-attestation", nonce_query(bytes(32))).run()
    assert (call.status, call.headers[b"content-type"]) == (200, b"application/cmw+json")
    assert call.headers[b"cache-control"] == b"no-store"


@pytest.mark.parametrize(
    "query",
    [
        b"nonce=",
        b"nonce=AAAA",
        b"other=1",
        nonce_query(bytes(31)),
        nonce_query(bytes(33)),
        nonce_query(bytes(32)) + b"=",
        nonce_query(bytes(32)) + b"&nonce=A",
        nonce_query(b"\xff" * 32).replace(b"_", b"%2F"),
        b"nonce=" + b"!" * 43,
    ],
)
async def test_refuses_what_is_no_nonce(deployment: Deployment, query: bytes) -> None:
    call = await get(deployment, "/.well-known/cloister-attestation", query).run()
    assert (call.status, deployment.attested) == (400, 0)


async def test_quotes_are_rationed_and_never_stale(device: Device) -> None:
    deployment = Deployment(device, quotes_per_second=0.001)
    query = nonce_query(bytes(32))
    calls = [await get(deployment, "/.well-known/cloister-attestation", query).run() for _ in range(22)]
    assert [call.status for call in calls] == [200] * 20 + [503] * 2
    assert calls[-1].headers[b"retry-after"] == b"1"
    assert deployment.attested == 20


async def test_the_document_without_a_nonce_is_made_once_for_each_key(deployment: Deployment) -> None:
    calls = [await get(deployment, "/.well-known/cloister-attestation").run() for _ in range(3)]
    assert len({call.body for call in calls}) == 1
    assert deployment.attested == 1
    deployment.renew_keys()
    await get(deployment, "/.well-known/cloister-attestation").run()
    assert deployment.attested == 2


async def test_no_evidence_is_503(deployment: Deployment) -> None:
    async def broken(nonce: bytes) -> bytes:
        raise Unreachable("the device is gone")

    deployment.gateway._attest = broken
    call = await get(deployment, "/.well-known/cloister-attestation", nonce_query(bytes(32))).run()
    assert (call.status, b"device" in call.body) == (503, False)


async def test_says_whether_it_lives_and_whether_it_is_ready(device: Device) -> None:
    ready = False
    deployment = Deployment(device, ready=lambda: ready)
    assert (await get(deployment, "/healthz").run()).status == 200
    assert (await get(deployment, "/readyz").run()).status == 503
    ready = True
    assert (await get(deployment, "/readyz").run()).status == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/.well-known/cloister-attestation"])
async def test_other_methods_are_405_unread(deployment: Deployment, path: str) -> None:
    call = await Call(deployment.gateway, "POST", path, [b"body"]).run()
    assert (call.status, call.received) == (405, 0)


async def test_another_media_type_is_415_unread(deployment: Deployment) -> None:
    call = post(deployment, b"body")
    call.scope["headers"] = [(b"content-type", b"application/json")]
    await call.run()
    assert (call.status, call.received) == (415, 0)


async def test_opens_a_request_in_whatever_parts_it_comes(deployment: Deployment) -> None:
    sealed = sealed_to(deployment, content=b"x" * 40_000)
    parts = [sealed.body[at : at + 997] for at in range(0, len(sealed.body), 997)]
    call = await post(deployment, *parts).run()
    head, body = opened(sealed, call.body)
    assert (head.status, json.loads(body)["length"]) == (200, 40_000)


async def test_host_and_length_inside_are_the_gateway_s_word(device: Device) -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    deployment = inner(app, device)
    fields = ((b"host", b"else.example"), (b"content-length", b"9"))
    request = Request("POST", "https", "enclave.invalid", "/v1/echo", fields, b"four")
    await post(deployment, seal_to(deployment.ring.ohttp_keys, request).body).run()
    assert seen == [(b"host", b"enclave.invalid"), (b"content-length", b"4")]


async def test_an_unknown_key_is_422(deployment: Deployment) -> None:
    sealed = sealed_to(deployment)
    call = await post(deployment, b"\xf0" + sealed.body[1:]).run()
    assert (call.status, call.problem) == (422, "https://iana.org/assignments/http-problem-types#ohttp-key")


async def test_every_way_not_to_open_looks_the_same(deployment: Deployment) -> None:
    body = sealed_to(deployment, content=b"x" * 20_000).body
    await post(deployment, body).run()
    fresh = sealed_to(deployment, content=b"x" * 20_000).body
    broken = [
        body,  # a replay
        b"",
        fresh[:3],
        fresh[:2000],
        fresh[:-1],
        fresh + b"x",
        fresh[:500] + bytes([fresh[500] ^ 1]) + fresh[501:],
        fresh[:-1] + bytes([fresh[-1] ^ 1]),
        fresh[:1127] + b"\x40\x00" + fresh[1127:],  # an empty chunk
        seal_elsewhere(deployment),
    ]
    answers = set()
    for message in broken:
        call = (
            await post(deployment, message, b"more").run() if message is body else await post(deployment, message).run()
        )
        answers.add((call.status, call.body, tuple(call.headers.items())))
    assert len(answers) == 1
    assert answers.pop()[0] == 400
    assert len(deployment.app.seen) == 1  # type: ignore[attr-defined]


def seal_elsewhere(deployment: Deployment) -> bytes:
    """Sealed well, to a path that is none."""
    request = Request("POST", "https", "enclave.invalid", "no-slash")
    return seal_to(deployment.ring.ohttp_keys, request).body


async def test_the_rest_of_a_request_that_does_not_open_is_read_and_dropped(deployment: Deployment) -> None:
    body = sealed_to(deployment).body
    call = await post(deployment, b"\xf0" + body[1:], *[b"x" * 1000] * 20).run()
    assert (call.status, call.received) == (422, 21)


async def test_runs_nothing_before_the_final_chunk_has_opened(deployment: Deployment) -> None:
    sealed = sealed_to(deployment, content=b"x" * 40_000)
    call = post(deployment, sealed.body[:-1])
    call._parts.append(b"")
    call.gone.set()
    await call.run()
    assert deployment.app.seen == []  # type: ignore[attr-defined]


async def test_a_disconnect_while_it_reads_is_silent(deployment: Deployment) -> None:
    call = post(deployment)
    call.gone.set()
    await call.run()
    assert call.sent == []


async def test_holds_to_its_limits(device: Device) -> None:
    limits = Limits(request_bytes=100_000, unauthenticated_bytes=150_000, open_seconds=0.1)
    deployment = Deployment(device, limits=limits)
    assert (await post(deployment, *[bytes(50_000)] * 5).run()).status == 413
    assert (await post(deployment, sealed_to(deployment, content=bytes(131_000)).body).run()).status == 413

    half = sealed_to(deployment, content=b"x" * 60_000).body[:-1]
    slow = [Slow(deployment, half) for _ in range(3)]
    statuses = [call.status for call in await asyncio.gather(*(call.run() for call in slow))]
    assert sorted(statuses) == [408, 408, 503]
    assert (await ask(deployment))[0] == 200


class Slow(Call):
    """Sends all but its last byte, and then waits."""

    def __init__(self, deployment: Deployment, body: bytes) -> None:
        super().__init__(deployment.gateway, "POST", "/.well-known/ohttp-gateway", [body])

    async def receive(self) -> Message:
        return {**await super().receive(), "more_body": True}


@pytest.mark.parametrize("date", [b"Tue, 15 Nov 1994 08:12:31 GMT", b"yesterday", b"\xff"])
async def test_a_date_far_off_is_a_sealed_problem(deployment: Deployment, date: bytes) -> None:
    sealed = sealed_to(deployment, date=date)
    head, body = opened(sealed, (await post(deployment, sealed.body).run()).body)
    assert head.status == 400
    assert json.loads(body)["type"] == "https://iana.org/assignments/http-problem-types#date"
    assert b"date" in dict(head.headers)
    assert deployment.app.seen == []  # type: ignore[attr-defined]


async def test_a_clock_set_back_makes_no_old_date_timely(deployment: Deployment) -> None:
    before = http_date(deployment.now())
    deployment.offset = 600.0
    await get(deployment, "/.well-known/ohttp-gateway").run()
    deployment.offset = 0.0
    sealed = sealed_to(deployment, date=before)
    assert opened(sealed, (await post(deployment, sealed.body).run()).body)[0].status == 400


async def test_nothing_from_inside_stands_outside(deployment: Deployment) -> None:
    sealed = sealed_to(deployment)
    call = await post(deployment, sealed.body).run()
    assert call.sent[0]["headers"] == [
        (b"content-type", b"message/ohttp-chunked-res"),
        (b"incremental", b"?1"),
        (b"cache-control", b"no-store, no-transform"),
        (b"x-accel-buffering", b"no"),
    ]


async def test_answers_of_many_lengths_look_the_same(device: Device) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        length = int((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        for _ in range(length):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body"})

    deployment = inner(app, device)
    shapes = set()
    for length in (0, 1, 100, 400):
        sealed = sealed_to(deployment, content=str(length).encode())
        call = await post(deployment, sealed.body).run()
        assert opened(sealed, call.body)[1] == b"x" * length
        shapes.add(tuple(len(part) for part in frames(call.body, 32)))
    assert len(shapes) == 1


def streams(*gaps: float, text: str = "word", ends: bool = True) -> App:
    """An app that sends an event after each gap (seconds)."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for gap in gaps:
            if gap:
                await asyncio.sleep(gap)
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": not ends})

    return app


async def test_the_outer_head_and_the_nonce_leave_before_there_is_an_answer(device: Device) -> None:
    asked, told = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        await told.wait()
        await streams(0)(scope, receive, send)

    deployment = inner(app, device)
    sealed = sealed_to(deployment)
    call = post(deployment, sealed.body)
    running = asyncio.create_task(call.run())
    await asked.wait()
    await call.until(2)
    head, nonce = call.sent
    assert head["status"] == 200
    assert len(nonce["body"]) == 32
    assert sealed.response.feed(nonce["body"]) == []
    told.set()
    await running
    assert sealed.response.feed(call.body[32:])


async def test_the_first_event_leaves_at_once_and_the_rest_on_a_grid(device: Device) -> None:
    deployment = inner(streams(0, *[0.0043] * 30), device)
    sealed = sealed_to(deployment)
    call = await post(deployment, sealed.body).run()
    _, body = opened(sealed, call.body)
    assert body.count(b"data: word") == 31
    assert call.times[2:] == pytest.approx([0, 0.05, 0.10, 0.15])  # of what follows head and nonce


async def test_the_grid_is_the_same_whenever_a_stream_began_or_paused(device: Device) -> None:
    deployment = inner(streams(0.02, 0.51, 0.03), device)
    call = await post(deployment, sealed_to(deployment).body).run()
    assert call.times[2:] == pytest.approx([0.02, 0.55, 0.60])


async def test_one_event_and_many_leave_in_blocks(device: Device) -> None:
    for text in ("a", "a longer word than that", "x" * 600):
        deployment = inner(streams(0, 0, 0, 0, text=text), device)
        sealed = sealed_to(deployment)
        call = await post(deployment, sealed.body).run()
        _, body = opened(sealed, call.body)
        assert len(body) % EVENT_MULTIPLE == 0
        assert body.count(b"data: ") == 4
        for chunk in frames(call.body, 32)[2:-1]:
            overhead = len(b"\x00\x00") + 16 + len(b"\x00\x00")  # length of the chunk, tag, length of the piece
            assert (len(chunk) - overhead) % EVENT_MULTIPLE == 0


async def test_without_padding_every_event_leaves_as_it_is(device: Device) -> None:
    deployment = inner(streams(0, 0.005, 0.005), device, padding=False)
    sealed = sealed_to(deployment)
    call = await post(deployment, sealed.body).run()
    assert opened(sealed, call.body)[1] == b"data: word\n\n" * 3
    assert len(call.sent) >= 4


async def test_a_disconnect_ends_the_app_at_once(device: Device) -> None:
    ended = asyncio.Event()
    told: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        waiting = asyncio.create_task(receive())
        waiting.add_done_callback(lambda task: told.append(task.result()["type"]))
        try:
            await streams(0, 10)(scope, receive, send)
        finally:
            ended.set()

    deployment = inner(app, device)
    call = post(deployment, sealed_to(deployment).body)
    running = asyncio.create_task(call.run())
    await call.until(3)
    call.gone.set()
    gone = now()
    await ended.wait()
    assert now() == gone
    await running
    assert told == ["http.disconnect"]


async def test_what_the_app_does_after_its_answer_is_not_cut_short(device: Device) -> None:
    done = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await streams(0)(scope, receive, send)
        await asyncio.sleep(0.1)
        done.set()

    deployment = inner(app, device)
    call = post(deployment, sealed_to(deployment).body)
    running = asyncio.create_task(call.run())
    await call.until(3)  # all of it leaves together
    assert not call.sent[-1]["more_body"]
    call.gone.set()
    await running
    assert done.is_set()


async def breaks_at_once(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError("marked prompt")


async def says_nothing(scope: Any, receive: Any, send: Any) -> None:
    return


async def breaks_unsent(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b"{", "more_body": True})
    raise RuntimeError("marked prompt")


async def sets_a_header_that_is_none(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"1\r\nx-b: 2")]})
    await send({"type": "http.response.body", "body": b"{}"})


@pytest.mark.parametrize("app", [breaks_at_once, says_nothing, breaks_unsent, sets_a_header_that_is_none])
async def test_an_app_that_breaks_before_anything_left_is_a_sealed_500(device: Device, app: App) -> None:
    status, body = await ask(inner(app, device))
    assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")
    assert b"marked" not in body


async def breaks_late(scope: Any, receive: Any, send: Any) -> None:
    await streams(0, ends=False)(scope, receive, send)
    await asyncio.sleep(0.02)
    raise RuntimeError("marked prompt")


async def breaks_when_much_has_left(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": bytes(40_000), "more_body": True})
    await asyncio.sleep(0.02)
    raise RuntimeError("marked prompt")


@pytest.mark.parametrize("app", [breaks_late, breaks_when_much_has_left, streams(0, 0.02, ends=False)])
async def test_an_app_that_breaks_later_cuts_the_connection_without_an_end(device: Device, app: App) -> None:
    deployment = inner(app, device)
    sealed = sealed_to(deployment)
    call = post(deployment, sealed.body)
    with pytest.raises(EngineDied) as caught:
        await call.run()
    assert "marked" not in repr(caught.value.__context__)
    assert all(message["more_body"] for message in call.sent[1:])
    sealed.response.feed(call.body)
    with pytest.raises(TruncatedResponse):
        sealed.response.finish()


async def test_what_an_app_said_before_it_broke_leaves_at_its_time(device: Device) -> None:
    deployment = inner(streams(0, 0.01, ends=False), device)
    call = post(deployment, sealed_to(deployment).body)
    with pytest.raises(EngineDied):
        await call.run()
    assert call.times[2:] == pytest.approx([0, 0.05])


async def test_what_came_while_the_last_was_leaving_has_its_own_time(device: Device) -> None:
    deployment = inner(streams(0, 0.06, 0.05), device)
    call = post(deployment, sealed_to(deployment).body)
    running = asyncio.create_task(call.run())
    await call.until(3)
    call.stalled = asyncio.Event()
    await asyncio.sleep(0.17)  # the second has been leaving since 0.10, the third came at 0.11
    call.stalled.set()
    await running
    assert call.times[2:] == pytest.approx([0, 0.1, 0.2])


async def test_a_slow_reader_makes_the_app_wait(device: Device) -> None:
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100):
            await send({"type": "http.response.body", "body": bytes(20_000), "more_body": True})
            sent += 1
        await send({"type": "http.response.body"})

    deployment = inner(app, device)
    sealed = sealed_to(deployment)
    call = post(deployment, sealed.body)
    call.stalled = asyncio.Event()
    running = asyncio.create_task(call.run())
    await asyncio.sleep(10)
    assert 10 < sent < 40
    call.stalled.set()
    await running
    assert len(opened(sealed, call.body)[1]) == 2_000_000


async def test_lifespan_is_the_inner_app_s(device: Device) -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await inner(app, device).gateway({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == ["lifespan"]


def test_the_gateway_speaks_no_word_of_its_app_in_the_log(
    device: Device, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    deployment = Deployment(device)
    with Served(deployment.gateway) as served, socket.create_connection(("127.0.0.1", served.port)) as client:
        body = sealed_to(deployment, "/v1/breaks-late", b"marked prompt").body
        head = b"POST /.well-known/ohttp-gateway HTTP/1.1\r\nHost: x\r\nContent-Type: message/ohttp-chunked-req\r\n"
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        client.settimeout(HANG)
        answer = b""
        while data := client.recv(65536):
            answer += data
    assert not answer.endswith(b"0\r\n\r\n")
    assert "marked" not in caplog.text


@given(st.lists(st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"").replace(b"\r", b"")), max_size=8))
def test_padding_keeps_every_event_and_fills_blocks(texts: list[bytes]) -> None:
    stream = b"".join(b"data: " + text + b"\n\n" for text in texts)
    buffer = EventBuffer(pad=True)
    given_out = b""
    for at in range(0, len(stream), 7):
        buffer.add(stream[at : at + 7])
        taken = buffer.take()
        assert len(taken) % EVENT_MULTIPLE == 0
        given_out += taken
    given_out += buffer.take(everything=True)
    events = [block for block in given_out.split(b"\n\n") if block and not block.startswith(b":")]
    assert events == [b"data: " + text for text in texts]


def test_an_endless_event_leaves_in_parts() -> None:
    buffer = EventBuffer(pad=True)
    buffer.add(b"data: " + b"x" * 300_000)
    assert len(buffer.take()) == 300_006
    assert len(buffer) == 0
