"""The local proxy: the SDK with nothing but another base URL, and what it refuses."""

import asyncio
import base64
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from tests.client.deployment import HANG, Deployment, InnerApp, Served, Stage, Tampering, frames

from cloister.client import AsyncAnswer, AsyncSession
from cloister.client.explanations import explain
from cloister.evidence.document import parse_document
from cloister.proxy import ProxyConfig, create_proxy
from cloister.verify import Policy, parse_policy

JSON = {"content-type": "application/json"}


@pytest.fixture
def client(proxy: Served) -> Iterator[openai.OpenAI]:
    near = httpx2.Client(trust_env=False)
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="marked", http_client=near, max_retries=0) as client:
        yield client


@pytest.fixture
def http(proxy: Served) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=proxy.url, trust_env=False) as client:
        yield client


def app_of(deployment: Deployment) -> InnerApp:
    assert isinstance(deployment.app, InnerApp)
    return deployment.app


def said(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_chat_stream_error_and_cancel_with_the_plain_sdk(client: openai.OpenAI, deployment: Deployment) -> None:
    answer = client.chat.completions.create(model="demo", messages=said("so it goes"))
    assert answer.choices[0].message.content == "so it goes"
    events = client.chat.completions.create(model="demo", messages=said("one two"), stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in events) == "one two "
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=said("fail"))
    assert caught.value.code == "no_such"
    endless = client.post("/endless", body={}, cast_to=object, stream=True, stream_cls=openai.Stream[Any])
    next(iter(endless))
    endless.close()
    assert app_of(deployment).ended.wait(HANG)
    assert app_of(deployment).seen[0]["headers"]["authorization"] == "Bearer marked"


def test_a_failure_amid_a_stream_is_an_incomplete_read(http: httpx2.Client) -> None:
    with http.stream("POST", "/v1/breaks-late", json={}) as answer:
        assert answer.status_code == 200
        with pytest.raises(httpx2.RemoteProtocolError):
            answer.read()


def test_an_answer_whose_authenticated_end_is_cut_off_is_an_incomplete_read(
    deployment: Deployment, stage: Stage, proxy: Served
) -> None:
    """All of its content came, as long as its head said, and nobody vouches for its end."""
    text = b"x" * 33_000  # with its padding 64 KiB: the last of four chunks holds nothing of it

    async def app(scope: Any, receive: Any, send: Any) -> None:
        head = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": text})

    tampering = Tampering(Deployment(deployment.device, app).gateway)
    stage.show(tampering)
    with httpx2.Client(base_url=proxy.url, trust_env=False) as http:
        assert http.get("/v1/long").content == text
        tampering.change_response = lambda body: b"".join(frames(body, 32)[:-1])
        with http.stream("GET", "/v1/long") as answer, pytest.raises(httpx2.RemoteProtocolError):
            answer.read()


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_what_nobody_foresaw_is_told_in_a_way_that_no_sdk_retries(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch, dialect: str
) -> None:
    """The enclave may have run the request by then."""
    asked: list[Any] = []

    async def fail(_session: AsyncSession, request: Any) -> AsyncAnswer:
        asked.append(request)
        raise ValueError("unforeseen")

    monkeypatch.setattr(AsyncSession, "send", fail)
    answer = http.post("/v1/messages" if dialect == "anthropic" else "/v1/chat/completions", json={})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")
    told = answer.json()
    assert told["error"]["code"] == "internal_error"
    assert (told.get("type") == "error") == (dialect == "anthropic")
    assert "unforeseen" not in answer.text
    assert len(asked) == 1


def test_http_1_0_is_refused(proxy: Served, deployment: Deployment) -> None:
    """Its answers end when the connection does, cut or not."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=HANG) as client:
        client.sendall(b"GET /v1/models HTTP/1.0\r\nHost: 127.0.0.1:%d\r\n\r\n" % proxy.port)
        answer = b""
        while data := client.recv(65536):
            answer += data
    assert b" 505 " in answer.splitlines()[0]
    assert deployment.attested == 0


def test_forwards_the_original_routes_and_query(http: httpx2.Client, deployment: Deployment) -> None:
    for path in ("/health", "/generate?prompt=aGk%3D", "/v1/models/a%2Fb"):
        assert http.get(path).status_code == 200
    assert [(call["path"], call["query"]) for call in app_of(deployment).seen] == [
        ("/health", ""),
        ("/generate", "prompt=aGk%3D"),
        ("/v1/models/a/b", ""),
    ]


def test_keeps_cookies_and_page_addresses_here(http: httpx2.Client, deployment: Deployment) -> None:
    headers = {"cookie": "other=service", "referer": "http://localhost/private", "sec-fetch-mode": "cors"}
    assert http.get("/v1/models", headers={**headers, "x-kept": "1"}).status_code == 200
    seen = app_of(deployment).seen[0]["headers"]
    assert seen["x-kept"] == "1"
    assert not seen.keys() & {"cookie", "referer", "origin", "sec-fetch-mode", "accept-encoding", "connection"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": ""}, 415),
    ],
)
def test_refuses_foreign_pages_and_names(
    http: httpx2.Client, deployment: Deployment, headers: dict[str, str], status: int
) -> None:
    answer = http.post("/v1/echo", content=b"{}", headers={**JSON, **headers})
    assert answer.status_code == status
    assert answer.json()["error"]["code"]
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert deployment.attested == 0


class Upload:
    """A request whose body comes as these messages, and then no more."""

    def __init__(self, *messages: dict[str, Any], path: str = "/v1/echo") -> None:
        self._messages = list(messages)
        self._path = path
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def run(self, proxy: Any) -> None:
        headers = [(b"host", b"127.0.0.1:1234"), (b"content-type", b"application/json")]
        path = {"path": self._path, "raw_path": self._path.encode(), "query_string": b""}
        scope = {"type": "http", "method": "POST", **path}
        peers = {"http_version": "1.1", "client": ("127.0.0.1", 1), "server": None}
        await proxy({**scope, **peers, "headers": headers}, self.receive, self.send)


HALF = {"type": "http.request", "body": b'{"half":', "more_body": True}


class Stalled(Upload):
    """Reads nothing of the answer's body, and goes away while it should."""

    def __init__(self, path: str) -> None:
        super().__init__({"type": "http.request", "body": b"{}", "more_body": False}, path=path)
        self._stalled = asyncio.Event()

    async def receive(self) -> Any:
        if not self._messages:
            await self._stalled.wait()
            return {"type": "http.disconnect"}
        return await super().receive()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self._stalled.set()
            await asyncio.Event().wait()


@pytest.mark.anyio
async def test_an_answer_that_nobody_reads_any_more_is_let_go(
    deployment: Deployment, stage: Stage, monkeypatch: Any
) -> None:
    monkeypatch.setattr("cloister.proxy.guard.peer_uid", lambda client, server: os.getuid())
    kept: list[AsyncAnswer] = []  # or the collector would do it
    send = AsyncSession.send

    async def keep(session: AsyncSession, request: Any) -> AsyncAnswer:
        kept.append(await send(session, request))
        return kept[-1]

    monkeypatch.setattr(AsyncSession, "send", keep)
    async with AsyncSession(stage.show(deployment.gateway), policy=deployment.policy) as session:
        await Stalled("/v1/endless").run(create_proxy(session, ProxyConfig(1234)))
        assert app_of(deployment).ended.wait(HANG)
    assert len(kept) == 1


@pytest.mark.anyio
async def test_a_body_over_the_limit_is_refused_while_it_comes(
    deployment: Deployment, stage: Stage, monkeypatch: Any
) -> None:
    monkeypatch.setattr("cloister.proxy.guard.peer_uid", lambda client, server: os.getuid())
    upload = Upload(HALF, HALF)
    async with AsyncSession(stage.show(deployment.gateway), policy=deployment.policy) as session:
        await upload.run(create_proxy(session, ProxyConfig(1234, request_bytes=15)))
    assert upload.sent[0]["status"] == 413
    assert deployment.attested == 0


@pytest.mark.anyio
async def test_half_a_body_is_never_forwarded(deployment: Deployment, stage: Stage, monkeypatch: Any) -> None:
    monkeypatch.setattr("cloister.proxy.guard.peer_uid", lambda client, server: os.getuid())
    async with AsyncSession(stage.show(deployment.gateway), policy=deployment.policy) as session:
        gone = Upload(HALF, {"type": "http.disconnect"})
        await gone.run(create_proxy(session, ProxyConfig(1234)))
        slow = Upload(HALF)
        async with asyncio.timeout(HANG):
            await slow.run(create_proxy(session, ProxyConfig(1234, request_seconds=0.02)))
    assert gone.sent == []
    assert slow.sent[0]["status"] == 408
    assert deployment.attested == 0


def test_a_forged_forwarded_for_does_not_say_who_is_connected(
    http: httpx2.Client, proxy: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def note(client: Any, server: Any) -> int:
        asked.append(client)
        return os.getuid()

    monkeypatch.setattr("cloister.proxy.guard.peer_uid", note)
    forged = {"x-forwarded-for": "203.0.113.7", "x-forwarded-proto": "https", "forwarded": "for=203.0.113.7"}
    with http.stream("GET", "/v1/models", headers=forged) as answer:
        assert answer.status_code == 200
        near = answer.extensions["network_stream"].get_extra_info("client_addr")
    assert asked == [near]


def test_its_own_page_may_ask(http: httpx2.Client, proxy: Served) -> None:
    headers = {**JSON, "origin": f"http://127.0.0.1:{proxy.port}", "sec-fetch-site": "same-origin"}
    assert http.post("/v1/echo", content=b"{}", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/slots", 404, None),
        ("OPTIONS", "/v1/models", 405, "GET, HEAD, POST, DELETE"),
        ("PUT", "/v1/x", 405, "GET, HEAD, POST, DELETE"),
        ("POST", "/verification", 405, "GET, HEAD"),
        ("POST", "/metrics", 405, "GET, HEAD"),
    ],
)
def test_forwards_nothing_else(
    http: httpx2.Client, deployment: Deployment, method: str, path: str, status: int, allow: str | None
) -> None:
    answer = http.request(method, path, headers=JSON)
    assert (answer.status_code, answer.headers.get("allow")) == (status, allow)
    assert app_of(deployment).seen == []


@pytest.mark.parametrize("destination", ["script", "style", "image", "iframe", "worker", "serviceworker", "font"])
def test_what_an_enclave_answers_is_no_part_of_a_page(
    http: httpx2.Client, deployment: Deployment, destination: str
) -> None:
    refused = http.get("/v1/models", headers={"sec-fetch-dest": destination, "sec-fetch-site": "same-origin"})
    assert refused.status_code == 403
    assert deployment.attested == 0
    for allowed in ("empty", "document"):
        assert http.get("/v1/models", headers={"sec-fetch-dest": allowed}).status_code == 200


def test_what_an_enclave_answers_is_inert_in_a_browser(deployment: Deployment, stage: Stage, proxy: Served) -> None:
    """It would be a page of the chat's own origin, and could reach what that keeps."""
    hostile = {
        "content-type": "text/html",
        "content-security-policy": "default-src *",
        "clear-site-data": '"*"',
        "link": "</v1/x>; rel=preload",
        "refresh": "0; url=/v1/x",
        "service-worker-allowed": "/",
        "set-cookie": f"cloister-chat-{proxy.port}=x; Path=/chat",
        "x-content-type-options": "none",
        "x-kept": "1",
    }

    async def app(scope: Any, receive: Any, send: Any) -> None:
        head = [(name.encode(), value.encode()) for name, value in hostile.items()]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": b"<script>alert(1)</script>"})

    stage.show(Deployment(deployment.device, app).gateway)
    with httpx2.Client(base_url=proxy.url, trust_env=False) as http:
        headers = http.get("/v1/page").headers
    assert headers.get_list("content-security-policy") == ["sandbox; default-src 'none'"]
    assert headers.get_list("x-content-type-options") == ["nosniff"]
    assert headers["x-kept"] == "1"
    assert not {"clear-site-data", "link", "refresh", "service-worker-allowed", "set-cookie"} & set(headers)


def test_refuses_another_user_s_connection(proxy: Served, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.proxy.guard.peer_uid", lambda client, server: 12345)
    assert http.get("/v1/models").json()["error"]["code"] == "other_user"


def test_shows_what_was_verified_and_what_was_not(http: httpx2.Client, deployment: Deployment) -> None:
    told = http.get("/").json()
    assert (told["verdict"], told["first_use"]) == ("not verified yet", False)
    shown = http.get("/verification").json()
    assert (shown["verdict"], shown["first_use"], shown["deployment"]) == ("simulated", False, "acme-chat")
    assert "hardware" in {factor["step"] for factor in shown["not_proved"]}
    assert len(base64.b64decode(shown["nonce"])) == 32
    assert b"statement" in base64.b64decode(shown["document"])
    assert http.get("/").json()["verdict"] == "simulated"


def test_explains_what_was_verified_in_the_terminals_words(http: httpx2.Client, deployment: Deployment) -> None:
    plain = http.get("/verification").json()
    assert not {"explained", "saved"} & plain.keys()
    shown = http.get("/verification?explain").json()
    told = shown["explained"]
    assert {**plain, "explained": told, "saved": shown["saved"]} == shown
    assert (told["word"], told["platform"]) == ("SIMULATED", "sim")
    assert ["deployment", "acme-chat, release 3"] in told["facts"]
    steps = {step["step"]: step for step in told["steps"]}
    assert [step["step"] for step in told["steps"]] == [factor["step"] for factor in shown["factors"]]
    assert steps["binding"]["about"] == "key"
    assert steps["binding"]["meaning"] == explain("binding").meaning  # type: ignore[union-attr]
    assert steps["binding"]["remedy"] == ""
    assert deployment.attested == 1


def test_verifies_afresh_when_asked_to(http: httpx2.Client, deployment: Deployment) -> None:
    first = http.get("/verification?explain").json()
    again = http.get("/verification?explain&fresh").json()
    assert deployment.attested == 2
    assert again["nonce"] != first["nonce"]


def test_a_refusal_is_explained_with_every_step_and_the_document(http: httpx2.Client, deployment: Deployment) -> None:
    deployment.launch = replace(deployment.launch, deployment="another")
    answer = http.get("/verification?explain")
    shown = answer.json()
    assert (answer.status_code, shown["error"]["code"]) == (502, "enclave_not_trusted")
    told = shown["explained"]
    assert told["word"] == "NOT TRUSTED"
    assert told["sentence"].startswith("AN ATTACK OR A MISTAKE: ")
    steps = {step["step"]: step for step in told["steps"]}
    assert (steps["deployment"]["result"], steps["deployment"]["got"]) == ("FAIL", "another")
    assert steps["deployment"]["remedy"] == explain("deployment").remedy  # type: ignore[union-attr]
    assert steps["binding"]["result"] == "pass"
    document = parse_document(base64.b64decode(shown["saved"]["document"]))
    assert b'"another"' in document.items["launch"].content


def test_of_an_enclave_that_shows_nothing_there_is_no_document_and_no_verdict(
    stage: Stage, deployment: Deployment
) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # at which nobody listens
        session = AsyncSession(f"http://127.0.0.1:{bound.getsockname()[1]}", policy=deployment.policy)
        with (
            Served(None, port_of=lambda port: create_proxy(session, ProxyConfig(port=port))) as served,
            httpx2.Client(base_url=served.url, trust_env=False) as http,
        ):
            shown = http.get("/verification?explain").json()
    assert (shown["error"]["code"], shown["saved"]) == ("enclave_unreachable", None)
    assert (shown["explained"]["word"], shown["explained"]["steps"]) == ("", [])


def test_first_use_is_said_on_every_page(deployment: Deployment, stage: Stage) -> None:
    session = AsyncSession(stage.show(deployment.gateway), policy=replace(deployment.policy, trust="first-use"))
    with (
        Served(None, port_of=lambda port: create_proxy(session, ProxyConfig(port=port))) as served,
        httpx2.Client(base_url=served.url, trust_env=False) as http,
    ):
        assert http.get("/verification").json()["first_use"] is True
        assert http.get("/").json()["first_use"] is True


def test_a_changed_measurement_is_blocked_with_old_and_new(
    http: httpx2.Client, deployment: Deployment, stage: Stage
) -> None:
    assert http.get("/v1/models").status_code == 200
    old = deployment.measurement.code
    deployment.measurement = replace(deployment.measurement, code=f"sha256:{'99' * 32}")
    deployment.renew_keys()
    answer = http.get("/v1/models")
    error = answer.json()["error"]
    factors = {factor["step"]: factor for factor in error["factors"]}
    assert (answer.status_code, error["code"]) == (502, "enclave_not_trusted")
    assert answer.headers["x-should-retry"] == "false"
    changed = factors["measurement.code"]
    assert (changed["expected"], changed["got"]) == (old, f"sha256:{'99' * 32}")
    assert len(app_of(deployment).seen) == 1
    lines = f'version = 1\ndangerously_trust_simulator = "root"\n{error["policy_change"]}'
    accepting = parse_policy(lines, read=lambda name: deployment.device.root_pem)
    assert asked_under(stage.url, accepting) == 200
    deployment.measurement = replace(deployment.measurement, code=old)
    assert asked_under(stage.url, accepting) == 502


def asked_under(url: str, policy: Policy) -> int:
    """The status of a question through a proxy that was started with this policy."""
    session = AsyncSession(url, policy=policy, pin_measurement=True)
    with Served(None, port_of=lambda port: create_proxy(session, ProxyConfig(port=port))) as served:
        return httpx2.get(f"{served.url}/v1/models", trust_env=False).status_code


def test_an_enclave_that_is_not_trusted_hears_nothing(deployment: Deployment, stage: Stage, proxy: Served) -> None:
    deployment.launch = replace(deployment.launch, deployment="another")
    with httpx2.Client(base_url=proxy.url, trust_env=False) as http:
        answer = http.post("/v1/echo", json={"marked": 1})
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "enclave_not_trusted")
        assert http.get("/verification").status_code == 502
    assert app_of(deployment).seen == []


@pytest.mark.parametrize(
    ("path", "headers", "anthropic"),
    [
        ("/v1/messages", {}, True),
        ("/v1/messages/count_tokens", {}, True),
        ("/v1/models", {"anthropic-version": "2023-06-01"}, True),
        ("/v1/models", {}, False),
        ("/v1/chat/completions", {"anthropic-version": "2023-06-01"}, False),
        ("/v1/messagesx", {}, False),
    ],
)
def test_its_own_errors_are_in_the_callers_dialect(
    http: httpx2.Client, deployment: Deployment, path: str, headers: dict[str, str], anthropic: bool
) -> None:
    deployment.launch = replace(deployment.launch, deployment="another")
    refusals = [
        (http.post(path, json={}, headers=headers), 502, "api_error", "enclave_not_trusted"),
        (http.post(path, content=b"{}", headers={**headers, "content-type": "text/plain"}), 415, "", "media_type"),
        (http.post(path, json={}, headers={**headers, "origin": "http://evil.example"}), 403, "", "foreign_page"),
    ]
    for answer, status, kind, code in refusals:
        told = answer.json()
        assert (answer.status_code, told["error"]["code"]) == (status, code)
        if anthropic:
            expected = kind or {415: "invalid_request_error", 403: "permission_error"}[status]
            assert (told["type"], told["error"]["type"]) == ("error", expected)
        else:
            assert (told["error"]["type"], told["error"]["param"]) == ("proxy_error", None)
            assert "type" not in told


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_a_body_that_the_seal_has_no_room_for_is_too_large(
    http: httpx2.Client, deployment: Deployment, path: str
) -> None:
    """32 MiB exactly: the proxy's own limit lets it in, and the sealed message holds headers too."""
    answer = http.post(path, content=bytes(32 << 20), headers=JSON)
    told = answer.json()
    assert (answer.status_code, told["error"]["code"]) == (413, "too_large")
    assert told["error"]["type"] == ("request_too_large" if path == "/v1/messages" else "proxy_error")
    assert app_of(deployment).seen == []
