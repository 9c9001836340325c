"""What is no request, through the local proxy and straight: the right 4xx, in the caller's dialect, and no engine harmed."""

import json
from collections.abc import Iterator

import httpx2
import pytest
from tests.end_to_end.proxying import running_proxy

from cloister.cli.local import LocalEnclave
from cloister.client import SealedTransport, Session

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
SAID = [{"role": "user", "content": "Hi"}]
MIB = 1 << 20


@pytest.fixture(params=["straight", "proxy"])
def http(request: pytest.FixtureRequest, enclave: LocalEnclave) -> Iterator[httpx2.Client]:
    if request.param == "straight":
        with Session(enclave.url, policy=enclave.policy) as session:
            yield httpx2.Client(transport=SealedTransport(session), base_url="http://enclave.invalid", timeout=60)
    else:
        with (
            running_proxy(enclave) as port,
            httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client,
        ):
            yield client


def refused(http: httpx2.Client, path: str, content: bytes) -> tuple[int, str]:
    """Status and kind of the refusal, whose form is held against the route's dialect."""
    answer = http.post(path, content=content, headers={"content-type": "application/json"})
    told = answer.json()
    if path == MESSAGES:
        assert told["type"] == "error"
        assert told["error"].keys() >= {"type", "message"}
    else:
        assert told["error"].keys() >= {"type", "message", "param", "code"}
        assert "type" not in told
    assert told["error"]["message"]
    return answer.status_code, told["error"]["type"]


def bodies(path: str) -> Iterator[tuple[str, bytes]]:
    good = {RESPONSES: {"input": "Hi"}}.get(path, {"messages": SAID, "max_tokens": 4})
    said = {RESPONSES: {"input": 7}}.get(path, {"messages": "Hi", "max_tokens": 4})
    yield "malformed", b'{"messages": ['
    yield "no object", b"[]"
    yield "invalid UTF-8", b'{"messages": [{"role": "user", "content": "\xff"}]}'
    yield "wrong type", json.dumps({"model": "default", **said}).encode()
    yield "wrong number", json.dumps({"model": "default", **good, "temperature": "hot"}).encode()
    yield "deep", b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_what_is_no_request_is_a_400_in_its_dialect(http: httpx2.Client, path: str) -> None:
    for what, content in bodies(path):
        assert refused(http, path, content) == (400, "invalid_request_error"), what
    assert http.post(CHAT, json={"model": "default", "messages": SAID, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_body_over_the_apis_limit_is_a_413(http: httpx2.Client, path: str) -> None:
    status, kind = refused(http, path, b'{"messages": "' + b"a" * (9 * MIB) + b'"}')
    assert status == 413
    assert kind == ("request_too_large" if path == MESSAGES else "invalid_request_error")


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_33_mib_are_refused_by_the_proxy_itself(enclave: LocalEnclave, path: str) -> None:
    with running_proxy(enclave) as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        status, kind = refused(http, path, bytes(33 * MIB))
    assert (status, kind) == (413, "request_too_large" if path == MESSAGES else "proxy_error")


def test_a_grammar_ten_thousand_deep_is_refused(http: httpx2.Client) -> None:
    asked = {"model": "default", "messages": SAID, "max_tokens": 4}
    schema = '{"type":"array","items":' * 10_000 + "{}" + "}" * 10_000
    form = f'{{"type":"json_schema","json_schema":{{"name":"deep","schema":{schema}}}}}'
    content = json.dumps(asked)[:-1] + f', "response_format": {form}}}'
    assert refused(http, CHAT, content.encode()) == (400, "invalid_request_error")
    grammar = json.dumps({**asked, "grammar": "root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000})
    assert refused(http, CHAT, grammar.encode()) == (400, "invalid_request_error")
    assert http.post(CHAT, json=asked).status_code == 200
