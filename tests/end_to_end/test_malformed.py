"""What no program should send, in plaintext and through the proxy: a 4xx of the caller's dialect, and an enclave that goes on."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from tests.end_to_end.proxying import running_proxy

from cloister.cli.local import LocalEnclave

CHAT: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
OPENAI = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
DEEP_GRAMMAR = "root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000
DEEP_SCHEMA = '{"type":"array","items":' * 10_000 + "{}" + "}" * 10_000


@pytest.fixture(scope="module", params=["plaintext", "proxy"])
def client(request: pytest.FixtureRequest, plain_enclave: LocalEnclave) -> Iterator[httpx2.Client]:
    with running_proxy(plain_enclave) as port:
        url = plain_enclave.url if request.param == "plaintext" else f"http://127.0.0.1:{port}"
        with httpx2.Client(base_url=url, timeout=60, trust_env=False) as one:
            yield one


def body(**fields: Any) -> bytes:
    return json.dumps({**CHAT, **fields}).encode()


def told(client: httpx2.Client, path: str, content: bytes) -> tuple[int, str]:
    """The status, and the error's code (OpenAI's dialect) or type (Anthropic's); its envelope is checked."""
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.headers["content-type"] == "application/json"
    whole = answer.json()
    error = whole["error"]
    assert error["message"]
    if path in ANTHROPIC:
        assert whole["type"] == "error"
        return answer.status_code, error["type"]
    assert {"message", "type", "param", "code"} <= set(error)
    return answer.status_code, error["code"]


BROKEN = {
    "cut JSON": b'{"messages": [',
    "no JSON": b"messages=Hello",
    "an array": b"[]",
    "nothing": b"",
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "not a number": b'{"temperature": NaN}',
    "a body without a bottom": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
}


@pytest.mark.parametrize("path", [*OPENAI, *ANTHROPIC])
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_json_is_400(client: httpx2.Client, path: str, name: str) -> None:
    assert told(client, path, BROKEN[name]) == (400, "invalid_request_error" if path in ANTHROPIC else "invalid_json")


@pytest.mark.parametrize(
    ("path", "content", "code"),
    [
        ("/v1/chat/completions", body(messages="Hello"), "invalid_type"),
        ("/v1/chat/completions", body(messages=[1]), "invalid_type"),
        ("/v1/chat/completions", body(stream="yes"), "invalid_type"),
        ("/v1/completions", b'{"prompt": {"text": "Hello"}}', "invalid_type"),
        ("/v1/responses", b'{"input": 5}', "invalid_type"),
        ("/v1/messages", body(max_tokens="four"), "invalid_request_error"),
        ("/v1/messages", body(messages={}), "invalid_request_error"),
        ("/v1/messages/count_tokens", body(messages=[None]), "invalid_request_error"),
    ],
)
def test_wrong_types_are_400(client: httpx2.Client, path: str, content: bytes, code: str) -> None:
    assert told(client, path, content) == (400, code)


@pytest.mark.parametrize("path", [*OPENAI, *ANTHROPIC])
def test_a_body_that_is_too_large_is_413(client: httpx2.Client, path: str) -> None:
    assert told(client, path, b" " * (9 << 20)) == (413, "request_too_large")


@pytest.mark.parametrize("path", [OPENAI[0], ANTHROPIC[0]])
def test_a_body_that_no_seal_holds_is_413_and_the_proxys_own_word(client: httpx2.Client, path: str) -> None:
    status, code = told(client, path, b" " * (33 << 20))
    assert status == 413
    assert code == "request_too_large" or (path in OPENAI and code == "too_large")


@pytest.mark.parametrize(
    ("path", "content", "code"),
    [
        ("/v1/chat/completions", body(grammar=DEEP_GRAMMAR), "invalid_grammar"),
        ("/v1/completions", body(prompt="a", grammar=DEEP_GRAMMAR), "invalid_grammar"),
        ("/v1/chat/completions", body(grammar="root ::= \ufffd("), "invalid_grammar"),
        ("/v1/chat/completions", body(grammar='root ::= root "a"'), "invalid_grammar"),
        (
            "/v1/chat/completions",
            body(response_format=0)[:-2]
            + b'{"type":"json_schema","json_schema":{"name":"x","schema":'
            + DEEP_SCHEMA.encode()
            + b"}}}",
            "invalid_json",
        ),
        (
            "/v1/messages",
            body(output_config=0)[:-2] + b'{"format":{"type":"json_schema","schema":' + DEEP_SCHEMA.encode() + b"}}}",
            "invalid_request_error",
        ),
    ],
    ids=["deep", "deep text", "broken", "endless", "deep schema", "deep schema of a message"],
)
def test_hostile_grammars_are_400_and_the_engine_lives(
    client: httpx2.Client, path: str, content: bytes, code: str
) -> None:
    assert told(client, path, content) == (400, code)
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
