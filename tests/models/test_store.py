import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloister.errors import WrongUse
from cloister.models.lineage import lineage_path
from cloister.models.store import (
    Record,
    cache_directory,
    embedded_path,
    file_path,
    find_record,
    quantized_models,
    quantized_name,
    quantized_path,
    read_record,
    records,
    remove,
    save_record,
)

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


@pytest.mark.parametrize("tag", ["", "q8_0", "Q8_0", "sub/toy-q8_0.gguf"])
def test_finds_a_model_by_what_it_was_asked_for_or_is(stored: Path, tag: str) -> None:
    assert find_record("acme/toy", tag) == RECORD
    assert find_record("acme/toy", "Q4_0") is None
    assert find_record("acme/other", tag) is None


def store(record: Record) -> Record:
    path = file_path(record.repository, record.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(record.size))
    save_record(record)
    return record


def test_a_file_without_a_quantization_is_not_the_usual_choice(cache: Path) -> None:
    plain = store(replace(RECORD, file="a.gguf", quantization="", tags=("a.gguf",)))
    assert find_record("acme/toy", "") is None
    assert find_record("acme/toy", "A.gguf") == plain
    usual = store(replace(RECORD, file="z-q8_0.gguf", tags=("",)))
    assert find_record("acme/toy", "") == usual


def test_what_was_asked_for_comes_before_what_merely_is(cache: Path) -> None:
    small = store(replace(RECORD, file="a-q8_0.gguf", tags=("a-q8_0.gguf",)))
    usual = store(replace(RECORD, file="b-q8_0.gguf", tags=("q8_0",)))
    assert find_record("acme/toy", "Q8_0") == usual
    exact = store(replace(RECORD, file="c-q8_0.gguf", tags=("Q8_0",)))
    assert find_record("acme/toy", "Q8_0") == exact
    assert find_record("acme/toy", "q8_0") == usual
    assert find_record("acme/toy", "a-q8_0.gguf") == small


def test_a_record_that_cannot_be_put_in_place_leaves_nothing(stored: Path) -> None:
    path = stored.with_name(stored.name + ".cloister.json")
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        save_record(RECORD)
    assert sorted(stored.parent.iterdir()) == [stored, path]


def test_removing_a_fetched_model_leaves_nothing_of_it(stored: Path) -> None:
    other = stored.with_name("other.gguf")
    for path in (lineage_path(stored), stored.with_name(stored.name + ".lock"), other):
        path.touch()
    stored.with_name(stored.name + ".0123.partial").touch()
    remove(stored)
    assert list(stored.parent.iterdir()) == [other]


def make(name: str) -> Path:
    path = quantized_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_lists_and_removes_what_was_quantized_here(cache: Path) -> None:
    assert list(quantized_models()) == []
    path, other = make("toy-Q4_0"), make("atoy-Q8_0")
    make(".toy-Q4_0.gguf.x")  # a draft
    assert list(quantized_models()) == [other, path]
    remove(path)
    assert list(quantized_models()) == [other]


def test_removes_a_file_anywhere_that_has_a_record_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "toy.gguf"
    path.touch()
    lineage_path(path).touch()
    remove(path)
    assert list(tmp_path.iterdir()) == []


def test_removes_neither_embedded_models_nor_what_others_made(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="comes with the package"):
        remove(embedded_path("tiny"))
    link = tmp_path / "link.gguf"
    link.symlink_to(embedded_path("tiny"))
    lineage_path(link).touch()
    with pytest.raises(WrongUse, match="comes with the package"):
        remove(link)
    own = tmp_path / "own.gguf"
    own.touch()
    with pytest.raises(WrongUse, match="neither fetched nor made"):
        remove(own)
    assert embedded_path("tiny").is_file()
    assert own.is_file()


@pytest.mark.parametrize(
    ("stem", "name"),
    [("toy", "toy-Q4_0"), ("Qwen2.5 (new)", "Qwen2.5-new-Q4_0"), ("..", "model-Q4_0"), ("a--b..c", "a-b.c-Q4_0")],
)
def test_a_quantized_model_gets_a_name_that_a_reference_may_have(stem: str, name: str) -> None:
    assert quantized_name(stem, "Q4_0") == name
