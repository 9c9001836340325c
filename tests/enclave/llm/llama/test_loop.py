from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.enclave.llm.llama.random_model import write_model

from cloister.enclave.llm.engine import Delta, Done, Event, Sampling, Started
from cloister.enclave.llm.llama.config import KV_TYPES, VARIANTS, LoopSettings
from cloister.enclave.llm.llama.loop import DecodeLoop, Job
from cloister.enclave.llm.llama.model import Model, SelfTestError, _abort_callback
from cloister.errors import CloisterError, MalformedModel, WrongUse

ALICE, BOB = b"a" * 32, b"b" * 32
GREEDY = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)


def job(number: int, text: str, model: Model, sampling: Sampling = GREEDY, scope: bytes | None = None) -> Job:
    return Job(number, tuple(model.tokenize(text)), sampling, scope, 0)


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


def test_says_what_each_stream_alone_would_say(loop: DecodeLoop, model: Model) -> None:
    prompts = [f"{n} a prompt of its own" * (1 + n) for n in range(8)]
    alone = []
    for number, prompt in enumerate(prompts):
        loop.submit(job(number, prompt, model))
        alone.append(text_of(drain(loop)[number]))
    for number, prompt in enumerate(prompts):
        loop.submit(job(100 + number, prompt, model))
    together = drain(loop)
    assert [text_of(together[100 + number]) for number in range(8)] == alone
    assert len(set(alone)) == 8


def test_streams_share_their_steps(loop: DecodeLoop, model: Model) -> None:
    for number in range(8):
        loop.submit(job(number, f"p{number}", model))
    drain(loop)
    assert (loop.stats.prefill_chunks, loop.stats.decode_steps) == (1, 23)
    assert loop.stats.tokens_generated == 8 * 24


def test_finishes_more_streams_than_it_has_slots_in_order(loop: DecodeLoop, model: Model) -> None:
    for number in range(20):
        loop.submit(job(number, f"prompt {number}", model))
    events = drain(loop)
    assert list(events) == list(range(20))
    for stream in events.values():
        assert isinstance(stream[0], Started)
        assert isinstance(stream[-1], Done)
        assert stream[-1].completion_tokens == 24


def test_makes_streams_wait_when_the_cells_are_promised(library: Any, model_path: Path) -> None:
    small = Model(library, model_path, LoopSettings(slots=4, context=256, kv_tokens=256))
    loop = DecodeLoop(library, small, slots=4)
    whole = Sampling(max_tokens=None, temperature=0.0, ignore_eos=True)
    for number in range(3):
        loop.submit(job(number, "x" * 100, small, whole))
    events = drain(loop)
    for number in range(3):
        assert events[number][-1] == Done("length", 100, 156, 0)
    assert loop.stats.pauses == 0, "each needs them all"
    small.close()


def test_streams_share_cells_until_they_run_out_and_then_the_youngest_pauses(
    library: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.enclave.llm.llama.loop._GROWTH", 16)
    small = Model(library, model_path, LoopSettings(slots=4, context=256, kv_tokens=256))
    loop = DecodeLoop(library, small, slots=4)
    whole = Sampling(max_tokens=120, temperature=0.0, ignore_eos=True)
    alone = []
    for number in range(3):
        loop.submit(job(number, f"{number}" * 60, small, whole))
        alone.append(text_of(drain(loop)[number]))
    for number in range(3):
        loop.submit(job(10 + number, f"{number}" * 60, small, whole))
    events = dict[int, list[Event | CloisterError]]()
    for number, event in loop.step():
        events.setdefault(number, []).append(event)
    assert len(events) == 3, "all run, where one and a half could have reserved the most that they may need"
    for number, more in drain(loop).items():
        events[number] += more
    assert [text_of(events[10 + number]) for number in range(3)] == alone
    assert [events[10 + number][-1] for number in range(3)] == [Done("length", 60, 120, 0)] * 3
    assert loop.stats.pauses >= 1
    small.close()


def test_reuses_a_prefix_inside_one_scope_only(loop: DecodeLoop, model: Model) -> None:
    prompt = "the same long prompt, word for word" * 8

    def evaluated(number: int, scope: bytes | None) -> tuple[int, int]:
        before = loop.stats.prompt_tokens_evaluated
        loop.submit(job(number, prompt, model, scope=scope))
        done = drain(loop)[number][-1]
        assert isinstance(done, Done)
        return loop.stats.prompt_tokens_evaluated - before, done.cached_tokens

    length = len(model.tokenize(prompt))
    assert evaluated(1, ALICE) == (length, 0)
    assert evaluated(2, BOB) == (length, 0)
    assert evaluated(3, None) == (length, 0)
    assert evaluated(4, None) == (length, 0)
    assert evaluated(5, ALICE) == (1, length - 1)
    assert evaluated(6, BOB) == (1, length - 1)


def test_a_paused_stream_can_be_cancelled(library: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.enclave.llm.llama.loop._GROWTH", 16)
    small = Model(library, model_path, LoopSettings(slots=2, context=256, kv_tokens=256))
    loop = DecodeLoop(library, small, slots=2)
    for number in (1, 2):
        loop.submit(job(number, f"{number}" * 60, small, Sampling(max_tokens=120, temperature=0.0, ignore_eos=True)))
    while not loop.stats.pauses:
        loop.step()
    loop.cancel(2)
    events = drain(loop)
    assert events[1][-1] == Done("length", 60, 120, 0)
    assert not any(isinstance(event, Done) for event in events.get(2, []))
    assert not loop.forgotten(2)
    small.close()


def test_prompts_that_come_together_read_what_they_share_once(loop: DecodeLoop, model: Model) -> None:
    for number in range(4):
        loop.submit(job(number, "one system prompt for everybody " * 8 + str(number), model, scope=ALICE))
    shared = len("one system prompt for everybody " * 8)
    events = drain(loop)
    assert loop.stats.prompt_tokens_evaluated == shared + 4
    assert [events[number][-1] for number in range(4)] == [
        Done("length", shared + 1, 24, 0 if number == 0 else shared) for number in range(4)
    ]


def test_prompts_that_come_together_share_with_one_that_ended_at_once(loop: DecodeLoop, model: Model) -> None:
    once = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
    shared = len("one system prompt for everybody " * 8)
    for number in range(4):
        loop.submit(job(number, "one system prompt for everybody " * 8 + str(number), model, once, scope=ALICE))
    events = drain(loop)
    assert loop.stats.prompt_tokens_evaluated == shared + 4
    assert [events[number][-1] for number in range(1, 4)] == [Done("length", shared + 1, 1, shared)] * 3


def test_a_resumed_stream_may_find_all_that_it_lost_in_an_older_one(library: Any, tmp_path: Path) -> None:
    """Two of one scope say the same, pause, and come back together: the younger waits, and then has nothing to read."""
    path = write_model(tmp_path / "long.gguf", context=4096)
    small = Model(library, path, LoopSettings(slots=3, context=2048, kv_tokens=2048))
    loop = DecodeLoop(library, small, slots=3)
    loop.submit(job(1, "o" * 400, small, Sampling(max_tokens=1640, temperature=0.0, ignore_eos=True)))
    for number in (2, 3):
        twin = Sampling(max_tokens=880, temperature=0.0, ignore_eos=True)
        loop.submit(job(number, "same prompt " * 10, small, twin, scope=ALICE))
    events = drain(loop)
    assert loop.stats.pauses == 2
    for number in (2, 3):
        last = events[number][-1]
        assert isinstance(last, Done)
        assert (last.prompt_tokens, last.completion_tokens) == (120, 880)
    assert text_of(events[3])[:200] == text_of(events[2])[:200]  # later on, another order of additions may tell
    small.close()


def test_what_was_read_too_long_is_not_held_against_a_later_prompt(
    loop: DecodeLoop, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, decode = [0.0], model.decode

    def timed(items: Any) -> None:
        decode(items)
        now[0] += 10.0 if len(items) > 8 else 0.01

    monkeypatch.setattr("cloister.enclave.llm.llama.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(model, "decode", timed)
    loop.submit(job(1, "short", model, Sampling(max_tokens=900, temperature=0.0, ignore_eos=True)))
    loop.step()
    loop.submit(job(2, "z" * 60, model, Sampling(max_tokens=1, temperature=0.0)))
    while loop._owed >= 0:
        loop.step()
    assert loop._owed < -5
    for _ in range(400):
        loop.step()
    before = loop._owed
    for _ in range(100):
        loop.step()
    assert loop._owed == pytest.approx(min(4.0, before + 100 * 0.01 * 0.4))


def test_a_chunk_that_began_just_now_waits_for_prompts_that_come_at_the_same_moment(
    loop: DecodeLoop, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, rows, decode = [0.0], [], model.decode
    arrivals = [(job(2, "b" * 20, model), 0.03), (job(3, "c" * 20, model), 0.03)]

    def arriving(items: Any) -> None:
        rows.append(len(items))
        if arrivals:
            late, after = arrivals.pop(0)
            now[0] += after
            loop.submit(late)
            loop.regroup(late.number)
        decode(items)

    monkeypatch.setattr("cloister.enclave.llm.llama.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(model, "decode", arriving)
    loop.submit(job(1, "a" * 20, model))
    events = drain(loop)
    first = [number for number in rows if number > 3]
    assert first == [20, 40, 20], "the second joins the first; the third comes too late for that"
    assert {number: type(events[number][-1]) for number in events} == {1: Done, 2: Done, 3: Done}


def test_prompts_wait_for_one_that_is_being_prepared_but_not_for_long(
    loop: DecodeLoop, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1.0]
    monkeypatch.setattr("cloister.enclave.llm.llama.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    loop.expect(1)
    assert loop.gathering() == 0, "nobody waits yet"
    loop.submit(job(1, "a" * 20, model))
    assert loop.gathering() == 0, "nobody else comes"
    loop.expect(2)
    assert loop.gathering() == pytest.approx(0.05)
    now[0] += 0.03
    assert loop.gathering() == pytest.approx(0.02)
    now[0] += 0.03
    assert loop.gathering() == 0


def test_nobody_waits_for_prompts_beside_an_answer(loop: DecodeLoop, model: Model) -> None:
    loop.submit(job(1, "running", model, Sampling(max_tokens=40, temperature=0.0, ignore_eos=True)))
    while not loop.stats.decode_steps:
        loop.step()
    loop.submit(job(2, "reading", model))
    loop.expect(3)
    assert loop.gathering() == 0


def test_a_prompt_does_not_wait_for_those_that_came_with_others_before(
    loop: DecodeLoop, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1.0]
    monkeypatch.setattr("cloister.enclave.llm.llama.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    loop.submit(job(1, "a" * 20, model))
    loop.expect(2)
    assert loop.gathering() > 0
    loop.cancel(1)
    loop.cancel(2)
    assert loop.forgotten(2)
    assert loop.step() == []
    loop.submit(job(3, "b" * 20, model))
    assert loop.gathering() == 0


def regrouping(loop: DecodeLoop, model: Model, number: int) -> Callable[[Any], None]:
    """`model.decode`, in the midst of which a job's coming is told."""
    decode = model.decode

    def told(items: Any) -> None:
        loop.regroup(number)
        decode(items)

    return told


def test_a_chunk_is_not_begun_again_for_a_prompt_that_it_reads(
    loop: DecodeLoop, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's word of its coming may arrive after it."""
    monkeypatch.setattr(model, "decode", regrouping(loop, model, 1))
    loop.submit(job(1, "reading", model))
    drain(loop)
    assert loop.stats.aborts == 0


def test_no_chunk_is_begun_again_beside_answers(
    loop: DecodeLoop, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.submit(job(1, "running", model, Sampling(max_tokens=40, temperature=0.0, ignore_eos=True)))
    while not loop.stats.decode_steps:
        loop.step()
    monkeypatch.setattr(model, "decode", regrouping(loop, model, 2))
    loop.submit(job(2, "reading", model))
    drain(loop)
    assert loop.stats.aborts == 0


@pytest.mark.parametrize("scopes", [(ALICE, BOB), (None, None)])
def test_prompts_of_different_scopes_never_share(
    loop: DecodeLoop, model: Model, scopes: tuple[bytes | None, bytes | None]
) -> None:
    for number, scope in enumerate(scopes):
        loop.submit(job(number, "one system prompt for everybody " * 8 + str(number), model, scope=scope))
    drain(loop)
    assert loop.stats.prompt_tokens_reused == 0
    assert loop.stats.prompt_tokens_evaluated == 2 * (len("one system prompt for everybody " * 8) + 1)


def test_a_small_batch_far_in_begins_earlier(library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second question of a long conversation: what is evaluated again is little, and changes no answer."""
    path = write_model(tmp_path / "long.gguf", context=2048)
    model = Model(library, path, LoopSettings(slots=2, kv_tokens=3072))
    loop = DecodeLoop(library, model, slots=2)
    rows: list[int] = []
    decode = model.decode

    def counted(items: Any) -> None:
        rows.append(len(items))
        decode(items)

    monkeypatch.setattr(model, "decode", counted)
    loop.submit(job(1, "x" * 900 + "more", model))
    alone = text_of(drain(loop)[1])
    loop.submit(job(2, "x" * 900, model, scope=ALICE))
    drain(loop)
    rows.clear()
    loop.submit(job(3, "x" * 900 + "more", model, scope=ALICE))
    events = drain(loop)[3]
    assert rows[0] == 64
    assert isinstance(events[0], Started)
    assert events[0].cached_tokens >= 896
    assert text_of(events) == alone
    model.close()


def test_nothing_is_left_in_the_cache_at_rest(loop: DecodeLoop, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    erased = []
    monkeypatch.setattr(model, "erase", lambda _stop: not erased.append(1))  # type: ignore[func-returns-value]
    loop.submit(job(1, "mine", model))
    assert not loop.rest(forget=True), "busy"
    drain(loop)
    assert loop.rest(forget=False)
    assert loop.rest(forget=False)
    assert erased == [1], "once after each use"
    loop.submit(job(2, "kept for the next turn", model, scope=ALICE))
    drain(loop)
    assert not loop.rest(forget=False)
    assert erased == [1]
    assert loop.rest(forget=True)
    assert erased == [1, 1]


def test_an_erasing_that_was_ended_early_is_done_again(loop: DecodeLoop, model: Model) -> None:
    loop.submit(job(1, "mine", model))
    drain(loop)
    assert not loop.rest(forget=False, stop=lambda: True)
    assert loop.rest(forget=False)
    assert loop.rest(forget=False, stop=lambda: True), "nothing is left to be done"


def test_erasing_the_cache_forgets_what_it_held(loop: DecodeLoop, model: Model) -> None:
    loop.submit(job(1, "kept for the next turn", model, scope=ALICE))
    before = text_of(drain(loop)[1])
    loop.rest(forget=True)
    loop.submit(job(2, "kept for the next turn", model, scope=ALICE))
    events = drain(loop)[2]
    assert (text_of(events), events[-1]) == (before, Done("length", 21, 24, 0))


def test_answers_the_same_from_a_reused_prefix(loop: DecodeLoop, model: Model) -> None:
    prompt = "a prompt that is asked twice " * 4
    loop.submit(job(1, prompt, model, scope=ALICE))
    first = text_of(drain(loop)[1])
    loop.submit(job(2, prompt, model, scope=ALICE))
    loop.submit(job(3, prompt, model, scope=ALICE))  # taken from the running one
    again = drain(loop)
    assert text_of(again[2]) == text_of(again[3]) == first
    assert isinstance(again[3][0], Started)
    assert again[3][0].cached_tokens > 0


def test_goes_on_with_the_others_when_one_is_cancelled(loop: DecodeLoop, model: Model) -> None:
    loop.submit(job(1, "first prompt", model))
    undisturbed = text_of(drain(loop)[1])
    for number in (2, 3):
        loop.submit(job(number, "first prompt" if number == 2 else "second prompt, longer", model))
    events: list[tuple[int, Event | CloisterError]] = []
    while loop.busy:
        events += loop.step()
        if sum(n == 3 for n, _ in events) == 5:
            loop.cancel(3)
    assert "".join(e.text for n, e in events if n == 2 and isinstance(e, Delta)) == undisturbed
    assert not any(isinstance(e, Done) for n, e in events if n == 3)
    assert loop.stats.aborts == 0


def test_forgets_a_job_that_is_cancelled_before_it_runs_or_after_it_ended(loop: DecodeLoop, model: Model) -> None:
    loop.expect(1)
    loop.cancel(1)
    loop.submit(job(1, "never seen", model))
    assert drain(loop) == {}
    loop.submit(job(2, "seen", model))
    assert isinstance(drain(loop)[2][-1], Done)
    loop.cancel(2)
    assert not loop.busy


def test_aborts_a_prompt_midway_and_stays_of_use(
    library: Any, slow_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How soon is counted in what llama.cpp still computes: it asks after each node of its graph, hundreds a chunk."""
    asked: list[bool] = []
    before_asking: list[Callable[[], None]] = []

    def watched(found: Any) -> Any:
        question = _abort_callback(found)

        def ask(data: Any) -> bool:
            for act in before_asking:
                act()
            asked.append(bool(question(data)))
            return asked[-1]

        kept.append(found.ggml_abort_callback(ask))
        return kept[-1]

    kept: list[Any] = []
    monkeypatch.setattr("cloister.enclave.llm.llama.model._abort_callback", watched)
    slow = Model(library, slow_path, LoopSettings(slots=2, chunk=512, threads=1))
    loop = DecodeLoop(library, slow, slots=2)
    loop.submit(job(1, "a quick one", slow))
    expected = text_of(drain(loop)[1])
    loop.submit(job(2, "y" * 2000, slow))
    loop.step()
    asked.clear()
    before_asking.append(lambda: loop.cancel(2) if len(asked) == 20 else None)
    drain(loop)
    assert asked == [False] * 20 + [True]
    assert loop.stats.aborts == 1
    loop.submit(job(3, "a quick one", slow))
    assert text_of(drain(loop)[3]) == expected
    slow.close()


def test_lets_running_streams_speak_while_a_long_prompt_is_read(library: Any, slow_path: Path) -> None:
    slow = Model(library, slow_path, LoopSettings(slots=2, threads=1))
    loop = DecodeLoop(library, slow, slots=2)
    loop.submit(job(1, "short", slow, Sampling(max_tokens=400, temperature=0.0, ignore_eos=True)))
    while not any(isinstance(event, Delta) for _, event in loop.step()):
        pass
    loop.submit(job(2, "z" * 3000, slow))
    chunks, steps = loop.stats.prefill_chunks, loop.stats.decode_steps
    while not any(number == 2 and isinstance(event, Delta | Done) for number, event in loop.step()):
        pass
    chunks, steps = loop.stats.prefill_chunks - chunks, loop.stats.decode_steps - steps
    assert steps >= chunks - 1 >= 5
    slow.close()


@pytest.mark.parametrize("cells", [0, 4096])
@pytest.mark.parametrize(("running", "reading"), [(4, 1), (1, 4)])
def test_reading_prompts_takes_its_part_of_the_time_by_number(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: int, reading: int, cells: int
) -> None:
    """By a clock that only the model's work moves: a decode takes 10 ms, reading 1 ms a token."""
    path = write_model(tmp_path / "long.gguf", context=1024)
    model = Model(library, path, LoopSettings(slots=8, kv_tokens=cells))
    loop = DecodeLoop(library, model, slots=8)
    now, spent, chunks, kinds = [0.0], {True: 0.0, False: 0.0}, [], []
    decode = model.decode

    def timed(items: Any) -> None:
        decode(items)
        prompt = len({sequence for _, _, sequence, _ in items}) < len(items)
        seconds = len(items) / 1000 if prompt else 0.01
        now[0] += seconds
        spent[prompt] += seconds
        chunks.append(seconds)
        kinds.append(prompt)

    saved = 0.25
    monkeypatch.setattr("cloister.enclave.llm.llama.loop._MOST_OWED", saved)
    monkeypatch.setattr("cloister.enclave.llm.llama.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    for number in range(running):
        loop.submit(job(number, "short", model, Sampling(max_tokens=900, temperature=0.0, ignore_eos=True)))
    while loop.stats.decode_steps < 2:
        loop.step()
    monkeypatch.setattr(model, "decode", timed)
    for number in range(reading):
        loop.submit(job(100 + number, "z" * 900, model))
    while not any(number >= 100 and isinstance(event, Delta) for number, event in loop.step()):
        pass
    expected = max(0.4, 2 * reading / running)
    assert expected * 0.5 <= (spent[True] - saved) / spent[False] <= expected * 1.5
    assert max(chunks) <= 0.51
    assert chunks[-1] <= (0.16 if reading < running else 0.51), "nothing is saved any more"
    turns = "".join("r" if kind else "d" for kind in kinds)
    assert "rr" not in turns, "every answer goes on after each chunk"
    model.close()


def test_repeats_itself_with_a_seed_and_not_without(loop: DecodeLoop, model: Model) -> None:
    def said(seed: int | None) -> str:
        loop.submit(job(1, "once", model, Sampling(max_tokens=40, temperature=1.5, seed=seed, ignore_eos=True)))
        return text_of(drain(loop)[1])

    assert said(7) == said(7)
    assert said(7) != said(8)
    assert said(None) != said(None)


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_a_draw_cut_down_to_the_best_is_greedy(loop: DecodeLoop, model: Model, fields: dict[str, Any]) -> None:
    loop.submit(job(1, "once", model))
    loop.submit(job(2, "once", model, Sampling(max_tokens=24, temperature=1.0, ignore_eos=True, **fields)))
    events = drain(loop)
    assert text_of(events[1]) == text_of(events[2])


def test_hardly_any_temperature_is_greedy(loop: DecodeLoop, model: Model) -> None:
    """And never so little that the numbers run over."""
    loop.submit(job(1, "once", model))
    for number, temperature in enumerate((1e-4, 1e-6, 1e-38, 1e-44, 1e-300), start=2):
        fields = Sampling(max_tokens=24, temperature=temperature, seed=number, ignore_eos=True)
        loop.submit(job(number, "once", model, fields))
    assert len({text_of(events) for events in drain(loop).values()}) == 1


@pytest.mark.parametrize("fields", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_draws_from_what_the_cut_leaves_and_all_of_it(loop: DecodeLoop, model: Model, fields: dict[str, Any]) -> None:
    loop.submit(job(0, "a", model, Sampling(max_tokens=1, temperature=0.0, logprobs=20, ignore_eos=True)))
    (told,) = (entry for event in drain(loop)[0] if isinstance(event, Delta) for entry in event.logprobs)
    likely = [(entry.token, float(np.exp(entry.logprob))) for entry in told.top]
    before = [sum(share for _, share in likely[:at]) for at in range(len(likely))]
    left = {
        token
        for at, (token, share) in enumerate(likely)
        if at < fields.get("top_k", 99)
        and before[at] < fields.get("top_p", 9)
        and share >= fields.get("min_p", 0) * likely[0][1]
    }
    assert 1 < len(left) < 20
    for seed in range(400):
        draw = Sampling(max_tokens=1, temperature=2.0, seed=seed, logprobs=0, ignore_eos=True, **fields)
        loop.submit(job(1 + seed, "a", model, draw))
    drawn = {
        entry.token
        for events in drain(loop).values()
        for event in events
        if isinstance(event, Delta)
        for entry in event.logprobs
    }
    assert drawn == left


def test_the_repeat_penalty_sees_the_prompt_and_the_answer(loop: DecodeLoop, model: Model) -> None:
    first, second = model.tokenize("q")[0], model.tokenize("r")[0]
    bias = {first: 100.0, second: 80.0}
    for number, (prompt, penalty) in enumerate([("z", 1.0), ("z", 10.0), ("q", 10.0)]):
        fields = Sampling(max_tokens=2, temperature=0.0, logit_bias=bias, repeat_penalty=penalty)
        loop.submit(job(number, prompt, model, fields))
    events = drain(loop)
    assert [text_of(events[0]), text_of(events[1]), text_of(events[2])[0]] == ["qq", "qr", "r"]


def test_obeys_bias_and_penalties(loop: DecodeLoop, model: Model) -> None:
    letter = model.tokenize("q")[0]
    loop.submit(job(1, "once", model, Sampling(max_tokens=5, temperature=0.0, logit_bias={letter: 1000.0})))
    assert text_of(drain(loop)[1]) == "qqqqq"
    biased = Sampling(max_tokens=5, temperature=0.0, logit_bias={letter: 100.0}, presence_penalty=1000.0)
    loop.submit(job(2, "once", model, biased))
    assert text_of(drain(loop)[2]).count("q") == 1
    biased = Sampling(max_tokens=9, temperature=0.0, logit_bias={letter: 100.0}, frequency_penalty=30.0)
    loop.submit(job(3, "once", model, biased))
    assert 1 < text_of(drain(loop)[3]).count("q") < 9


def test_ends_with_the_models_own_end_token(loop: DecodeLoop, model: Model) -> None:
    (end,) = model.end_tokens
    loop.submit(job(1, "once", model, Sampling(max_tokens=5, temperature=0.0, logit_bias={end: 1000.0})))
    assert drain(loop)[1][-1] == Done("stop", 4, 0, 0)


def test_tells_the_models_own_distribution(loop: DecodeLoop, model: Model) -> None:
    hot = Sampling(max_tokens=6, temperature=2.0, seed=1, logprobs=20, ignore_eos=True)
    loop.submit(job(1, "once", model, hot))
    entries = [entry for e in drain(loop)[1] if isinstance(e, Delta) for entry in e.logprobs]
    assert len(entries) == 6
    for entry in entries:
        mass = sum(np.exp(other.logprob) for other in entry.top)
        assert 0.5 < mass <= 1.0 + 1e-6
        assert [o.logprob for o in entry.top] == sorted((o.logprob for o in entry.top), reverse=True)
        assert entry.logprob <= entry.top[0].logprob <= 0.0
        assert entry.raw == model.piece(entry.token, special=True)


@pytest.mark.parametrize("fields", [{"logit_bias": {99999: 1.0}}, {"logit_bias": {-1: 1.0}}, {"repeat_penalty": 0.0}])
def test_refuses_what_no_sampler_can_do_and_serves_the_next(
    loop: DecodeLoop, model: Model, fields: dict[str, Any]
) -> None:
    loop.submit(job(1, "once", model, Sampling(max_tokens=5, **fields)))
    (refusal,) = drain(loop)[1]
    assert isinstance(refusal, WrongUse)
    loop.submit(job(2, "once", model))
    assert isinstance(drain(loop)[2][-1], Done)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rung_of_the_ladder_runs(library: Any, model_path: Path, variant: str) -> None:
    model = Model(library, model_path, LoopSettings(slots=2, variant=variant))
    loop = DecodeLoop(library, model, slots=2)
    loop.submit(job(1, "once", model))
    assert isinstance(drain(loop)[1][-1], Done)
    model.close()


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_every_type_of_cache_serves(library: Any, tmp_path: Path, kv_type: str) -> None:
    path = write_model(tmp_path / "wide.gguf", width=128)
    model = Model(library, path, LoopSettings(slots=2, kv_type=kv_type))
    loop = DecodeLoop(library, model, slots=2)
    loop.submit(job(1, "once", model))
    assert isinstance(drain(loop)[1][-1], Done)
    model.close()


def test_a_cache_that_the_model_cannot_have_is_refused_with_what_to_do(library: Any, model_path: Path) -> None:
    with pytest.raises(MalformedModel) as caught:
        Model(library, model_path, LoopSettings(slots=2, kv_type="q8_0"))  # heads of 16 values, blocks of 32
    assert "f16" in caught.value.hint


def test_a_model_that_computes_nonsense_fails_its_self_test(
    library: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "logits", lambda *_: np.array([1.0, np.nan], dtype=np.float32))
    with pytest.raises(SelfTestError):
        Model(library, model_path, LoopSettings(slots=2))


def test_no_chunk_is_long_enough_to_pass_for_a_hang(loop: DecodeLoop, model: Model) -> None:
    """What the first, small one took tells how much fits into the next."""
    loop.submit(job(1, "x" * 400, model))
    loop.step()
    first = loop.stats.prompt_tokens_evaluated
    loop._prefill_rate = 75.0  # tokens a second, as on a slow machine with a large model
    loop.step()
    assert (first, loop.stats.prompt_tokens_evaluated - first) == (64, 128)


def test_a_job_cancelled_before_it_was_prepared_is_forgotten_once(loop: DecodeLoop) -> None:
    loop.expect(1)
    assert not loop.forgotten(1)
    loop.cancel(1)
    assert loop.forgotten(1)
    assert not loop.forgotten(1)
    assert not loop.busy


def test_a_gap_between_streams_is_filled_and_leaves_no_trace(
    library: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three ends and is kept for its scope: the others go on in one batch, over its sequence."""
    model = Model(library, model_path, LoopSettings(slots=4))
    loop = DecodeLoop(library, model, slots=4)
    longer = Sampling(max_tokens=30, temperature=0.0, ignore_eos=True)
    alone = {}
    for number, word in ((1, "first"), (3, "third")):
        loop.submit(job(number, word, model, longer))
        alone[number] = text_of(drain(loop)[number])
    batches: list[list[tuple[int, int, int, bool]]] = []
    decode = model.decode

    def seen(items: Any) -> None:
        batches.append(list(items))
        decode(items)

    monkeypatch.setattr(model, "decode", seen)
    loop.submit(job(1, "first", model, longer))
    loop.submit(job(2, "kept for the next turn", model, scope=ALICE))
    loop.submit(job(3, "third", model, longer))
    events = drain(loop)
    assert {number: text_of(events[number]) for number in alone} == alone
    held = len(model.tokenize("kept for the next turn")) + 23
    assert [(0, held, 1, False)] == [row for row in batches[-1] if not row[3]]
    assert [row[2] for row in batches[-1]] == [0, 1, 2]
    assert model._lib.llama_memory_seq_pos_max(model._memory, 1) == held - 1
    model.close()


@pytest.mark.parametrize(("cell", "groups"), [(1, [[0, 1, 2]]), (1 << 20, [[0], [1], [2]])])
def test_a_long_conversation_among_short_ones_is_evaluated_with_them_only_where_that_is_cheaper(
    library: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch, cell: int, groups: list[list[int]]
) -> None:
    """Running, and later kept between two that run: all that stand in one batch are evaluated as deep as the deepest."""
    model = Model(library, model_path, LoopSettings(slots=4))
    loop = DecodeLoop(library, model, slots=4)
    few, many = (Sampling(max_tokens=count, temperature=0.0, ignore_eos=True) for count in (12, 30))
    jobs = [job(1, "first", model, many), job(2, "x" * 400, model, few, scope=ALICE), job(3, "third", model, many)]
    alone = {}
    for one in jobs:
        loop.submit(one)
        alone[one.number] = text_of(drain(loop)[one.number])
    while not loop.rest(forget=True):
        pass
    monkeypatch.setattr(model, "cell_size", cell)
    monkeypatch.setattr(model, "weights_size", 1 << 20)
    batches: list[list[int]] = []
    decode = model.decode

    def seen(items: Any) -> None:
        batches.append([row[2] for row in items])
        decode(items)

    monkeypatch.setattr(model, "decode", seen)
    for one in jobs:
        loop.submit(one)
    events = drain(loop)
    assert {number: text_of(events[number]) for number in alone} == alone
    steps = [batch for batch in batches if len(batch) < 4]
    assert all(group in steps for group in groups)
    assert ([0, 1, 2] in steps) == (len(groups) == 1)
    assert batches[-2:] == (groups * 2 if len(groups) == 1 else [[0], [2]])  # the second has ended, and is kept
    model.close()
