import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.running import run

from cloister.bench.load import PROMPT_TOKENS
from cloister.bench.shapes import SHAPES, describe, write_random
from cloister.bench.speed import (
    DEFAULT,
    FULL,
    Plan,
    Result,
    Subject,
    Watch,
    choose_context,
    choose_type,
    measure,
    needed_memory,
)
from cloister.bench.timed import SLACK, Arrivals, Timing, summarize
from cloister.cli.main import app
from cloister.enclave.llm.llama.model import PART
from cloister.errors import MalformedModel, WrongUse

GB = 10**9


def plan(folder: Path = Path("/nowhere"), **changes: Any) -> Plan:
    return Plan(**{"streams": (1, 2), "tokens": 4, "seconds": 60.0, "folder": folder, **changes})


def arrivals(*came: list[tuple[float, int]]) -> Arrivals:
    """Streams 1, 2, … and when their tokens came, in the order of time."""
    found = Arrivals(len(came))
    for at, tokens, stream in sorted((at, tokens, stream) for stream, one in enumerate(came, 1) for at, tokens in one):
        found.add(stream, at, tokens)
    return found


# What is made of the times at which tokens came.


def test_speed_is_taken_while_all_streams_run() -> None:
    first = [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1), (5.0, 1), (6.0, 1)]
    second = [(4.5, 1), (5.0, 1), (6.0, 1)]
    timing = summarize(arrivals(first, second), 6.5)
    assert timing.measured == 4  # two of each after 4.5, when the second one began
    assert timing.tokens_per_second == 4 / 2.0
    assert timing.with_prompts == 9 / 6.5
    assert timing.first_token == (1.0 + 4.5) / 2


def test_the_time_between_tokens_counts_each_token() -> None:
    timing = summarize(arrivals([(1.0, 1), (1.5, 1), (3.5, 4)]), 3.5)  # four bytes of one character come together
    assert timing.between == pytest.approx(2.5 / 5)
    assert timing.between_p95 == 0.5
    long = summarize(arrivals([(0.1 * at, 1) for at in range(1, 100)] + [(109.9, 1)]), 109.9)
    assert long.between_p95 == pytest.approx(0.1)  # one long pause among a hundred shows in the mean alone
    assert long.between == pytest.approx(109.8 / 99)


def test_a_run_is_long_enough_when_each_stream_had_its_tokens_while_all_ran() -> None:
    began = arrivals([(1.0, 1), (2.0, 1), (3.0, 1)], [(3.5, 1)])
    assert not began.enough(1)
    began.add(1, 4.0, 1)
    began.add(2, 4.0, 1)
    assert began.enough(1)
    assert not began.enough(2)
    assert not arrivals([(1.0, 1), (2.0, 1)], []).enough(1)


def test_streams_that_never_ran_together_give_no_figure() -> None:
    with pytest.raises(MalformedModel):
        summarize(arrivals([(1.0, 1), (2.0, 1)], []), 3.0)
    with pytest.raises(MalformedModel):
        summarize(arrivals([(1.0, 1)]), 3.0)


# What fits.


def test_the_finest_type_that_memory_allows_is_taken() -> None:
    usual = plan(streams=(1, 2, 4, 8, 16), tokens=24)
    assert choose_type(Subject("pythia-12b"), usual, 22 * GB) == "q8_0"
    assert choose_type(Subject("mpt-30b"), usual, 22 * GB) == "q4_0"
    with pytest.raises(WrongUse, match=r"^needs 2\d\.\d GB of memory at q4_0; 22\.0 GB are free$"):
        choose_type(Subject("falcon-40b"), usual, 22 * GB)
    with pytest.raises(WrongUse, match="at q8_0"):
        choose_type(Subject("mpt-30b", type="q8_0"), usual, 22 * GB)


def test_memory_counts_weights_and_the_cache_of_all_streams() -> None:
    model, one, many = describe(SHAPES["mpt-7b"], "q4_0"), plan(streams=(1,)), plan(streams=(16,))
    cache = 4 * 32 * 4096  # bytes of a token
    more = 16 * many.context - one.context
    assert needed_memory(model, one) > model.weights + cache * one.context
    assert needed_memory(model, many) - needed_memory(model, one) > cache * more


def test_every_stream_gets_a_part_of_the_cache_where_memory_allows_it() -> None:
    usual, model = plan(streams=(1, 16), tokens=24), describe(SHAPES["mpt-30b"], "q4_0")
    assert (usual.context, usual.roomy) == (PROMPT_TOKENS + 24 + SLACK * 16, PART)
    assert choose_context(model, usual, 40 * GB) == usual.roomy
    assert choose_context(model, usual, 20 * GB) == usual.context


def test_the_originals_models_are_there() -> None:
    assert set(DEFAULT) < set(FULL) < set(SHAPES)


# The whole way.


def test_measures_shapes_and_real_files_one_by_one(tmp_path: Path) -> None:
    kept = write_random("qwen2-mini", tmp_path, note=lambda _: None)
    told: list[str] = []
    runs: list[None] = []
    watch = Watch(lambda name, what: told.append(f"{name}: {what}"), lambda: runs.append(None))
    subjects = [Subject("llama-mini", type="q4_0"), Subject("qwen2-mini"), Subject("mine", kept)]
    random, there, real = measure(subjects, plan(tmp_path), watch)
    assert (random.quantization, there.quantization, real.quantization) == ("q4_0", "q8_0", "q8_0")
    assert (random.random, real.random) == (True, False)
    assert (random.architecture, random.parameters) == ("llama", SHAPES["llama-mini"].parameters)
    for result in (random, there, real):
        assert not result.missing
        assert [timing.streams for timing in result.timings] == [1, 2]
        assert all(timing.measured >= timing.streams * 4 for timing in result.timings)
        assert all(0 < timing.first_token < 60 and timing.tokens_per_second > 0 for timing in result.timings)
        assert result.resident > result.size > 0
    assert len(runs) == 6
    assert {"llama-mini: loading", "llama-mini: 1 stream", "mine: 2 streams"} <= set(told)
    assert list(tmp_path.iterdir()) == [kept]  # what was written for this is gone, what was there is not


def test_one_bad_model_stops_no_other(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    huge = Subject("falcon-40b", type="f16")
    one, other, last = measure(
        [Subject("broken", broken), huge, Subject("llama-mini")], plan(tmp_path, streams=(1,)), Watch()
    )
    assert one.missing
    assert not one.timings
    assert "GB of memory at f16" in other.missing
    assert last.timings
    assert not last.missing


def test_no_run_begins_after_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 61.0, 61.0])  # begin; first model; its two runs; second model
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    first, second = measure([Subject("llama-mini"), Subject("mpt-mini")], plan(tmp_path, seconds=60.0), Watch())
    assert [timing.streams for timing in first.timings] == [1]
    assert first.missing == second.missing == "the 1 minutes were over"
    assert not second.timings
    assert not list(tmp_path.iterdir())


# The command.


def test_a_prompt_and_an_answer_fit_the_context_of_each_stream() -> None:
    assert plan(streams=(1, 16), tokens=24).context >= PROMPT_TOKENS + 24 + 16


def test_the_command_gives_json_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["--models", "llama-mini, falcon-40b:f16", "--streams", "1,2", "--tokens", "4", "--plot", str(tmp_path)]
    ran = run(app, "bench", "speed", *words, "--json")
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    small, large = told["results"]
    assert (told["tokens"], small["name"], small["random"]) == (4, "llama-mini", True)
    assert [timing["streams"] for timing in small["timings"]] == [1, 2]
    assert large["missing"]
    assert (tmp_path / "speed.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "speed.svg").read_text()
    assert not list((tmp_path / "cache" / "cloister" / "bench").iterdir())


def test_the_table_says_what_is_random_and_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(16, 1.234, 0.05678, 0.1, 192.5, 98.7, 384)
    results = [
        Result(
            "pythia-1b",
            random=True,
            quantization="q8_0",
            resident=GB,
            timings=(timing,),
            missing="the 20 minutes were over",
        ),
        Result("falcon-40b", random=True, missing="needs 23.8 GB of memory at q4_0; 21.5 GB are free"),
    ]
    monkeypatch.setattr("cloister.cli.bench_speed.measure", lambda *_: iter(results))
    ran = run(app, "bench", "speed")
    shown = " ".join(ran.stdout.replace("│", " ").split())
    assert "pythia-1b q8_0, random 1.0 16 1.23 56.8 100.0 192.5 98.7" in shown
    assert "32 tokens" in shown and "24 tokens" in shown
    assert "made here in the model's true shape" in shown
    for word in ("20 minutes", "falcon-40b", "23.8 GB"):
        assert word in shown


@pytest.mark.parametrize(
    "words",
    [("--streams", "0"), ("--streams", "many"), ("--models", "pythia-1b:q9"), ("--models", "no-such-model")],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(words: tuple[str, str]) -> None:
    assert run(app, "bench", "speed", *words).exit_code == 2
