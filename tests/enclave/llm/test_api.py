import asyncio
import json
import logging
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.enclave.llm.conftest import INFO, ScriptedEngine, client_of, eventually

from cloister.enclave.llm.api import ROUTES, Api, ApiConfig, Route, create_api
from cloister.enclave.llm.engine import Delta, Started
from cloister.enclave.llm.envelope import ANTHROPIC, Dialect
from cloister.enclave.llm.tenants import ApiKey, new_key
from cloister.errors import ContextLengthExceeded, EngineDied, WrongUse

pytestmark = pytest.mark.anyio

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
BODIES: dict[str, Any] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "Hi"},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {**CHAT, "max_tokens": 8},
    "/v1/messages/count_tokens": CHAT,
    "/tokenize": {"content": "Hi"},
    "/detokenize": {"tokens": [72]},
    "/generate": {"query": "Hi"},
}


async def ask(http: httpx2.AsyncClient, route: Route, **headers: str) -> httpx2.Response:
    if route.method == "POST":
        return await http.post(route.path, json=BODIES[route.path], headers=headers)
    path = route.path + "default" if route.path.endswith("/") else route.path
    return await http.get(path, params={"prompt": "SGk="} if path == "/generate" else None, headers=headers)


def code_of(response: httpx2.Response) -> str:
    """As Anthropic's dialect tells it: its error's type. As OpenAI's: its code."""
    body = response.json()
    return str(body["error"]["type"] if body.get("type") == "error" else body["error"]["code"])


def dialect_of(path: str) -> Dialect | None:
    return next(route.dialect for route in ROUTES if route.path == path)


def test_only_health_goes_without_a_key() -> None:
    assert [(route.method, route.path) for route in ROUTES if route.keyless] == [("GET", "/health")]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_every_route_demands_a_key(engine: ScriptedEngine, route: Route) -> None:
    plain, digest = new_key()
    http = client_of(create_api(engine, ApiConfig(api_keys=(ApiKey("ann", digest),))))
    expected = 200 if route.keyless else 401
    assert (await ask(http, route)).status_code == expected
    assert (await ask(http, route, authorization="Bearer ck-wrong")).status_code == expected
    assert (await ask(http, route, authorization=f"Basic {plain}")).status_code == expected
    assert len(engine.requests) == 0
    assert (await ask(http, route, authorization=f"Bearer {plain}")).status_code == 200
    assert (await ask(http, route, **{"x-api-key": plain})).status_code == 200


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_without_configured_keys_nobody_is_let_in_unless_told_so(engine: ScriptedEngine, route: Route) -> None:
    assert (await ask(client_of(create_api(engine, ApiConfig())), route)).status_code == (200 if route.keyless else 401)
    assert (await ask(client_of(create_api(engine, ApiConfig(require_keys=False))), route)).status_code == 200


@pytest.mark.parametrize("path", ["/", "/nothing", "/v1/models/", "/v1/chat/completions/", "/health/x", "/slots"])
async def test_unknown_routes_are_denied_first_and_missing_second(engine: ScriptedEngine, path: str) -> None:
    plain, digest = new_key()
    http = client_of(create_api(engine, ApiConfig(api_keys=(ApiKey("ann", digest),))))
    assert (await http.get(path)).status_code == 401
    response = await http.get(path, headers={"x-api-key": plain})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/generate", "POST, GET"),
        ("HEAD", "/health", "GET"),
        ("OPTIONS", "/v1/models", "GET"),
    ],
)
async def test_other_methods_are_405(http: httpx2.AsyncClient, method: str, path: str, allowed: str) -> None:
    response = await http.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allowed
    assert "access-control-allow-origin" not in response.headers


ANTHROPICS = {"anthropic-version": "2023-06-01"}


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("POST", "/v1/messages/batches", 404, "not_found_error"),
        ("GET", "/v1/messages", 405, "invalid_request_error"),
        ("GET", "/v1/models/nothing", 404, "not_found_error"),
    ],
)
async def test_callers_of_anthropics_dialect_are_refused_in_it(
    http: httpx2.AsyncClient, method: str, path: str, status: int, kind: str
) -> None:
    response = await http.request(method, path, headers=ANTHROPICS)
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["request_id"] == response.headers["request-id"]
    assert (await http.get("/v1/models/nothing")).json()["error"]["code"] == "model_not_found"


def test_anthropics_routes_speak_its_dialect_and_no_other_does() -> None:
    spoken = {route.path for route in ROUTES if route.dialect is ANTHROPIC}
    assert spoken == {"/v1/messages", "/v1/messages/count_tokens"}


async def test_request_ids_are_fresh(http: httpx2.AsyncClient) -> None:
    ids = {(await http.post("/v1/messages", json={})).json()["request_id"] for _ in range(3)}
    assert len(ids) == 3


async def test_401_says_how(engine: ScriptedEngine) -> None:
    response = await client_of(create_api(engine, ApiConfig())).get("/v1/models")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "invalid_request_error"


SERVING = [route for route in ROUTES if route.path != "/v1/openapi.json"]
POSTS = [route.path for route in ROUTES if route.method == "POST"]


@pytest.mark.parametrize("path", POSTS)
async def test_bodies_that_are_not_json_are_refused(http: httpx2.AsyncClient, path: str) -> None:
    as_form = await http.post(path, data={"a": "b"})
    spoken = dialect_of(path) is ANTHROPIC
    media, invalid = ["invalid_request_error"] * 2 if spoken else ["unsupported_media_type", "invalid_json"]
    assert (as_form.status_code, code_of(as_form)) == (415, media)
    assert (await http.post(path, content=b"{}")).status_code == 415
    for body in (
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"a":NaN}',
        b'{"a":[1e999]}',
        b'{"a":"\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 90 + b"1" + b"}" * 90,
    ):
        response = await http.post(path, content=body, headers={"content-type": "application/json; charset=utf-8"})
        assert (response.status_code, code_of(response)) == (400, invalid), body[:20]


@pytest.mark.parametrize("path", POSTS)
async def test_bodies_over_the_limit_are_413(engine: ScriptedEngine, path: str) -> None:
    http = client_of(create_api(engine, ApiConfig(require_keys=False, max_body=100)))
    response = await http.post(path, json={**BODIES[path], "pad": "x" * 200})
    assert (response.status_code, code_of(response)) == (413, "request_too_large")
    assert (await http.post(path, json=BODIES[path])).status_code == 200


@pytest.mark.parametrize("route", SERVING, ids=lambda route: f"{route.method} {route.path}")
async def test_loading_is_503_with_progress(engine: ScriptedEngine, http: httpx2.AsyncClient, route: Route) -> None:
    engine.loaded = False
    response = await ask(http, route)
    assert response.headers["retry-after"] == "2"
    error = response.json()["error"]
    if route.dialect is ANTHROPIC:
        assert (response.status_code, error["type"]) == (529, "overloaded_error")
        assert "42%" in error["message"]
        return
    assert response.status_code == 503
    assert (error["code"], error["progress"], error["type"]) == ("model_loading", 0.42, "server_error")


@pytest.mark.parametrize("route", SERVING, ids=lambda route: f"{route.method} {route.path}")
async def test_a_dead_engine_is_503(engine: ScriptedEngine, http: httpx2.AsyncClient, route: Route) -> None:
    engine.ready = False
    response = await ask(http, route)
    expected = (529, "overloaded_error") if route.dialect is ANTHROPIC else (503, "engine_died")
    assert (response.status_code, code_of(response)) == expected


async def test_a_request_waits_for_an_engine_that_comes_back(engine: ScriptedEngine) -> None:
    engine.ready = False
    asyncio.get_running_loop().call_later(0.1, setattr, engine, "ready", True)  # noqa: FBT003
    http = client_of(create_api(engine, ApiConfig(require_keys=False)))
    assert (await http.get("/v1/models")).status_code == 200


async def test_those_in_line_wait_for_it_too(engine: ScriptedEngine) -> None:
    gate = asyncio.Event()
    engine.scripts = [[Started(1, 0), gate, EngineDied("killed")] for _ in range(INFO.slots)]
    api = create_api(engine, ApiConfig(require_keys=False, restart_wait=60))
    http = client_of(api)
    running = [asyncio.create_task(http.post("/generate", json={"query": "Hi"})) for _ in range(INFO.slots)]
    await eventually(lambda: engine.running == INFO.slots)
    in_line = asyncio.create_task(http.post("/generate", json={"query": "Hi"}))
    await eventually(lambda: api.queue.waiting == 1)
    engine.ready = False
    gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*running)] == [503] * INFO.slots
    engine.ready = True
    assert (await in_line).status_code == 200


PROMPTS = [
    ("POST", "/v1/chat/completions", CHAT, "messages"),
    ("POST", "/v1/completions", {"prompt": "Hi"}, "prompt"),
    ("POST", "/v1/responses", {"input": "Hi"}, "input"),
    ("POST", "/generate", {"query": "Hi"}, "query"),
    ("GET", "/generate?prompt=SGk=", None, "prompt"),
]


@pytest.mark.parametrize(("method", "path", "body", "param"), PROMPTS)
async def test_a_prompt_too_long_is_named_as_the_route_calls_it(
    http: httpx2.AsyncClient, engine: ScriptedEngine, method: str, path: str, body: Any, param: str
) -> None:
    engine.script = [ContextLengthExceeded(limit=4096, prompt=5000, requested=5100)]
    response = await http.request(method, path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)


async def test_unexpected_errors_are_a_bare_500_and_leave_no_content_in_the_log(
    engine: ScriptedEngine, http: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = [ValueError("CANARY")]
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert response.json() == {
        "error": {
            "message": "Something failed inside the enclave.",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
    assert "ValueError" in caplog.text
    assert "conftest.py:" in caplog.text
    assert "CANARY" not in caplog.text


REFUSED: list[tuple[str, Any, str]] = [
    ("/v1/chat/completions", {"messages": "CANARY"}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "CANARY", "content": "x"}]}, "messages[0].role"),
    ("/v1/chat/completions", {**CHAT, "temperature": "CANARY"}, "temperature"),
    ("/v1/chat/completions", {**CHAT, "stop": ["CANARY", 1]}, "stop"),
    ("/v1/chat/completions", {**CHAT, "logit_bias": {"CANARY": 1}}, "logit_bias"),
    ("/v1/chat/completions", {**CHAT, "model": "CANARY"}, "model"),
    ("/v1/completions", {"prompt": {"CANARY": 1}}, "prompt"),
    ("/v1/models/CANARY", None, "model"),
    ("/v1/responses", {"input": [{"type": "CANARY"}]}, "input[0].type"),
    ("/v1/responses", {"input": "x", "previous_response_id": "CANARY"}, "previous_response_id"),
    ("/v1/responses", {"input": "x", "tool_choice": "CANARY"}, "tool_choice"),
    ("/generate", {"query": ["CANARY"]}, "query"),
    ("/generate?prompt=CANARY!", None, "prompt"),
    ("/CANARY", None, ""),
]


@pytest.mark.parametrize(("path", "body", "param"), REFUSED)
async def test_refusals_name_the_field_and_never_its_value(
    http: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture, path: str, body: Any, param: str
) -> None:
    caplog.set_level(logging.DEBUG, "cloister")
    response = await (http.get(path) if body is None else http.post(path, json=body))
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == (param or None)
    assert "CANARY" not in response.text + str(response.headers)
    assert "CANARY" not in caplog.text


async def test_prompts_answers_and_keys_are_in_no_log(engine: ScriptedEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cloister")
    plain, digest = new_key()
    engine.script = [Started(1, 0), Delta("ANSWER-CANARY", 1), ValueError("ANSWER-CANARY")]
    http = client_of(create_api(engine, ApiConfig(api_keys=(ApiKey("ann", digest),))), authorization=f"Bearer {plain}")
    await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "PROMPT-CANARY"}]})
    with pytest.raises(httpx2.RemoteProtocolError):
        await http.post("/v1/completions", json={"prompt": "PROMPT-CANARY", "stream": True})
    assert "CANARY" not in caplog.text
    assert plain not in caplog.text


async def test_metrics_count_and_hold_no_content(engine: ScriptedEngine, api: Api, http: httpx2.AsyncClient) -> None:
    await http.post("/v1/chat/completions", json=CHAT)
    await http.post("/v1/chat/completions", json={})
    assert (api.metrics.requests, dict(api.metrics.responses)) == (2, {200: 1, 400: 1})
    assert (api.metrics.prompt_tokens, api.metrics.completion_tokens, api.metrics.cached_tokens) == (7, 2, 0)
    assert (api.queue.running, api.queue.waiting, api.metrics.cancelled, api.metrics.broken) == (0, 0, 0, 0)


async def test_cached_prefixes_are_reused_only_with_a_client_secret(
    engine: ScriptedEngine, http: httpx2.AsyncClient
) -> None:
    await http.post("/v1/chat/completions", json=CHAT)
    await http.post("/v1/chat/completions", json=CHAT, headers={"cloister-cache-secret": "A" * 43})
    bad = await http.post("/v1/chat/completions", json=CHAT, headers={"cloister-cache-secret": "short"})
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_cache_secret")
    scopes = [request.scope for request in engine.requests]
    assert scopes[0] is None
    assert len(scopes[1] or b"") == 32
    assert len(scopes) == 2


async def test_speaks_http_only(api: Api) -> None:
    async def nothing(*_: Any) -> Any:
        raise AssertionError

    with pytest.raises(WrongUse):
        await api({"type": "websocket"}, nothing, nothing)


def scope_to(path: str) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json")]
    return {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}


def test_a_client_that_leaves_before_its_request_is_whole_gets_nothing(api: Api) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(api(scope_to("/generate"), receive, send))
    assert sent == []
    assert api.metrics.cancelled == 1


@pytest.mark.parametrize("after", [0, 1, 3])
async def test_a_server_that_cannot_send_any_more_is_a_client_that_left(
    api: Api, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture, after: int
) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        if len(sent) == after:
            raise ConnectionResetError
        sent.append(message)
        await asyncio.sleep(0)

    received = [{"type": "http.request", "body": json.dumps({**CHAT, "stream": True}).encode()}]

    async def receive() -> Any:
        return received.pop() if received else await asyncio.Event().wait()

    await api(scope_to("/v1/chat/completions"), receive, send)
    assert (engine.running, api.queue.running, api.metrics.cancelled) == (0, 0, 1)
    assert caplog.text == ""


FIELDS = [
    "model", "messages", "prompt", "query", "content", "tokens", "n", "stream", "stream_options", "seed", "stop",
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "logprobs", "top_logprobs",
    "logit_bias", "presence_penalty", "frequency_penalty", "repeat_penalty", "tools", "tool_choice", "functions",
    "response_format", "modalities", "echo", "suffix", "best_of", "template", "add_special", "parse_special",
    "system", "stop_sequences", "thinking", "output_config", "input", "instructions", "text", "max_output_tokens",
    "include", "background", "parallel_tool_calls",
]  # fmt: skip
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 20)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["default", "user", "assistant", "text", "auto", "tool", "message", "tool_use", "tool_result"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "include_usage", "1", "url", "image_url", "name", "input", "format"]
            ),
            inner,
        )
    ),
    max_leaves=8,
)
BASE = {
    "messages": [{"role": "user", "content": "x"}],
    "prompt": "x",
    "query": "x",
    "content": "x",
    "tokens": [1],
    "input": "x",
    "max_tokens": 8,
}


@settings(max_examples=200, deadline=None)
@given(
    path=st.sampled_from(POSTS),
    body=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=5),
    valid=st.booleans(),
)
def test_no_body_makes_the_api_fail(path: str, body: dict[str, Any], valid: bool) -> None:
    fuzzed = {**BASE, **body} if valid else body
    raw = json.dumps(fuzzed).encode()
    response = asyncio.run(
        client_of(create_api(ScriptedEngine(), ApiConfig(require_keys=False))).post(
            path, content=raw, headers={"content-type": "application/json"}
        )
    )
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        spoken = dialect_of(path) is ANTHROPIC
        keys = {"message", "type"} if spoken else {"message", "type", "param", "code"}
        assert set(response.json()["error"]) == keys


@settings(max_examples=100, deadline=None)
@given(path=st.sampled_from(POSTS), raw=st.binary(max_size=64))
def test_no_bytes_make_the_api_fail(path: str, raw: bytes) -> None:
    response = asyncio.run(
        client_of(create_api(ScriptedEngine(), ApiConfig(require_keys=False))).post(
            path, content=raw, headers={"content-type": "application/json"}
        )
    )
    assert response.status_code == 400
