import json
from typing import Any

import pytest

from cloister.enclave.llm.engine import Delta, Done, Event, TokenLogprob
from cloister.enclave.llm.grammar import Grammar
from cloister.enclave.llm.upstream.completions import CompletionReader
from cloister.errors import EngineDied

HEAD = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}


def chunk(text: str, reason: str | None = None, **more: Any) -> bytes:
    return event({**HEAD, "choices": [{"index": 0, "text": text, "finish_reason": reason, **more}]})


def usage(completion: Any = 2, **more: Any) -> bytes:
    counts = {"prompt_tokens": 5, "completion_tokens": completion, "total_tokens": 7, **more}
    return event({**HEAD, "choices": [], "usage": counts})


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


END = b"data: [DONE]\n\n"
WHOLE = chunk("Hé") + chunk("llo", "stop") + usage() + END


def read(*pieces: bytes, **options: Any) -> list[Event]:
    reader = CompletionReader(5, **options)
    found: list[Event] = []
    for piece in pieces:
        found += reader.feed(piece)
    return [*found, *reader.finish()]


def test_reads_an_answer() -> None:
    assert read(WHOLE) == [Delta("Hé", 1), Delta("llo", 1), Done("stop", 5, 2, 0)]


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_however_it_is_cut(size: int) -> None:
    assert read(*(WHOLE[at : at + size] for at in range(0, len(WHOLE), size))) == read(WHOLE)


def test_comments_names_and_carriage_returns_say_nothing() -> None:
    noise = b": ping\r\n\r\nevent: completion\r\nid: 3\r\n"
    assert read(noise + WHOLE.replace(b"\n", b"\r\n")) == read(WHOLE)


def test_tokens_are_counted_as_the_upstream_names_them() -> None:
    found = read(chunk("Hello", token_ids=[1, 2, 3]), chunk("", "length", token_ids=[4]) + usage(4) + END)
    assert found == [Delta("Hello", 3), Delta("", 1), Done("length", 5, 4, 0)]


def test_tokens_that_no_event_told_of_are_told_at_the_end() -> None:
    assert read(chunk("Hello", "stop") + usage(4) + END) == [Delta("Hello", 1), Delta("", 3), Done("stop", 5, 4, 0)]


def test_usage_may_stand_beside_the_last_text() -> None:
    last = event(
        {**HEAD, "choices": [{"index": 0, "text": "a", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
    )
    assert read(last + END) == [Delta("a", 1), Done("stop", 5, 1, 0)]


def test_cached_tokens_are_the_prompts_at_most() -> None:
    cached = usage(prompt_tokens_details={"cached_tokens": 3})
    assert read(chunk("ab", "stop"), cached, END)[-1] == Done("stop", 5, 2, 3)
    assert read(chunk("ab", "stop"), usage(prompt_tokens_details={"cached_tokens": 99}), END)[-1] == Done(
        "stop", 5, 2, 5
    )
    assert read(chunk("ab", "stop"), usage(prompt_tokens_details=None), END)[-1] == Done("stop", 5, 2, 0)


@pytest.mark.parametrize(
    "missing",
    [
        chunk("Hello", "stop") + usage(),
        chunk("Hello", "stop") + END,
        chunk("Hello") + usage() + END,
        chunk("Hello", "stop") + usage() + END[:-3],
        END,
        b"",
    ],
)
def test_an_answer_that_lacks_its_end_is_none(missing: bytes) -> None:
    with pytest.raises(EngineDied):
        read(missing)


@pytest.mark.parametrize(
    "wrong",
    [
        b"data: {\n\n",
        b"data: [1]\n\n",
        b"data: " + b"[" * 100_000 + b"\n\n",
        b"error: it failed\n\n",
        event({"error": {"message": "secret prompt", "code": 500}}),
        event({**HEAD, "choices": None}),
        event({**HEAD, "choices": [{}, {}]}),
        event({**HEAD, "choices": ["text"]}),
        chunk("x", index=1),
        event({**HEAD, "choices": [{"index": 0, "text": None}]}),
        chunk("x", "abort"),
        chunk("x", "content_filter"),
        chunk("x", token_ids=3),
        chunk("", "stop") + chunk("more"),
        b'data: {"choices": [{"index": 0, "text": "\\ud83d"}]}\n\n',
        usage(-1),
        usage("2"),
        usage(2.0),
        usage(prompt_tokens_details={"cached_tokens": "3"}),
        event({**HEAD, "choices": [], "usage": []}),
        chunk("x", logprobs={"tokens": ["x"], "token_logprobs": []}),
        chunk("x", logprobs=3),
        chunk("x", logprobs={"content": [{"token": 1, "logprob": 1}]}),
        chunk("x", logprobs={"content": [{"token": "x", "bytes": [300], "logprob": 1}]}),
        b"x" * (33 << 20),
    ],
)
def test_what_no_such_server_says_ends_the_answer(wrong: bytes) -> None:
    with pytest.raises(EngineDied) as refused:
        read(wrong + WHOLE)
    assert "secret" not in str(refused.value.message)


def test_reads_logprobs_in_completions_form() -> None:
    logprobs = {
        "tokens": ["He", "bytes:\\xe2\\x82"],
        "token_logprobs": [-0.5, None],
        "top_logprobs": [{"He": -0.5, "A": -2}, None],
    }
    (delta, *_) = read(chunk("He", "stop", logprobs=logprobs) + usage() + END)
    first, second = delta.logprobs  # type: ignore[union-attr]
    assert first == TokenLogprob(-1, b"He", -0.5, (TokenLogprob(-1, b"He", -0.5), TokenLogprob(-1, b"A", -2.0)))
    assert (second.raw, second.logprob) == (b"\xe2\x82", float("-inf"))


def test_reads_logprobs_in_llama_servers_form() -> None:
    entry = {
        "id": 7,
        "token": "",
        "bytes": [0xE2],
        "logprob": -1,
        "top_logprobs": [{"id": 8, "token": "b", "logprob": -2}],
    }
    (delta, *_) = read(chunk("", "stop", logprobs={"content": [entry]}) + usage(1) + END)
    assert delta == Delta("", 1, (TokenLogprob(7, b"\xe2", -1.0, (TokenLogprob(8, b"b", -2.0),)),))


GRAMMAR = 'root ::= "{" [0-9]+ "}"'


def test_an_answer_that_keeps_to_its_grammar_is_passed_on() -> None:
    found = read(chunk("{4") + chunk("2}", "stop") + usage() + END, grammar=Grammar(GRAMMAR))
    assert found[-1] == Done("stop", 5, 2, 0)


@pytest.mark.parametrize("text", ["Sure: {42}", "{4x", "{42}!"])
def test_an_upstream_that_ignores_a_grammar_is_caught(text: str) -> None:
    with pytest.raises(EngineDied, match="grammar"):
        read(chunk(text, "stop") + usage() + END, grammar=Grammar(GRAMMAR))


def test_a_grammar_is_ended_unless_the_answer_was_cut() -> None:
    half = chunk("{42")
    with pytest.raises(EngineDied, match="grammar"):
        read(half + chunk("", "stop") + usage() + END, grammar=Grammar(GRAMMAR))
    assert read(half + chunk("", "length") + usage() + END, grammar=Grammar(GRAMMAR))
    assert read(half + chunk("", "stop") + usage() + END, grammar=Grammar(GRAMMAR), whole=False)
