import json
from pathlib import Path

import pytest
from tests.cli.running import run

from cloister.cli import bench_all
from cloister.cli.main import app


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of each measurement: a process that says what it was asked for, and fails for `steady`."""
    script = "import json, sys; args = sys.argv[1:]; sys.exit(3) if 'steady' in args else print(json.dumps(args))"
    monkeypatch.setattr(bench_all, "_START", script)


def test_all_keeps_a_table_of_each_and_what_was_finished_before_one_failed(tmp_path: Path, scripted: None) -> None:
    done = run(app, "bench", "all", str(tmp_path / "new"))
    assert done.exit_code == 3
    assert "bench steady failed (status 3)" in done.stderr
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"overhead.json", "peers.json", "quant.json"}
    assert json.loads((tmp_path / "new" / "overhead.json").read_text()) == [
        "bench", "overhead", "--shape", "pythia-1b", "--plot", str(tmp_path / "new"), "--json",
    ]  # fmt: skip


@pytest.mark.parametrize("more", [["--text", "a.txt"], ["--model", "tiny"]])
def test_all_asks_for_text_and_model_together(tmp_path: Path, more: list[str]) -> None:
    refused = run(app, "bench", "all", str(tmp_path), *more)
    assert refused.exit_code == 2
    assert "a text and a model" in refused.stderr


def test_all_asks_for_a_text_that_there_is_before_anything_is_measured(tmp_path: Path, scripted: None) -> None:
    refused = run(app, "bench", "all", str(tmp_path / "new"), "--text", str(tmp_path / "none.txt"), "--model", "tiny")
    assert refused.exit_code == 2
    assert "none.txt" in refused.stderr
    assert not (tmp_path / "new").exists()


def test_every_command_of_all_is_one_that_there_is(tmp_path: Path) -> None:
    for arguments in bench_all.commands(tmp_path, "pythia-1b", tmp_path / "text", "tiny").values():
        offered = run(app, "bench", arguments[0], "--help").stdout
        assert all(word in offered for word in arguments if word.startswith("--"))
        assert "--json" in offered
