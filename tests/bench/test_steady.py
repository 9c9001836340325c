from pathlib import Path

import numpy as np
import pytest
from tests.enclave.llm.llama.random_model import write_model

from cloister.bench import steady
from cloister.bench.steady import Fairness, Growth, Memory


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of these tests has 260 tokens in its vocabulary, none of which must end a stream."""
    monkeypatch.setattr(steady, "BIAS", {257: -100.0})
    monkeypatch.setattr(steady, "_prompt", lambda number, length: tuple((number + at) % 200 for at in range(length)))
    monkeypatch.setattr(steady, "_QUIET_TOKENS", 12)
    monkeypatch.setattr(steady, "_SAMPLES", 4)


def test_counts_the_weights_copy_into_the_peak(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf")
    found = steady.memory(model, cache_bytes_per_token=1024, tokens=1024)
    assert (found.weights, found.cache) == (model.stat().st_size, 1 << 20)
    assert found.peak >= found.resident + found.weights
    assert Memory(100, 100, 220, 400).to_json()["resident_ratio"] == pytest.approx(1.1)


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
