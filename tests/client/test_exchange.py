"""What the middle can do to sealed messages, and what becomes of each: a typed error, or the whole answer."""

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.client.deployment import HANG, Deployment, InnerApp, RecordingHop, Stage, Tampering, frames

from cloister.channel.keys import KeyRing, encode_configs, parse_configs
from cloister.client import AsyncSession, InnerRequest, Session
from cloister.errors import (
    ChannelBroken,
    CloisterError,
    ConnectionFailed,
    KeyUnknown,
    Malformed,
    MalformedEvidence,
    NotTrusted,
    PlaintextRefused,
    TruncatedResponse,
    VerificationFailed,
    WrongUse,
)

NONCE = 32  # bytes before the chunks of a response sealed with AES-256-GCM
HEAD = 7 + 1120  # bytes before the chunks of a request sealed with X-Wing
JSON = ((b"content-type", b"application/json"),)


def ask(session: Session, path: str = "/v1/echo", content: bytes = b"question") -> tuple[int, bytes]:
    answer = session.send(InnerRequest("POST", f"http://enclave.invalid{path}", JSON, content))
    try:
        return answer.status, b"".join(answer)
    finally:
        answer.close()


def stream(session: Session, words: int = 8) -> bytes:
    asked = {"stream": True, "messages": [{"role": "user", "content": "word " * words}]}
    return ask(session, "/v1/chat/completions", json.dumps(asked).encode())[1]


@pytest.fixture
def tampering(deployment: Deployment) -> Tampering:
    return Tampering(deployment.gateway)


@pytest.fixture
def session(deployment: Deployment, tampering: Tampering, stage: Stage) -> Iterator[Session]:
    with Session(stage.show(tampering), policy=deployment.policy) as session:
        yield session


def app_of(deployment: Deployment) -> InnerApp:
    assert isinstance(deployment.app, InnerApp)
    return deployment.app


def test_carries_method_path_query_headers_and_body_and_nothing_of_the_way(
    deployment: Deployment, session: Session
) -> None:
    status, body = ask(session, "/v1/echo%20it?x=%C3%A4", b"question")
    seen = app_of(deployment).seen[0]
    assert (status, json.loads(body)["length"]) == (200, 8)
    assert (seen["method"], seen["path"], seen["query"]) == ("POST", "/v1/echo it", "x=%C3%A4")
    assert (seen["body"], seen["client"], seen["headers"]["host"]) == (b"question", None, "enclave.invalid")
    assert seen["headers"].keys() == {"content-type", "content-length", "host", "date", "cloister-cache-secret"}


def test_headers_of_the_hop_stay_with_the_hop(deployment: Deployment, session: Session) -> None:
    names = (b"Accept-Encoding", b"Connection", b"Date", b"TE", b"Transfer-Encoding", b"Proxy-Authorization", b"Expect")
    headers = (*((name, b"marked") for name in names), (b"Host", b"else.example"), (b"Content-Length", b"9"))
    answer = session.send(InnerRequest("GET", "http://enclave.invalid/v1/echo", (*headers, (b"X-Kept", b"1")), b""))
    answer.close()
    seen = app_of(deployment).seen[0]["headers"]
    assert seen.keys() == {"x-kept", "host", "date", "cloister-cache-secret"}
    assert (seen["host"], seen["date"] != "marked") == ("enclave.invalid", True)


def test_a_recording_hop_sees_no_word_of_request_or_answer(deployment: Deployment, stage: Stage) -> None:
    stage.show(deployment.gateway)
    with RecordingHop(stage.port) as hop:
        with Session(hop.url, policy=deployment.policy) as session:
            headers = (*JSON, (b"authorization", b"Bearer marked-key"))
            content = json.dumps(
                {
                    "stream": True,
                    "model": "marked-model",
                    "messages": [{"role": "user", "content": "marked prompt " * 9}],
                }
            )
            url = "http://enclave.invalid/v1/chat/completions"
            answer = session.send(InnerRequest("POST", url, headers, content.encode()))
            assert b"marked" in b"".join(answer)
            answer.close()
        seen = bytes(hop.seen)
    assert len(seen) > 4096
    # None so short that it could be there by chance.
    for word in (b"marked", b"/v1/chat", b"completions", b"Bearer", b"authorization", b"cache-secret", b'"delta"'):
        assert word not in seen
    assert b"cloister-replica" in seen  # the hop did record, headers too


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5, 7, 100, 1126, 1127, 1128, 1129, 1500, -17, -1])
def test_a_flipped_request_byte_is_refused_and_never_runs(
    deployment: Deployment, tampering: Tampering, session: Session, at: int
) -> None:
    tampering.change_request = lambda body: _flip(body, at)
    with pytest.raises(ChannelBroken):
        ask(session)
    assert app_of(deployment).seen == []


def _flip(body: bytes, at: int) -> bytes:
    at %= len(body)
    return body[:at] + bytes([body[at] ^ 0x10]) + body[at + 1 :]


def test_a_cut_request_never_runs(deployment: Deployment, tampering: Tampering, session: Session) -> None:
    long = b"long " * 9000
    ask(session, content=long)
    parts = frames(tampering.requests[0], HEAD)
    assert len(parts) > 4
    app_of(deployment).seen.clear()
    for count in range(len(parts)):
        for less in (0, 1):
            tampering.change_request = _cutter(HEAD, count, less)
            with pytest.raises(CloisterError):
                ask(session, content=long)
    assert app_of(deployment).seen == []


def _cutter(head: int, count: int, less: int) -> Callable[[bytes], bytes]:
    """Keeps `count` parts (never all: how many a stream has depends on the clock) and, with `less`, all of the next but
    its last byte."""

    def cut(message: bytes) -> bytes:
        parts = frames(message, head)
        kept = min(count, len(parts) - 1)
        return b"".join(parts[:kept]) + (parts[kept][:-1] if less else b"")

    return cut


def test_a_replayed_request_is_refused_and_runs_once(
    deployment: Deployment, tampering: Tampering, session: Session
) -> None:
    ask(session)
    first = tampering.requests[0]
    tampering.change_request = lambda _: first
    with pytest.raises(ChannelBroken):
        ask(session)
    assert len(app_of(deployment).seen) == 1


def test_an_answer_cut_anywhere_never_ends_well(tampering: Tampering, session: Session) -> None:
    whole = stream(session)
    count = len(frames(tampering.responses[0], NONCE))
    assert count >= 4
    for kept in range(count):
        for less in (0, 1):
            tampering.change_response = _cutter(NONCE, kept, less)
            with pytest.raises((TruncatedResponse, Malformed, ChannelBroken)) as caught:
                stream(session)
            if kept:
                assert isinstance(caught.value, TruncatedResponse)
    tampering.change_response = None
    assert _words(stream(session)) == _words(whole)


@pytest.mark.anyio
async def test_the_async_session_takes_no_cut_answer_for_a_whole_one(
    deployment: Deployment, tampering: Tampering, stage: Stage
) -> None:
    tampering.change_response = lambda body: b"".join(frames(body, NONCE)[:-1])
    async with AsyncSession(stage.show(tampering), policy=deployment.policy) as session:
        asked = {"stream": True, "messages": [{"role": "user", "content": "some words"}]}
        url = "http://enclave.invalid/v1/chat/completions"
        answer = await session.send(InnerRequest("POST", url, JSON, json.dumps(asked).encode()))
        with pytest.raises(TruncatedResponse):
            _ = [part async for part in answer]
        await answer.aclose()


def _words(body: bytes) -> list[bytes]:
    return [line for line in body.split(b"\n") if line.startswith(b"data: ")]


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "reordered": lambda parts: [parts[0], parts[2], parts[1], *parts[3:]],
    "duplicated": lambda parts: [parts[0], parts[1], parts[1], *parts[2:]],
    "dropped": lambda parts: [parts[0], *parts[2:]],
    "first sealed as final": lambda parts: [parts[0], b"\0" + parts[1][2:]],
    "longer": lambda parts: [*parts, b"x"],
    "another nonce": lambda parts: [bytes(32), *parts[1:]],
    "emptied": lambda _: [],
    "a length of 2^60": lambda parts: [parts[0], b"\xd0" + bytes(7), *parts[1:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_rearranged_answer_never_ends_well(tampering: Tampering, session: Session, change: str) -> None:
    tampering.change_response = lambda body: b"".join(CHANGES[change](frames(body, NONCE)))
    with pytest.raises((ChannelBroken, Malformed)):
        stream(session)


def test_every_part_of_an_answer_is_held_against_a_flip(tampering: Tampering, session: Session) -> None:
    stream(session)
    parts = frames(tampering.responses[0], NONCE)
    start = 0
    for part in parts:
        for offset in (0, 1, len(part) // 2, len(part) - 1):
            tampering.change_response = lambda body, at=start + offset: _flip(body, min(at, len(body) - 1))
            with pytest.raises((ChannelBroken, Malformed)):
                stream(session)
        start += len(part)


def test_an_answer_to_another_request_does_not_open(tampering: Tampering, session: Session) -> None:
    ask(session)
    first = tampering.responses[0]
    tampering.change_response = lambda _: first
    with pytest.raises((ChannelBroken, Malformed)):
        ask(session)


def test_rotated_keys_lead_to_a_new_verification_and_one_more_try(deployment: Deployment, session: Session) -> None:
    ask(session)
    deployment.renew_keys()
    assert ask(session)[0] == 200
    assert deployment.attested == 2
    assert len(app_of(deployment).seen) == 2


def test_a_restarted_enclave_has_another_key_of_the_same_name(deployment: Deployment, session: Session) -> None:
    ask(session)
    before = deployment.ring.ohttp_keys
    deployment.renew_keys(same_names=True)
    after = deployment.ring.ohttp_keys
    assert (after[2], after == before) == (before[2], False)
    assert ask(session)[0] == 200
    assert deployment.attested == 2


def test_a_refusal_to_open_is_not_tried_again_on_the_same_keys(
    deployment: Deployment, tampering: Tampering, session: Session
) -> None:
    tampering.change_request = lambda body: _flip(body, -1)
    with pytest.raises(ChannelBroken):
        ask(session)
    assert (len(tampering.requests), deployment.attested) == (1, 2)


def _wrong_key(body: bytes) -> bytes:
    return bytes([body[0] ^ 0x80]) + body[1:]


def test_an_unknown_key_is_not_tried_again_on_the_same_keys(
    deployment: Deployment, tampering: Tampering, session: Session
) -> None:
    tampering.change_request = _wrong_key
    with pytest.raises(KeyUnknown):
        ask(session)
    assert (len(tampering.requests), deployment.attested) == (1, 2)


def test_keys_that_stay_unknown_are_an_error_after_one_try(
    deployment: Deployment, tampering: Tampering, session: Session
) -> None:
    def renew(body: bytes) -> bytes:
        deployment.renew_keys()
        return _wrong_key(body)

    tampering.change_request = renew
    with pytest.raises(KeyUnknown):
        ask(session)
    assert (len(tampering.requests), deployment.attested) == (2, 2)


def test_a_wrong_clock_costs_one_more_try_and_is_then_remembered(
    deployment: Deployment, tampering: Tampering, session: Session
) -> None:
    session.verify()
    deployment.offset = 900.0
    assert ask(session)[0] == 200
    assert len(tampering.requests) == 2
    assert ask(session)[0] == 200
    assert len(tampering.requests) == 3
    assert len(app_of(deployment).seen) == 2


def test_a_clock_that_stays_wrong_costs_one_more_try_and_no_third(
    deployment: Deployment, tampering: Tampering, session: Session
) -> None:
    def later(body: bytes) -> bytes:
        deployment.offset += 300.0
        return body

    session.verify()
    tampering.change_request = later
    assert ask(session)[0] == 400
    assert len(tampering.requests) == 2
    assert app_of(deployment).seen == []


@pytest.mark.parametrize(
    "url",
    [
        "http://enclave.example/v1/models",
        "http://127.0.0.1/v1/models",
        "https://enclave.invalid:8443/v1",
        "http://user@enclave.invalid/v1",
        "ftp://enclave.invalid/v1",
        "http://enclave.invalid[/v1",
    ],
)
def test_another_authority_is_wrong_use_before_anything_is_sent(
    deployment: Deployment, tampering: Tampering, session: Session, url: str
) -> None:
    with pytest.raises(WrongUse):
        session.send(InnerRequest("GET", url, (), b""))
    assert (deployment.attested, tampering.requests) == (0, [])


def test_a_failure_inside_before_an_answer_is_a_sealed_error_without_details(session: Session) -> None:
    status, body = ask(session, "/v1/breaks-early", b"marked prompt")
    assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")
    assert b"marked" not in body


@pytest.mark.anyio
async def test_an_enclave_that_ends_before_its_answer_has_begun_did_not_answer(
    deployment: Deployment, stage: Stage
) -> None:
    """Its outer head and nonce came, which say nothing."""

    async def dies(scope: Any, receive: Any, send: Any) -> None:
        left = 2 if scope["method"] == "POST" else 100

        async def until(message: Any) -> None:
            nonlocal left
            if not left:
                raise ConnectionResetError
            left -= 1
            await send(message)

        await deployment.gateway(scope, receive, until)

    url = stage.show(dies)
    with Session(url, policy=deployment.policy) as session, pytest.raises(ConnectionFailed, match="did not answer"):
        ask(session)
    async with AsyncSession(url, policy=deployment.policy) as other:
        with pytest.raises(ConnectionFailed, match="did not answer"):
            await other.send(InnerRequest("POST", "http://enclave.invalid/v1/echo", JSON, b"question"))


def test_a_failure_inside_amid_an_answer_is_a_truncated_response(deployment: Deployment, stage: Stage) -> None:
    with Session(stage.show(deployment.gateway), policy=deployment.policy) as session:
        answer = session.send(InnerRequest("POST", "http://enclave.invalid/v1/breaks-late", JSON, b"x"))
        parts = []
        with pytest.raises(TruncatedResponse):
            for part in answer:
                parts.append(part)  # noqa: PERF402 (what came before the error is looked at)
        answer.close()
    assert b"half" in b"".join(parts)


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (422, b"https://iana.org/assignments/http-problem-types#ohttp-key"),
        (400, b"https://cloister.invalid/problems/not-opened"),
    ],
)
def test_a_host_that_runs_a_request_and_denies_it_does_not_get_another(
    deployment: Deployment, stage: Stage, status: int, problem: bytes
) -> None:
    denial = Impostor(deployment, status, b'{"type":"%s"}' % problem, b"application/problem+json")

    async def deny(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            await deployment.gateway(scope, receive, _hide)
        await denial(scope, receive, send)

    with Session(stage.show(deny), policy=deployment.policy) as session, pytest.raises(ChannelBroken):
        ask(session)
    assert (len(app_of(deployment).seen), deployment.attested) == (1, 2)


async def _hide(_: object) -> None:
    pass


@pytest.mark.parametrize("status", [200, 307, 400, 403, 413, 429, 500, 503])
def test_another_refusal_is_not_tried_again_even_on_other_keys(
    deployment: Deployment, stage: Stage, status: int
) -> None:
    refusal = Impostor(deployment, status, b"", b"text/plain", location=b"/.well-known/ohttp-gateway")
    asked = []

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            asked.append(scope["path"])
            deployment.renew_keys()
        await refusal(scope, receive, send)

    with (
        Session(stage.show(refuse), policy=deployment.policy) as session,
        pytest.raises((PlaintextRefused, ConnectionFailed)) as caught,
    ):
        ask(session)
    assert str(status) in str(caught.value)
    assert (len(asked), deployment.attested) == (1, 1)


@pytest.mark.parametrize(("method", "error"), [("POST", PlaintextRefused), ("GET", MalformedEvidence)])
def test_what_never_ends_is_read_no_further_than_it_is_of_use_and_let_go(
    deployment: Deployment, stage: Stage, method: str, error: type[CloisterError]
) -> None:
    gone = threading.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] != method:
            await deployment.gateway(scope, receive, send)
            return
        headers = [(b"content-type", b"application/cmw+json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(5 << 20), "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    with Session(stage.show(endless), policy=deployment.policy) as session:
        with pytest.raises(error) as caught:
            ask(session)
        assert gone.wait(HANG)  # while the error, and all that it refers to, is still held
        assert caught.value.__traceback__ is not None


def test_the_way_there_is_no_other_s_and_leaves_no_mark(
    deployment: Deployment, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No proxy of the environment stands before this machine's own ports; no cookie comes back to whoever set it."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    seen: set[bytes] = set()

    async def marking(scope: Any, receive: Any, send: Any) -> None:
        seen.update(name for name, _ in scope["headers"])

        async def mark(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"set-cookie", b"you=marked; Path=/")]
            await send(message)

        await deployment.gateway(scope, receive, mark)

    with Session(stage.show(marking), policy=deployment.policy) as session:
        for _ in range(2):
            assert ask(session)[0] == 200
    ours = {b"content-type", b"content-length", b"incremental", b"cloister-replica"}
    assert seen == ours | {b"host", b"accept", b"accept-encoding", b"user-agent"}


def test_a_proxy_of_the_environment_stands_before_other_machines_alone(
    deployment: Deployment, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees where to, and what anybody on the way sees."""
    asked: list[str] = []

    async def seen(scope: Any, receive: Any, send: Any) -> None:
        asked.append(dict(scope["headers"])[b"host"].decode())
        await deployment.gateway({**scope, "path": urlsplit(scope["path"]).path}, receive, send)

    proxy = stage.show(seen)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy.removeprefix("http://"))
    with Session("http://far.invalid", policy=deployment.policy) as session, pytest.raises(VerificationFailed):
        session.verify()  # a simulated enclave on another machine
    assert asked == ["far.invalid"]
    monkeypatch.setenv("no_proxy", "example.org, far.invalid")
    with Session("http://far.invalid", policy=deployment.policy) as session, pytest.raises(ConnectionFailed):
        session.verify()
    assert asked == ["far.invalid"]


@pytest.mark.parametrize("proxy", ["nonsense://p:1", "http://[::1"])
def test_a_proxy_of_the_environment_that_is_none_says_so(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    for name in ("ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", proxy)
    for kind in (Session, AsyncSession):
        with pytest.raises(WrongUse, match="proxy") as caught:
            kind("https://far.invalid", policy=deployment.policy)
        assert "NO_PROXY" in str(caught.value.hint)


def test_a_session_that_requires_post_quantum_keys_seals_to_no_others(
    deployment: Deployment, tampering: Tampering, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    classical = encode_configs(parse_configs(deployment.ring.ohttp_keys)[1:])
    monkeypatch.setattr(KeyRing, "ohttp_keys", classical)
    url = stage.show(tampering)
    with Session(url, policy=deployment.policy, require_pq=True) as strict, pytest.raises(NotTrusted):
        ask(strict)
    assert tampering.requests == []
    with Session(url, policy=deployment.policy) as session:
        assert ask(session)[0] == 200


class Impostor:
    """Serves genuine evidence, and answers sealed requests in plaintext."""

    def __init__(
        self, deployment: Deployment, status: int, body: bytes, media_type: bytes, *, location: bytes = b""
    ) -> None:
        self._gateway = deployment.gateway
        self._answer = status, body, media_type
        self._location = [(b"location", location)] if location else []

    async def __call__(self, scope: dict[str, object], receive: object, send: Callable[..., object]) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._gateway(scope, receive, send)  # type: ignore[arg-type]
            return
        status, body, media_type = self._answer
        headers = [(b"content-type", media_type), *self._location]
        await send({"type": "http.response.start", "status": status, "headers": headers})  # type: ignore[misc]
        await send({"type": "http.response.body", "body": body})  # type: ignore[misc]


@pytest.mark.parametrize(
    ("status", "media_type", "error"),
    [
        (200, b"application/json", PlaintextRefused),
        (200, b"text/event-stream", PlaintextRefused),
        (200, b"message/ohttp-chunked-res", CloisterError),
        (201, b"message/ohttp-chunked-res", PlaintextRefused),
        (302, b"text/html", PlaintextRefused),
        (400, b"application/json", PlaintextRefused),
        (503, b"text/html", ConnectionFailed),
    ],
)
@pytest.mark.parametrize("body", [b'{"choices":[{"message":{"content":"forged \x1b[2J\xe2\x80\xae"}}]}', b"[" * 60_000])
def test_a_plaintext_answer_is_never_an_answer(
    deployment: Deployment, stage: Stage, status: int, media_type: bytes, error: type[CloisterError], body: bytes
) -> None:
    impostor = Impostor(deployment, status, body, media_type)
    with Session(stage.show(impostor), policy=deployment.policy) as session:
        with pytest.raises(error) as caught:
            ask(session)
        assert "\x1b" not in (caught.value.got or "")
        assert "\u202e" not in (caught.value.got or "")
