"""The gateway's EHBP, spoken to by the protocol's stock client over loopback, and by an attacker."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ehbp import Client, EHBPTransport, KeyConfigMismatchError, ServerIdentity
from tests.client.deployment import Asgi, InnerApp, Served, Tampering

from cloister.channel.ehbp import MAX_FRAME
from cloister.channel.keys import KeyRing
from cloister.channel.limits import Limits
from cloister.channel.padding import EVENT_MULTIPLE
from cloister.enclave.gateway import Gateway
from cloister.enclave.gateway.problems import Receive, Send

PATHS = frozenset({"/v1/chat/completions", "/v1/echo", "/v1/breaks-early", "/v1/breaks-late", "/v1/own"})
ASK = {"messages": [{"role": "user", "content": "one two three"}]}


class Enclave:
    """A gateway on loopback with the host in front, who sees and changes what he likes; `ring` may be replaced."""

    def __init__(self, app: Asgi | None = None, **options: Any) -> None:
        self.inner = InnerApp()
        self.ring = KeyRing(0.0, ehbp=options.pop("ehbp", True))
        self.gateway = Gateway(
            app or self.inner, self.ring, _no_evidence, ehbp_paths=PATHS, clock=lambda: 0.0, **options
        )
        self.host = Tampering(self.gateway)
        self.served = Served(self._record)

    async def _record(self, scope: Any, receive: Receive, send: Send) -> None:
        await (self.host if self.host.change_request else self.gateway)(scope, receive, send)

    @property
    def url(self) -> str:
        return self.served.url

    def renew_keys(self) -> None:
        self.ring.__init__(0.0, ehbp=True)  # type: ignore[misc]

    def client(self) -> Client:
        return Client.discover(self.url, http_client=httpx.Client(trust_env=False, timeout=60))


async def _no_evidence(nonce: bytes) -> bytes:
    raise NotImplementedError


@pytest.fixture
def enclave() -> Iterator[Enclave]:
    one = Enclave()
    with one.served:
        yield one


def sealed(enclave: Enclave, content: bytes = b"{}") -> tuple[dict[str, str], bytes]:
    key = enclave.ring.ehbp_key
    assert key is not None
    request = ServerIdentity.from_public_key_bytes(key).encrypt_request_body(content)
    return {"Ehbp-Encapsulated-Key": request.encapsulated_key.hex()}, request.body


def post(enclave: Enclave, path: str, headers: Any, body: Any, method: str = "POST", **more: Any) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=60) as client:
        return client.request(method, enclave.url + path, headers=headers, content=body, **more)


def problem(answer: httpx.Response) -> str:
    assert answer.headers["content-type"] == "application/problem+json"
    assert "ehbp-response-nonce" not in answer.headers
    return str(answer.json()["type"]).rpartition("/")[2]


def test_publishes_its_key_as_stock_clients_want_it(enclave: Enclave) -> None:
    answer = httpx.get(f"{enclave.url}/.well-known/hpke-keys", trust_env=False)
    assert (answer.status_code, answer.headers["content-type"], len(answer.content)) == (
        200,
        "application/ohttp-keys",
        41,
    )
    with enclave.client() as client:
        assert client.server_identity.public_key_bytes() == enclave.ring.ehbp_key
    assert post(enclave, "/.well-known/hpke-keys", {}, b"x").status_code == 405


def test_the_stock_client_asks_and_reads_an_answer(enclave: Enclave) -> None:
    with enclave.client() as client:
        answer = client.post("/v1/chat/completions", json_body=ASK)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "one two three"
    (seen,) = enclave.inner.seen
    assert (seen["path"], json.loads(seen["body"])) == ("/v1/chat/completions", ASK)


def test_a_large_body_arrives_whole(enclave: Enclave) -> None:
    body = bytes(range(256)) * 10_000
    with enclave.client() as client:
        answer = client.post("/v1/echo", body=body, headers={"content-type": "application/octet-stream"}).json()
    assert (answer["length"], answer["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())


def test_a_stream_comes_padded_in_blocks(enclave: Enclave) -> None:
    with (
        enclave.client() as client,
        client.stream("POST", "/v1/chat/completions", json_body={**ASK, "stream": True}) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        pieces = list(answer)
    text = b"".join(pieces).decode()
    assert all(len(piece) % EVENT_MULTIPLE == 0 for piece in pieces)
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "one two three "
    assert "data: [DONE]" in text


def test_the_stock_transport_takes_an_error_of_the_app_inside(enclave: Enclave) -> None:
    key = enclave.ring.ehbp_key
    assert key is not None
    with httpx.Client(transport=EHBPTransport.from_public_key_hex(key.hex()), base_url=enclave.url) as client:
        asked = {"messages": [{"role": "user", "content": "fail"}]}
        answer = client.post("/v1/chat/completions", json=asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_such")


def test_a_stale_key_is_told_and_the_client_recovers(enclave: Enclave) -> None:
    with enclave.client() as client:
        enclave.renew_keys()
        with pytest.raises(KeyConfigMismatchError):
            client.post("/v1/echo", json_body={})
    assert enclave.inner.seen == []
    with enclave.client() as client:
        assert client.post("/v1/echo", json_body={}).status_code == 200


def test_a_stale_key_is_told_in_the_protocols_own_words(enclave: Enclave) -> None:
    headers, body = sealed(enclave)
    enclave.renew_keys()
    answer = post(enclave, "/v1/echo", headers, body)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:ietf:params:ehbp:error:key-config")
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_replay_is_refused_on_every_path(enclave: Enclave) -> None:
    headers, body = sealed(enclave)
    assert post(enclave, "/v1/echo", headers, body).status_code == 200
    for path in ("/v1/echo", "/v1/chat/completions"):
        answer = post(enclave, path, headers, body)
        assert (answer.status_code, problem(answer)) == (400, "not-opened")
    assert len(enclave.inner.seen) == 1


@pytest.mark.parametrize("at", [10, -1])
def test_a_tampered_frame_is_refused_and_the_app_sees_nothing(enclave: Enclave, at: int) -> None:
    def change(body: bytes) -> bytes:
        touched = bytearray(body)
        touched[at] ^= 1
        return bytes(touched)

    enclave.host.change_request = change
    with enclave.client() as client:
        if at > 0:  # nobody can tell a first frame that was changed from one for another key
            with pytest.raises(KeyConfigMismatchError):
                client.post("/v1/echo", body=bytes(200_000))
        else:
            answer = client.post("/v1/echo", body=bytes(200_000))
            assert (answer.status_code, answer.json()["type"].endswith("/not-opened")) == (400, True)
    assert enclave.inner.seen == []


@pytest.mark.parametrize("cut", [1, 17, 100_000])
def test_a_body_cut_inside_a_frame_is_refused(enclave: Enclave, cut: int) -> None:
    headers, body = sealed(enclave, bytes(200_000))
    answer = post(enclave, "/v1/echo", headers, body[:-cut])
    assert (answer.status_code, problem(answer)) == (400, "not-opened")
    assert enclave.inner.seen == []


@pytest.mark.parametrize("body", [b"", b"plain text", (MAX_FRAME + 1).to_bytes(4, "big") + bytes(100), bytes(4)])
def test_plain_empty_and_oversized_bodies_are_refused(enclave: Enclave, body: bytes) -> None:
    headers, _ = sealed(enclave)
    answer = post(enclave, "/v1/echo", headers, body)
    assert (answer.status_code, problem(answer)) == (400, "not-opened")
    assert enclave.inner.seen == []


def test_a_request_over_the_limit_is_refused() -> None:
    one = Enclave(limits=Limits(request_bytes=1000))
    with one.served:
        answer = post(one, "/v1/echo", *sealed(one, bytes(1001)))
        assert (answer.status_code, problem(answer)) == (413, "too-large")
        assert post(one, "/v1/echo", *sealed(one, bytes(1000))).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/echo"),
        ("PUT", "/v1/echo"),
        ("POST", "/v1/echo/"),
        ("POST", "/v1/echo?prompt=hello"),
        ("POST", "/v1/other"),
        ("POST", "/health"),
        ("POST", "//v1/echo"),
        ("POST", "/"),
    ],
)
def test_only_post_to_a_listed_path_without_a_query_is_taken(enclave: Enclave, method: str, path: str) -> None:
    answer = post(enclave, path, *sealed(enclave), method=method)
    assert (answer.status_code, problem(answer)) == (403, "plaintext-refused")
    assert enclave.inner.seen == []


def test_plaintext_is_refused_as_ever(enclave: Enclave) -> None:
    answer = post(enclave, "/v1/echo", {}, b"marked prompt")
    assert (answer.status_code, problem(answer)) == (403, "plaintext-refused")
    assert enclave.inner.seen == []


@pytest.mark.parametrize("values", [["ab"], ["zz" * 32], ["ab" * 32, "ab" * 32], [""]])
def test_an_encapsulated_key_that_is_none_is_refused(enclave: Enclave, values: list[str]) -> None:
    headers = [("Ehbp-Encapsulated-Key", value) for value in values]
    answer = post(enclave, "/v1/echo", headers, sealed(enclave)[1])
    assert (answer.status_code, problem(answer)) == (400, "not-opened")
    assert enclave.inner.seen == []


def test_it_is_off_by_default() -> None:
    one = Enclave(ehbp=False)
    with one.served:
        assert httpx.get(f"{one.url}/.well-known/hpke-keys", trust_env=False).status_code == 403
        answer = post(one, "/v1/echo", {"Ehbp-Encapsulated-Key": "ab" * 32}, b"x")
        assert (answer.status_code, problem(answer)) == (403, "plaintext-refused")
        assert one.inner.seen == []


def test_of_the_outer_headers_the_app_gets_those_it_needs(enclave: Enclave) -> None:
    """Anybody on the way reads and sets them: a cache's secret would be none, an address a lie."""
    passed = {"authorization": "Bearer k", "x-api-key": "k", "accept": "text/html", "content-type": "application/json"}
    dropped = {"cloister-cache-secret": "s", "x-forwarded-for": "1.2.3.4", "cookie": "c", "date": "yesterday"}
    headers, body = sealed(enclave)
    assert post(enclave, "/v1/echo", {**headers, **passed, **dropped}, body).status_code == 200
    (seen,) = enclave.inner.seen
    assert seen["headers"] == {**passed, "host": "enclave.invalid", "content-length": "2"}
    assert (seen["client"], seen["query"]) == (None, "")


def test_the_answers_head_shows_its_status_and_what_clients_act_on() -> None:
    async def busy(scope: Any, receive: Receive, send: Send) -> None:
        headers = [(b"Retry-After", b"7"), (b"content-type", b"a/b"), (b"content-length", b"4"), (b"x-secret", b"s")]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": b"busy"})

    one = Enclave(busy)
    with one.served:
        answer = post(one, "/v1/own", *sealed(one))
        with one.client() as client:
            assert client.post("/v1/own", json_body={}).content == b"busy"
    named = {"retry-after", "content-type", "incremental", "cache-control", "x-accel-buffering", "ehbp-response-nonce"}
    assert {*answer.headers} - {"date", "server", "transfer-encoding"} == named
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert len(bytes.fromhex(answer.headers["ehbp-response-nonce"])) == 32
    assert answer.headers["cache-control"] == "no-store, no-transform"
    assert b"busy" not in answer.content


def test_an_answer_without_a_body_still_leaves() -> None:
    async def silent(scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 202, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    one = Enclave(silent)
    with one.served, one.client() as client:
        answer = client.post("/v1/own", json_body={})
    assert (answer.status_code, answer.content) == (202, b"")


def test_an_app_that_breaks_at_once_is_a_sealed_500(enclave: Enclave) -> None:
    with enclave.client() as client:
        answer = client.post("/v1/breaks-early", body=b"marked prompt")
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert b"marked" not in answer.content


def test_an_app_that_breaks_later_cuts_the_connection(enclave: Enclave) -> None:
    with (
        enclave.client() as client,
        client.stream("POST", "/v1/breaks-late", body=b"marked prompt") as answer,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        list(answer)


def test_keys_rotate_under_a_client_that_keeps_its_own() -> None:
    clock = [0.0]
    one = Enclave()
    one.gateway._clock = lambda: clock[0]
    with one.served, one.client() as client:
        clock[0] = 1900.0
        assert client.post("/v1/echo", json_body={}).status_code == 200
        with one.client() as later:
            assert later.server_identity.public_key_bytes() != client.server_identity.public_key_bytes()
            clock[0] = 3700.0
            with pytest.raises(KeyConfigMismatchError):
                client.post("/v1/echo", json_body={})
            assert later.post("/v1/echo", json_body={}).status_code == 200
