import json
from typing import Any

import pytest
from tests.enclave.llm.llama.random_model import END
from tests.enclave.llm.llama.serving import answer, ask, serve
from tests.enclave.llm.schema_check import is_valid

from cloister.enclave.llm.engine import Delta, Done, Event, Sampling
from cloister.enclave.llm.grammar import Grammar, State
from cloister.enclave.llm.llama.loop import DecodeLoop, Job
from cloister.enclave.llm.llama.model import Model
from cloister.enclave.llm.llama.sampling import _fits
from cloister.enclave.llm.schemas import SchemaWriter
from cloister.errors import CloisterError, WrongUse

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 31}, "maxItems": 3},
        "unit": {"enum": ["kelvin", "celsius", "Łódź"]},
    },
    "required": ["city", "days", "unit"],
}


def bound_to(schema: Any) -> str:
    writer = SchemaWriter()
    return writer.grammar(writer.add(schema, "response_format"))


def job(number: int, model: Model, text: str | None, **sampling: Any) -> Job:
    fields = {"max_tokens": 120, "temperature": 1.0, "seed": number, **sampling}
    grammar = None if text is None else Grammar(text)
    return Job(number, tuple(model.tokenize(f"prompt {number}")), Sampling(**fields), None, 0, grammar)


def drain(loop: DecodeLoop) -> dict[int, list[Event | CloisterError]]:
    found: dict[int, list[Event | CloisterError]] = {}
    while loop.busy:
        for number, event in loop.step():
            found.setdefault(number, []).append(event)
    return found


def text_of(events: list[Event | CloisterError]) -> str:
    return "".join(e.text for e in events if isinstance(e, Delta))


@pytest.fixture
def loop(library: Any, model: Model) -> DecodeLoop:
    return DecodeLoop(library, model, slots=8)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.0}, {"temperature": 2.0, "top_p": 0.5}, {"top_k": 3}, {"repeat_penalty": 1.3}]
)
def test_a_random_model_writes_what_the_schema_wants(loop: DecodeLoop, model: Model, sampling: dict[str, Any]) -> None:
    for number in range(4):
        loop.submit(job(number, model, bound_to(SCHEMA), **sampling))
    for events in drain(loop).values():
        done = events[-1]
        assert isinstance(done, Done)
        assert done.finish_reason == "stop", "it ends where nothing can follow, long before 120 tokens"
        assert is_valid(json.loads(text_of(events)), SCHEMA)


def test_a_bound_stream_leaves_the_others_as_they_are(loop: DecodeLoop, model: Model) -> None:
    loop.submit(job(1, model, None, ignore_eos=True, temperature=0.0))
    alone = text_of(drain(loop)[1])
    loop.submit(job(1, model, None, ignore_eos=True, temperature=0.0))
    loop.submit(job(2, model, bound_to(SCHEMA)))
    loop.submit(job(3, model, 'root ::= "b"+', max_tokens=10, logit_bias={END: -100.0}))
    together = drain(loop)
    assert text_of(together[1]) == alone
    assert is_valid(json.loads(text_of(together[2])), SCHEMA)
    assert set(text_of(together[3])) == {"b"}


def test_a_seed_gives_the_same_bound_answer(loop: DecodeLoop, model: Model) -> None:
    texts = []
    for _ in range(2):
        loop.submit(job(5, model, bound_to({"type": "object"}), max_tokens=60))
        texts.append(text_of(drain(loop)[5]))
    assert texts[0] == texts[1]


def test_control_tokens_fit_no_grammar_and_the_end_only_where_it_may(loop: DecodeLoop, model: Model) -> None:
    """A vocabulary's control tokens have no text of their own: they would pass for nothing."""
    loop.submit(job(1, model, "root ::= .{40}", max_tokens=200, logit_bias={256: 100.0, 259: 100.0, END: 100.0}))
    events = drain(loop)[1]
    assert isinstance(events[-1], Done)
    assert len(text_of(events)) == 40


def test_an_answer_ends_where_it_may_when_the_model_wants_to(loop: DecodeLoop, model: Model) -> None:
    loop.submit(job(1, model, 'root ::= "ab"+', logit_bias={END: 100.0}))
    events = drain(loop)[1]
    assert text_of(events) == "ab"
    assert events[-1] == Done("stop", len("prompt 1"), 2, 0)


def test_an_answer_ends_as_soon_as_it_can_only_end(loop: DecodeLoop, model: Model) -> None:
    loop.submit(job(1, model, 'root ::= "yes"'))
    assert text_of(drain(loop)[1]) == "yes"
    assert loop.stats.decode_steps == 2, "the first token comes of the prompt; none is computed after the last"


def test_a_grammar_that_takes_too_long_is_given_up(
    loop: DecodeLoop, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.enclave.llm.llama.sampling._STEPS_AT_ONCE", 20_000)
    monkeypatch.setattr("cloister.enclave.llm.llama.sampling._STEPS_PER_TOKEN", 10)
    loop.submit(job(1, model, EXPLODING["words"], max_tokens=400, logit_bias={ord("b"): -100.0, ord("c"): -100.0}))
    loop.submit(job(2, model, bound_to(SCHEMA)))
    events = drain(loop)
    refusal = events[1][-1]
    assert isinstance(refusal, WrongUse)
    assert "too long" in refusal.message
    assert is_valid(json.loads(text_of(events[2])), SCHEMA)


def test_many_bytes_of_one_character_are_written_whole(loop: DecodeLoop, model: Model) -> None:
    loop.submit(job(1, model, "root ::= [😀-🙏日本]{5}"))
    events = drain(loop)[1]
    assert len(text_of(events)) == 5
    assert set(text_of(events)) <= {*map(chr, range(0x1F600, 0x1F650)), "日", "本"}


def test_an_answer_at_the_limit_of_nesting_turns_back_and_the_others_go_on(loop: DecodeLoop, model: Model) -> None:
    nested = 'root ::= "(" root ")" | "x"'
    bias = {ord("x"): -100.0}
    loop.submit(job(1, model, nested, logit_bias=bias, temperature=0.0, max_tokens=400))
    loop.submit(job(2, model, None, ignore_eos=True, max_tokens=300))
    events = drain(loop)
    text = text_of(events[1])
    assert 200 < text.count("(") <= 256
    assert text == "(" * text.count("(") + "x" + ")" * (len(text) - text.count("(") - 1)
    assert isinstance(events[2][-1], Done)
    assert events[2][-1].completion_tokens == 300


def test_looking_through_many_tokens_follows_each_beginning_once() -> None:
    grammar = Grammar('root ::= [ \\t]* "}"')
    known: dict[bytes, State | None] = {b"": grammar.start}
    pieces = [b" " * (n % 5) + b"words"[n % 3 :] + str(n).encode() for n in range(5000)]
    assert not any(_fits(grammar, piece, known) for piece in pieces)
    assert _fits(grammar, b"   }", known)
    assert _fits(grammar, b" \t", known)
    assert not _fits(grammar, b"", known)
    assert grammar.steps < 200


class _Mute:
    """A vocabulary without the one token that the grammar wants."""

    def __init__(self, model: Model, without: int) -> None:
        self._model, self._without = model, without

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return b"" if token == self._without else self._model.piece(token, special=special)


def test_a_vocabulary_that_cannot_say_it_is_refused(library: Any, model: Model) -> None:
    mute: Any = _Mute(model, without=ord("q"))
    loop = DecodeLoop(library, mute, slots=8)
    loop.submit(job(1, mute, 'root ::= "q"'))
    loop.submit(job(2, mute, 'root ::= "r"'))
    events = drain(loop)
    refusal = events[1][-1]
    assert isinstance(refusal, WrongUse)
    assert "grammar" in refusal.message
    assert text_of(events[2]) == "r"
    assert not loop.busy


def test_a_token_that_ends_answers_is_no_text_even_if_it_has_some(library: Any, model: Model) -> None:
    class Ending(_Mute):
        end_tokens = frozenset({END, ord("z")})

    ending: Any = Ending(model, without=-1)
    loop = DecodeLoop(library, ending, slots=8)
    loop.submit(job(1, ending, 'root ::= "za" | "ya"', logit_bias={ord("z"): 100.0}))
    assert text_of(drain(loop)[1]) == "ya"


HOSTILE = {
    "cannot be read": "root ::= (((",
    "left recursion": "root ::= root",
    "too long": "#" * (300 << 10),
    "too many ways": "root ::= a0\n"
    + "".join(f'a{n} ::= a{n + 1} "x" | a{n + 1} "y"\n' for n in range(40))
    + 'a40 ::= "z"',
}
EXPLODING = {
    "words": 'root ::= "b" | "a" r r | "a" s r\nr ::= "a" r r | "a" s s | "c"\ns ::= "a" r s | "a" s r | "c"',
    "stars": 'root ::= ((("a"+)+)+)+ "b"',
    "counts": 'root ::= "a"{0,60000} "a"{0,60000} "a"{0,60000} "b"',
}


@pytest.mark.anyio
async def test_hostile_grammars_are_refused_and_the_engine_lives(model_path: Any) -> None:
    async with serve(model_path) as engine:
        pid = engine.pid
        for text in HOSTILE.values():
            with pytest.raises(WrongUse):
                await answer(engine, ask("x", grammar=text))
        for text in EXPLODING.values():
            try:
                found = await answer(engine, ask("x", grammar=text, logit_bias={ord("b"): -100.0, ord("c"): -100.0}))
                assert set(found.text) <= set("abc")
            except WrongUse:
                pass  # beyond the limits
        assert (await answer(engine, ask("x", grammar='root ::= "yes"'))).text == "yes"
        assert engine.pid == pid
