import json
from pathlib import Path

import pytest
from tests.cli.running import run

from cloister.bench.load import Run
from cloister.bench.overhead import Comparison, FirstToken, FreedSlot
from cloister.bench.shapes import SHAPES, write_random
from cloister.cli.main import app


def test_ratios_are_taken_pair_by_pair() -> None:
    raw = (Run(1, 100, 1.0, (0.1,)), Run(1, 100, 2.0, (0.2,)))  # the machine slowed down by half in between
    sealed = (Run(1, 100, 1.25, (0.11,)), Run(1, 100, 2.5, (0.21,)))
    assert Comparison(1, raw, sealed).ratios == [0.8, 0.8]
    assert FirstToken((0.1, 0.2, 0.3), (0.11, 0.22, 0.31)).added == pytest.approx(0.01)
    assert FreedSlot((0.1, 0.2, 0.3), (0.15, 0.26, 0.34)).held == pytest.approx(0.05)


def test_measures_the_sealed_path_against_the_bare_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ran = run(
        app,
        "bench",
        "overhead",
        "--shape",
        "pythia-70m",
        "--streams",
        "1,2",
        "--tokens",
        "8",
        "--repeats",
        "1",
        "--json",
    )
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    runs = told["runs"]
    assert told["first_token"]["pairs"] == 21
    assert told["freed_slot"]["pairs"] == 7
    assert told["freed_slot"]["after_cancel_ms"] > 0
    assert [one["streams"] for one in runs] == [1, 2]
    assert all(one["raw_tokens_per_second"] > 0 and one["sealed_tokens_per_second"] > 0 for one in runs)


def test_a_model_cut_short_is_not_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", cut)
    with pytest.raises(OSError, match="disk full"):
        write_random("pythia-70m", tmp_path, note=lambda _line: None)
    assert not list(tmp_path.glob("*.gguf"))
    assert set(SHAPES) == {"pythia-1b", "pythia-70m"}
