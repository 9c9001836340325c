import hashlib
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.models.header import Header

from cloister.errors import MalformedModel, WrongUse
from cloister.models.lineage import (
    Digests,
    Fetched,
    Found,
    Lineage,
    Quantized,
    digest_model,
    lineage_path,
    parse_lineage,
    read_lineage,
    save_lineage,
    steps_of,
    trace,
)

SOURCE, RESULT = "1" * 64, "2" * 64
STEPS = (
    Fetched("acme/toy", "0" * 40, "toy-f16.gguf", SOURCE),
    Quantized("llama.cpp", "llama-cpp-python 0.3.36", "3" * 64, "Q4_0", False, RESULT),  # noqa: FBT003
)
LINEAGE = Lineage(RESULT, 5, STEPS, {"b": "4" * 64, "a": "5" * 64})


def test_a_record_has_one_spelling_and_comes_back() -> None:
    data = LINEAGE.encode()
    assert parse_lineage(data) == LINEAGE
    assert data.startswith(b'{"sha256":"2222')
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
    assert LINEAGE.digest() == hashlib.sha256(data).hexdigest()
    assert Lineage(RESULT, 5, STEPS, {"a": "5" * 64, "b": "4" * 64}).encode() == data


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"size": "5"},
        {"size": True},
        {"size": 5.0},
        {"sha256": "2" * 63},
        {"sha256": SOURCE},  # the last step gave another file
        {"steps": []},
        {"steps": [{"action": "stolen", "sha256": RESULT}]},
        {"steps": [{"action": "found", "sha256": RESULT}]},
        {"steps": [{"action": "found", "file": 1, "sha256": RESULT}]},
        {"steps": [{"action": "found", "file": "a", "sha256": RESULT, "more": "b"}]},
        {"steps": [3]},
        {"tensors": {"a": "G" * 64}},
        {"tensors": []},
        {"surprise": 1},
    ],
)
def test_refuses_what_is_no_record(change: dict[str, Any]) -> None:
    raw = {**json.loads(LINEAGE.encode()), **change}
    with pytest.raises(MalformedModel):
        parse_lineage(json.dumps(raw, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"\xff", b"[" * 100_000, LINEAGE.encode() + b"\n", b" " + LINEAGE.encode()]
)
def test_refuses_another_spelling(data: bytes) -> None:
    with pytest.raises(MalformedModel):
        parse_lineage(data)


def test_digests_every_tensor_and_the_whole_file_at_once(tmp_path: Path) -> None:
    path, header = tmp_path / "toy.gguf", Header()
    start = len(header.encode())
    content = bytearray(header.file())
    content[start : start + 204] = b"q" * 204
    content[start + 224 :] = b"n" * 256
    path.write_bytes(content)
    assert digest_model(path) == Digests(
        hashlib.sha256(content).hexdigest(),
        len(content),
        {
            "token_embd.weight": hashlib.sha256(b"q" * 204).hexdigest(),
            "norm.weight": hashlib.sha256(b"n" * 256).hexdigest(),
        },
    )


def test_a_file_that_is_not_understood_has_a_digest_and_no_tensors(tmp_path: Path) -> None:
    (tmp_path / "toy.gguf").write_bytes(b"12345")
    assert digest_model(tmp_path / "toy.gguf") == Digests(hashlib.sha256(b"12345").hexdigest(), 5, {})
    with pytest.raises(WrongUse):
        digest_model(tmp_path / "missing.gguf")


def test_a_record_is_of_the_file_that_the_last_step_gave() -> None:
    assert trace(Digests(RESULT, 5, LINEAGE.tensors), *STEPS) == LINEAGE
    with pytest.raises(MalformedModel):
        trace(Digests(SOURCE, 5, {}), *STEPS)


def test_a_record_lies_beside_its_file(tmp_path: Path) -> None:
    model = tmp_path / "toy.gguf"
    assert read_lineage(model) is None
    save_lineage(model, LINEAGE)
    assert lineage_path(model).read_bytes() == LINEAGE.encode()
    assert read_lineage(model) == LINEAGE
    assert list(tmp_path.iterdir()) == [lineage_path(model)]


@contextmanager
def full_disk() -> Iterator[None]:
    """As good as: no file of this process may become longer than ten bytes, those that pytest writes included."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_record_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    model = tmp_path / "toy.gguf"
    lineage_path(model).write_bytes(b"old")
    with pytest.raises(OSError, match="File too large"), full_disk():
        save_lineage(model, LINEAGE)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_record_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    lineage_path(tmp_path / "toy.gguf").mkdir()
    with pytest.raises(IsADirectoryError):
        save_lineage(tmp_path / "toy.gguf", LINEAGE)
    assert list(tmp_path.iterdir()) == [lineage_path(tmp_path / "toy.gguf")]


def test_steps_are_taken_over_only_for_the_same_bytes(tmp_path: Path) -> None:
    model = tmp_path / "toy.gguf"
    save_lineage(model, LINEAGE)
    assert steps_of(model, RESULT) == STEPS
    assert steps_of(model, SOURCE) == (Found("toy.gguf", SOURCE),)
    lineage_path(model).write_bytes(b"{}")
    assert steps_of(model, RESULT) == (Found("toy.gguf", RESULT),)
