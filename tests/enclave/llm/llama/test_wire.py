import contextlib
import json
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.enclave.llm.engine import Delta, Done, Event, GenerateRequest, Prompt, Sampling, Started, TokenLogprob
from cloister.enclave.llm.llama import wire
from cloister.errors import CloisterError, ContextLengthExceeded, MalformedMessage, MalformedModel, WrongUse

EVENTS: list[Event] = [
    Started(5, 2, 1),
    Delta("tèxt \ud7ff", 3),
    Delta("x", 1, (TokenLogprob(7, b"\xff", -0.5, (TokenLogprob(8, b"", -1.5),)),)),
    Done("length", 5, 9, 2),
]


def over_the_wire(value: object) -> Any:
    (message,) = wire.FrameReader(1 << 20).feed(wire.frame({"v": value}))
    return message["v"]


@pytest.mark.parametrize("event", EVENTS)
def test_events_arrive_as_they_were_sent(event: Event) -> None:
    assert wire.decode_event(over_the_wire(wire.encode_event(3, event))) == (3, event)


@pytest.mark.parametrize(
    "error",
    [
        ContextLengthExceeded(limit=10, prompt=8, requested=12),
        WrongUse("no", hint="do"),
        MalformedModel("bad", hint="try"),
    ],
)
def test_errors_arrive_with_their_kind_and_words(error: CloisterError) -> None:
    number, found = wire.decode_event(over_the_wire(wire.encode_event(3, error)))
    assert (number, type(found), str(found)) == (3, type(error), str(error))


def test_requests_arrive_as_they_were_sent() -> None:
    sampling = Sampling(max_tokens=3, stop=("a", "b"), logit_bias={5: -1.5}, logprobs=2, seed=1 << 60)
    sampling = replace(sampling, grammar='root ::= "é"')
    messages: tuple[dict[str, Any], ...] = ({"role": "user", "content": "x"},)
    tools = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)
    for prompt in (Prompt(messages=messages, tools=tools), Prompt(text="é"), Prompt(tokens=(1, 2))):
        request = GenerateRequest(prompt, sampling, scope=b"s" * 32, truncate_prompt=True, count_prompt=True)
        assert wire.decode_request(over_the_wire(wire.encode_request(1, request))) == request


def test_cuts_a_stream_into_messages_however_it_arrives() -> None:
    data = b"".join(wire.frame({"n": n, "pad": "x" * n}) for n in range(40))
    for step in (1, 3, 7, len(data)):
        reader = wire.FrameReader(1000)
        found = [m["n"] for at in range(0, len(data), step) for m in reader.feed(data[at : at + step])]
        assert found == list(range(40))


def test_refuses_a_length_beyond_its_limit_before_it_arrives() -> None:
    reader = wire.FrameReader(100)
    assert reader.feed(struct.pack("<I", 100)) == []
    with pytest.raises(MalformedMessage):
        wire.FrameReader(100).feed(struct.pack("<I", 101))


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"1", b"\xff\xfe", b"[" * 90000])
def test_refuses_what_is_no_json_object(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        wire.FrameReader(1 << 20).feed(struct.pack("<I", len(body)) + body)


@pytest.mark.parametrize(
    "item",
    [
        None,
        [],
        [1],
        [1, "q"],
        [1, "s", 1, 2],
        [1, "s", 1, 2, True],
        [1, "s", 1, 2, -1],
        [1, "d", 5, 1],
        [1, "d", "x", 1.5],
        [1, "d", "x", 1, [[1, "zz", 0.0, []]]],
        [1, "d", "x", 1, [[1, "aa", 0.0, [[1, "aa", 0.0, [[1, "aa", 0.0, []]]]]]]],
        [1, "d", "x", 1, [[1, "aa", 10**400, []]]],
        [1, "d", "x", 1, [[1, "aa", float("nan"), []]]],
        [1, "d", "x", 1, [[1, "aa", True, []]]],
        [1, "f", "because", 1, 1, 1],
        [1, "x", "EngineDied", "m", "h"],
        [1, "x", "use", 1, "h"],
        [1, "x"],
        ["1", "d", "x", 1],
        [-1, "d", "x", 1],
    ],
)
def test_refuses_an_event_of_another_shape(item: object) -> None:
    with pytest.raises(MalformedMessage):
        wire.decode_event(item)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.lists(st.integers(0, 9) | st.sampled_from(["s", "d", "f", "x"]) | JSON, max_size=7))
def test_an_event_is_decoded_or_refused_and_nothing_else(item: list[object]) -> None:
    with contextlib.suppress(MalformedMessage):
        wire.decode_event(json.loads(json.dumps(item)))


def test_a_models_words_about_itself_lose_what_steers_a_terminal() -> None:
    fields = {
        "name": "a\x1b[2Jb\u202e",
        "quantization": "Q",
        "architecture": "A" * 999,
        "parameters": 1,
        "context_length": 2,
    }
    found = wire.decode_model(fields, name="", sha256="00", size=9, created=1)
    assert found.name == "a [2Jb "
    assert len(found.architecture) == 60
    assert not found.has_chat_template
    assert wire.decode_model(fields, name="mine", sha256="00", size=9, created=1).name == "mine"
    with pytest.raises(MalformedMessage):
        wire.decode_model({**fields, "parameters": "many"}, name="", sha256="00", size=9, created=1)


@pytest.mark.parametrize("fields", [{"calls": "xml"}, {"calls": ["hermes"]}, {"thinking": 5}, {"thinking": "<think>"}])
def test_refuses_a_model_that_writes_calls_or_thoughts_in_no_known_way(fields: dict[str, Any]) -> None:
    known = {"name": "x", "quantization": "Q", "architecture": "A", "parameters": 1, "context_length": 2}
    found = wire.decode_model({**known, "calls": "hermes", "thinking": "opened"}, name="", sha256="", size=1, created=1)
    assert (found.calls, found.thinking) == ("hermes", "opened")
    with pytest.raises(MalformedMessage):
        wire.decode_model({**known, **fields}, name="", sha256="", size=1, created=1)
