import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from cloister.cli.dialogue import Asking, Conversation, Reply
from cloister.errors import (
    CloisterError,
    ConnectionFailed,
    EngineDied,
    EngineLoading,
    MalformedMessage,
    QueueFull,
    TruncatedResponse,
    Unauthorized,
    WrongUse,
)


def _client(handler: Callable[[httpx2.Request], httpx2.Response]) -> httpx2.Client:
    return httpx2.Client(transport=httpx2.MockTransport(handler), base_url="http://enclave.invalid")


def _delta(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


def _sse(*events: dict[str, Any] | str) -> bytes:
    return b"".join(
        f"data: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n".encode()
        for event in events
    )


def _reply(content: bytes | Iterator[bytes], status: int = 200) -> Reply:
    client = _client(lambda request: httpx2.Response(status, content=content))
    return Conversation(client).ask("hello")


def test_an_answer_arrives_in_pieces_with_its_end_and_usage() -> None:
    reply = _reply(_sse(_delta("Hel"), _delta("lo"), END, USAGE, "[DONE]"))
    assert list(reply) == ["Hel", "lo"]
    assert (reply.text, reply.finish_reason, reply.usage["prompt_tokens"]) == ("Hello", "stop", 3)


def test_bytes_may_be_cut_anywhere_and_padding_is_dropped() -> None:
    stream = b": pad\n\n" + _sse(_delta("h\u2028é\x85")).replace(b"\n", b"\r\n") + b": pad\n\n" + _sse(END, "[DONE]")
    reply = _reply(iter([stream[i : i + 1] for i in range(len(stream))]))
    assert list(reply) == ["h\u2028é\x85"]


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        _sse(_delta("Hel")),
        _sse(_delta("Hel"), END),
        _sse(_delta("Hel"), END, USAGE),
        _sse(_delta("Hel"), "[DONE]"),
        _sse(_delta("Hel"), END, "[DONE]")[:-1],
    ],
    ids=["empty", "no end", "no done", "usage but no done", "done without reason", "half a line end"],
)
def test_an_answer_without_its_end_is_never_whole(stream: bytes) -> None:
    with pytest.raises(TruncatedResponse):
        list(_reply(stream))


@pytest.mark.parametrize("data", ["{", "[1]", '"x"', "[" * 100_000])
def test_an_event_that_is_no_object_is_malformed(data: str) -> None:
    with pytest.raises(MalformedMessage):
        list(_reply(_sse(data)))


def test_an_endless_line_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="too large"):
        list(_reply(iter([b"x" * (1 << 20)] * 8)))


def _error(code: str, kind: str = "server_error") -> dict[str, Any]:
    return {"error": {"message": "No.", "type": kind, "param": None, "code": code}}


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (401, _error("invalid_api_key", "invalid_request_error"), Unauthorized),
        (400, _error("context_length_exceeded", "invalid_request_error"), WrongUse),
        (404, _error("model_not_found", "invalid_request_error"), WrongUse),
        (429, _error("queue_full", "rate_limit_error"), QueueFull),
        (503, _error("model_loading"), EngineLoading),
        (503, _error("engine_died"), EngineDied),
        (500, {"error": "text"}, EngineDied),
        (500, {}, EngineDied),
    ],
)
def test_what_the_api_refuses_becomes_an_error_of_ours(status: int, body: dict[str, Any], expected: type) -> None:
    with pytest.raises(CloisterError) as caught:
        list(_reply(json.dumps(body).encode(), status))
    assert type(caught.value) is expected


def test_an_error_page_that_is_no_json_is_told_by_its_status() -> None:
    with pytest.raises(EngineDied, match="status 502"):
        list(_reply(b"<html>" * 100_000, 502))


@pytest.mark.parametrize(
    ("event", "expected"),
    [(_error("engine_died"), EngineDied), (_error("invalid_request", "invalid_request_error"), WrongUse)],
)
def test_an_error_in_the_middle_of_a_stream_is_raised(event: dict[str, Any], expected: type) -> None:
    reply = _reply(_sse(_delta("Hel"), event, END, "[DONE]"))
    with pytest.raises(CloisterError) as caught:
        list(reply)
    assert type(caught.value) is expected
    assert reply.finish_reason == ""


def test_a_lost_connection_is_unreachable() -> None:
    def fail(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadError("gone")

    with pytest.raises(ConnectionFailed):
        list(Conversation(_client(fail)).ask("hello"))


def _recording(sent: list[tuple[str, dict[str, Any]]]) -> httpx2.Client:
    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append((request.url.path, json.loads(request.content)))
        return httpx2.Response(200, content=_sse(_delta("yes"), END, "[DONE]"))

    return _client(answer)


def test_kept_turns_and_the_system_prompt_are_resent() -> None:
    sent: list[tuple[str, dict[str, Any]]] = []
    talk = Conversation(_recording(sent), Asking(max_tokens=9, temperature=0.5, seed=7), system="Be brief.")
    reply = talk.ask("one")
    list(reply)
    talk.keep("one", reply)
    list(talk.ask("two"))
    path, body = sent[-1]
    assert path == "/v1/chat/completions"
    assert [(message["role"], message["content"]) for message in body["messages"]] == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "yes"),
        ("user", "two"),
    ]
    assert (body["max_tokens"], body["temperature"], body["seed"], body["stream"]) == (9, 0.5, 7, True)


def test_raw_text_goes_alone_and_without_a_template() -> None:
    sent: list[tuple[str, dict[str, Any]]] = []
    talk = Conversation(_recording(sent), Asking(raw=True))
    reply = talk.ask("Once upon")
    list(reply)
    talk.keep("Once upon", reply)
    path, body = sent[0]
    assert (path, body["prompt"]) == ("/v1/completions", "Once upon")
    assert "messages" not in body
    assert talk.turns == []


def test_a_raw_answer_is_read_too() -> None:
    events = _sse(
        {"choices": [{"text": " a", "finish_reason": None}]}, {"choices": [{"text": "", "finish_reason": "length"}]}
    )
    reply = Conversation(
        _client(lambda request: httpx2.Response(200, content=events + _sse("[DONE]"))), Asking(raw=True)
    ).ask("Once")
    assert list(reply) == [" a"]
    assert reply.finish_reason == "length"
