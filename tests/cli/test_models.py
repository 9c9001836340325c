import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from cloister.cli import models
from cloister.errors import ConnectionFailed
from cloister.models.download import Progress
from cloister.models.reference import HubModel
from cloister.models.store import Record, file_path, save_record

Run = Callable[..., Result]
RECORD = Record("acme/toy", "0" * 40, "toy-q8_0.gguf", "Q8_0", ("",), "1" * 64, "1" * 64, 5, 1_700_000_000)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _store(record: Record) -> None:
    path = file_path(record.repository, record.file)
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(record.size))
    save_record(record)


def test_pulling_tells_what_came_and_how_to_serve_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(model: HubModel, *, progress: Progress) -> Record:
        assert model == HubModel("acme/toy", "Q8_0")
        progress("toy-q8_0.gguf", 5, 5)
        return RECORD

    monkeypatch.setattr(models, "pull", pull)
    ran = run("models", "pull", "hf.co/acme/toy:Q8_0")
    assert (ran.exit_code, ran.stdout) == (0, f"toy-q8_0.gguf  5 bytes  sha256 {'1' * 64}\n")
    assert ran.stderr == "cloister serve hf.co/acme/toy:Q8_0\n"


def test_a_hub_that_is_not_there_is_unreachable(run: Run, nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    ran = run("models", "pull", "hf.co/acme/toy")
    assert ran.exit_code == ConnectionFailed.exit_code
    assert "hint: The network is needed" in ran.stderr


@pytest.mark.parametrize("reference", ["default", "missing.gguf", "acme/toy"])
def test_only_a_hubs_model_can_be_pulled(run: Run, reference: str) -> None:
    assert run("models", "pull", reference).exit_code == 2


def test_the_list_is_plain_and_has_a_json_form(run: Run) -> None:
    _store(RECORD)
    shown = run("models", "list").stdout
    assert shown.split() == ["hf.co/acme/toy:Q8_0", "0.0", "MB", "2023-11-14", "sha256", "111111111111…"]
    (told,) = json.loads(run("models", "list", "--json").stdout)
    assert (told["repository"], told["size"]) == ("acme/toy", 5)
    assert Path(told["path"]).read_bytes() == bytes(5)


def test_an_empty_list_names_what_is_always_there(run: Run) -> None:
    ran = run("models", "list")
    assert ran.stdout == ""
    assert "default" in ran.stderr
    assert json.loads(run("models", "list", "--json").stdout) == []
