from pathlib import Path

import numpy as np
import pytest
from tests.enclave.llm.llama.random_model import write_model

from cloister.bench import steady
from cloister.bench.shapes import SHAPES, describe
from cloister.bench.steady import Fairness, Growth, Memory
from cloister.models.memory import kv_bytes


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of these tests has 260 tokens in its vocabulary, none of which must end a stream."""
    monkeypatch.setattr(steady, "BIAS", {257: -100.0})
    monkeypatch.setattr(steady, "_prompt", lambda number, length: tuple((number + at) % 200 for at in range(length)))
    monkeypatch.setattr(steady, "_QUIET_TOKENS", 12)
    monkeypatch.setattr(steady, "_SAMPLES", 4)


def test_counts_the_weights_copy_into_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model.gguf")
    size = model.stat().st_size
    monkeypatch.setattr("cloister.bench.process.memory", lambda _pid, field: {"VmRSS": 100, "VmHWM": 150}[field])
    found = steady.memory(model, tokens=1024)
    # a token's cache: two layers, keys and values of two heads of 16 numbers each, two bytes a number
    assert found == Memory(weights=size, cache=1024 * 2 * 2 * 2 * 16 * 2, resident=100, peak=150 + size)
    told = Memory(100, 100, 220, 400).to_json()
    assert told["resident_ratio"] == pytest.approx(1.1)
    assert told["peak_ratio"] == pytest.approx(2.0)


def test_the_cache_of_a_shape_is_that_of_its_layers_and_width() -> None:
    assert kv_bytes(describe(SHAPES["pythia-1b"], "q8_0"), 1) == 2 * 16 * 2048 * 2


def test_a_gap_is_before_beside_or_after_the_long_prompt() -> None:
    """Each stream's first eight tokens, at 1 to 8, do not count."""
    settling = [float(at) for at in range(1, 9)]
    one = [*settling, 10.0, 12.0, 15.0, 19.0, 24.0, 30.0]
    other = [*settling, 9.0, 14.0, 21.0]
    quiet, beside = steady.split([one, other, settling], began=12.0, ended=22.0)
    assert quiet == (2.0,)
    assert beside == (3.0, 4.0, 5.0, 5.0, 7.0)


def test_tells_the_time_before_from_the_time_beside(tmp_path: Path) -> None:
    found = steady.fairness(write_model(tmp_path / "model.gguf", context=8192), streams=2, prompt_tokens=600)
    assert len(found.quiet) >= 2 * 3
    assert found.beside
    row = Fairness(2, 600, (0.1, 0.1), (0.1, 0.3), 1.0).to_json()
    assert (row["ratio"], row["longest_gap_ms"]) == (pytest.approx(2.0), pytest.approx(300.0))


def test_the_slope_is_of_the_later_half() -> None:
    assert Growth((1, 2, 3, 4), (0, 1000, 2000, 2010)).slope == pytest.approx(10.0)
    assert np.isclose(Growth((1, 2, 3, 4), (9, 9, 5, 5)).slope, 0.0)


def test_runs_every_request(tmp_path: Path) -> None:
    steps: list[int] = []
    found = steady.growth(write_model(tmp_path / "model.gguf"), requests=40, on_step=lambda: steps.append(1))
    assert found.requests == (10, 20, 30, 40)
    assert len(steps) == 4
    assert min(found.resident) > 0
