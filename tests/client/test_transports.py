"""The `openai` SDK, unchanged, through the sealing transports: chat, stream, error, cancel."""

from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.client.deployment import HANG, Asgi, Deployment, InnerApp, Stage, Tampering

from cloister.channel.bhttp import Request
from cloister.client import (
    AsyncSealedTransport,
    AsyncSession,
    SealedTransport,
    Session,
    async_http_client,
    http_client,
    httpx_transport,
)
from cloister.enclave.gateway import Gateway
from cloister.enclave.gateway.receipts import PendingReceipt
from cloister.errors import TruncatedResponse, WrongUse

BASE = "http://enclave.invalid/v1"
Ask = list[Any]


def said(text: str) -> Ask:
    return [{"role": "user", "content": text}]


def sync_httpx2(session: Session) -> Any:
    return httpx2.Client(transport=SealedTransport(session))


def sync_httpx(session: Session) -> Any:
    return httpx.Client(transport=httpx_transport.SealedTransport(session))


@pytest.fixture(params=[sync_httpx2, sync_httpx])
def client(request: pytest.FixtureRequest, deployment: Deployment, stage: Stage) -> Iterator[openai.OpenAI]:
    make: Callable[[Session], Any] = request.param
    session = Session(stage.show(deployment.gateway), policy=deployment.policy)
    with openai.OpenAI(base_url=BASE, api_key="marked", http_client=make(session), max_retries=0) as client:
        yield client


def app_of(deployment: Deployment) -> InnerApp:
    assert isinstance(deployment.app, InnerApp)
    return deployment.app


def test_chat(client: openai.OpenAI, deployment: Deployment) -> None:
    answer = client.chat.completions.create(model="demo", messages=said("so it goes"))
    assert answer.choices[0].message.content == "so it goes"
    assert app_of(deployment).seen[0]["headers"]["authorization"] == "Bearer marked"


def test_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="demo", messages=said("one two three"), stream=True) as events:
        assert "".join(event.choices[0].delta.content or "" for event in events) == "one two three "


def test_an_error_inside_keeps_its_shape(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=said("fail"))
    assert (caught.value.code, caught.value.status_code) == ("no_such", 400)


def test_closing_a_stream_cancels_the_app_inside(client: openai.OpenAI, deployment: Deployment) -> None:
    app = app_of(deployment)
    events = client.post("/endless", body={}, cast_to=object, stream=True, stream_cls=openai.Stream[Any])
    next(iter(events))
    assert not app.ended.is_set()
    events.close()
    assert app.ended.wait(HANG)


def test_a_failure_amid_a_stream_is_not_a_short_answer(client: openai.OpenAI, deployment: Deployment) -> None:
    events = client.post("/breaks-late", body={}, cast_to=object, stream=True, stream_cls=openai.Stream[Any])
    with pytest.raises(TruncatedResponse):
        list(events)
    assert len(app_of(deployment).seen) == 1


def test_another_base_url_is_refused(deployment: Deployment, stage: Stage) -> None:
    session = Session(stage.show(deployment.gateway), policy=deployment.policy)
    with (
        openai.OpenAI(base_url=f"{session.url}/v1", api_key="k", http_client=sync_httpx2(session)) as client,
        pytest.raises(WrongUse),
    ):
        client.chat.completions.create(model="demo", messages=said("marked"))


def test_connections_are_reused(deployment: Deployment, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.client.session._KEEPALIVE", HANG)
    ports = set()

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        ports.add(scope["client"])
        await deployment.gateway(scope, receive, send)

    with http_client(stage.show(noting), policy=deployment.policy) as client:
        for _ in range(4):
            assert client.post("/v1/echo", content=b"x").status_code == 200
    assert len(ports) == 1


def async_httpx2(session: AsyncSession) -> Any:
    return httpx2.AsyncClient(transport=AsyncSealedTransport(session))


def async_httpx(session: AsyncSession) -> Any:
    return httpx.AsyncClient(transport=httpx_transport.AsyncSealedTransport(session))


@pytest.mark.anyio
@pytest.mark.parametrize("make", [async_httpx2, async_httpx])
async def test_the_async_sdk_does_the_same(
    deployment: Deployment, stage: Stage, make: Callable[[AsyncSession], Any]
) -> None:
    session = AsyncSession(stage.show(deployment.gateway), policy=deployment.policy)
    async with openai.AsyncOpenAI(base_url=BASE, api_key="k", http_client=make(session), max_retries=0) as client:
        answer = await client.chat.completions.create(model="demo", messages=said("so it goes"))
        assert answer.choices[0].message.content == "so it goes"
        events = await client.chat.completions.create(model="demo", messages=said("one two"), stream=True)
        assert "".join([event.choices[0].delta.content or "" async for event in events]) == "one two "
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="demo", messages=said("fail"))
        endless = await client.post(
            "/endless", body={}, cast_to=object, stream=True, stream_cls=openai.AsyncStream[Any]
        )
        async for _ in endless:
            break
        await endless.close()
        assert app_of(deployment).ended.wait(HANG)
        broken = await client.post(
            "/breaks-late", body={}, cast_to=object, stream=True, stream_cls=openai.AsyncStream[Any]
        )
        with pytest.raises(TruncatedResponse):
            _ = [event async for event in broken]


@pytest.mark.anyio
async def test_an_async_client_in_one_call(deployment: Deployment, stage: Stage) -> None:
    async with async_http_client(stage.show(deployment.gateway), policy=deployment.policy) as client:
        assert (await client.get("/v1/models")).json()["path"] == "/v1/models"


@pytest.mark.parametrize("length", [3, 300_000])
@pytest.mark.parametrize("make", [sync_httpx2, sync_httpx])
def test_what_stands_behind_an_answer_is_there_once_it_was_read(
    deployment: Deployment, stage: Stage, make: Callable[[Session], Any], length: int
) -> None:
    """Whether its end comes with its head or much later."""
    deployment.app = answering(length)
    session = Session(stage.show(with_receipts(deployment)), policy=deployment.policy)
    with make(session) as client:
        url = "http://enclave.invalid/v1/whole"
        whole = client.post(url, content=b"x")
        assert dict(whole.extensions["trailers"]).keys() == {b"cloister-receipt", b"cloister-receipt-salt"}
        with client.stream("POST", url, content=b"x") as answer:
            assert answer.extensions["trailers"] == []
            assert len(answer.read()) == length
            assert len(answer.extensions["trailers"]) == 2


@pytest.mark.anyio
@pytest.mark.parametrize("make", [async_httpx2, async_httpx])
async def test_the_async_transports_have_it_too(
    deployment: Deployment, stage: Stage, make: Callable[[AsyncSession], Any]
) -> None:
    deployment.app = answering(300_000)
    session = AsyncSession(stage.show(with_receipts(deployment)), policy=deployment.policy)
    async with make(session) as client:
        answer = await client.post("http://enclave.invalid/v1/whole", content=b"x")
        assert len(answer.extensions["trailers"]) == 2


def test_nothing_stands_behind_an_answer_that_was_cut(deployment: Deployment, stage: Stage) -> None:
    deployment.app = answering(40_000)
    tampering = Tampering(with_receipts(deployment))
    tampering.change_response = lambda sealed: sealed[:-1]
    with http_client(stage.show(tampering), policy=deployment.policy) as client:
        with client.stream("POST", "/v1/long", content=b"x") as answer, pytest.raises(TruncatedResponse):
            answer.read()
        assert answer.extensions["trailers"] == []


def test_an_sdk_that_was_told_so_asks_for_a_cut_answer_once(deployment: Deployment, stage: Stage) -> None:
    """The prompt ran. `openai` passes the error on by itself; `anthropic` takes any error for a connection's."""
    tampering = Tampering(deployment.gateway)
    tampering.change_response = lambda sealed: sealed[:40]
    url = stage.show(tampering)

    def http() -> Any:
        return sync_httpx2(Session(url, policy=deployment.policy))

    with openai.OpenAI(base_url=BASE, api_key="k", http_client=http()) as one, pytest.raises(TruncatedResponse):
        one.chat.completions.create(model="demo", messages=said("so it goes"))
    assert len(tampering.requests) == 1
    with (
        anthropic.Anthropic(base_url=BASE[:-3], api_key="k", http_client=http(), max_retries=0) as other,
        pytest.raises(anthropic.APIConnectionError) as caught,
    ):
        other.messages.create(model="demo", max_tokens=1, messages=[{"role": "user", "content": "so it goes"}])
    assert isinstance(caught.value.__cause__, TruncatedResponse)
    assert len(tampering.requests) == 2


def answering(length: int) -> Asgi:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(length)})

    return app


def with_receipts(deployment: Deployment) -> Gateway:
    """Its gateway, which signs for every answer with a key of no statement."""

    def begin(request: Request) -> PendingReceipt:
        key = Ed25519PrivateKey.generate()
        return PendingReceipt(request.content, bytes(32), statement_sha256="00" * 32, models=(), iat=0, sign=key.sign)

    return Gateway(deployment.app, deployment.ring, deployment.attest, clock=deployment.now, receipt=begin)
