import json
from pathlib import Path
from typing import Any

import pytest

from cloister.models.store import Record, cache_directory, file_path, read_record, records, save_record

RECORD = Record(
    repository="acme/toy",
    revision="0" * 40,
    file="sub/toy-q8_0.gguf",
    quantization="Q8_0",
    tags=("", "Q8_0"),
    sha256="1" * 64,
    hub_sha256="1" * 64,
    size=5,
    fetched_at=1_700_000_000,
)


@pytest.fixture
def stored(cache: Path) -> Path:
    path = file_path(RECORD.repository, RECORD.file)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"12345")
    save_record(RECORD)
    return path


def test_a_record_comes_back(stored: Path) -> None:
    assert read_record("acme/toy", "sub/toy-q8_0.gguf") == RECORD
    assert list(records()) == [RECORD]
    assert list(records("acme/other")) == []


def test_names_from_a_hub_stay_inside_the_cache(cache: Path) -> None:
    assert file_path("acme/toy", "../../../etc/passwd.gguf").parent == cache / "acme--toy"


def test_a_file_of_another_size_is_not_whole(stored: Path) -> None:
    stored.write_bytes(b"1234")
    assert list(records()) == []


def test_a_record_without_its_file_is_nothing(stored: Path) -> None:
    stored.unlink()
    assert list(records()) == []


@pytest.mark.parametrize("change", [{"size": "5"}, {"tags": "x"}, {"repository": "acme/other"}, {"sha256": None}])
def test_a_record_that_is_not_one_is_nothing(stored: Path, change: dict[str, Any]) -> None:
    path = stored.with_name(stored.name + ".cloister.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert list(records()) == []


def test_the_cache_follows_xdg_and_ignores_a_relative_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_directory() == cache
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "cloister" / "models"
