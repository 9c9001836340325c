import hashlib
from pathlib import Path

import pytest

from cloister.enclave import lineage as enclave_lineage
from cloister.enclave.lineage import read_lineage_digest
from cloister.models.lineage import MAX_LINEAGE, Found, Lineage, lineage_path

LOADED = "ab" * 32
RECORD = Lineage(LOADED, 5, (Found("toy.gguf", LOADED),), {"a": "0" * 64}).encode()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    lineage_path(tmp_path / "toy.gguf").write_bytes(RECORD)
    return tmp_path / "toy.gguf"


def test_looks_where_the_record_is_written_and_reads_as_much_of_it() -> None:
    assert enclave_lineage._MAX_BYTES == MAX_LINEAGE
    assert lineage_path(Path("toy.gguf")).name == "toy.gguf" + enclave_lineage._SUFFIX


def test_claims_the_exact_bytes_of_the_record(model: Path) -> None:
    assert read_lineage_digest(model, LOADED) == (hashlib.sha256(RECORD).hexdigest(), "")
    lineage_path(model).write_bytes(RECORD + b"\n")
    assert read_lineage_digest(model, LOADED) == (hashlib.sha256(RECORD + b"\n").hexdigest(), "")


def test_without_a_record_nothing_is_claimed_or_wrong(tmp_path: Path) -> None:
    assert read_lineage_digest(tmp_path / "toy.gguf", LOADED) == (None, "")


def test_never_claims_the_record_of_another_file(model: Path) -> None:
    digest, why = read_lineage_digest(model, "cd" * 32)
    assert digest is None
    assert "another file" in why


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"v":2,"sha256":"' + LOADED.encode() + b'"}',
        b'{"v":1,"sha256":"' + LOADED.encode() + b'","sha256":"' + b"cd" * 32 + b'"}',
        b'{"v":1,"sha256":"' + LOADED.upper().encode() + b'"}',
        b" " * (1 << 24) + RECORD,
    ],
)
def test_never_claims_what_is_no_record(model: Path, record: bytes) -> None:
    lineage_path(model).write_bytes(record)
    digest, why = read_lineage_digest(model, LOADED)
    assert digest is None
    assert "malformed" in why


def test_a_record_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    lineage_path(tmp_path / "toy.gguf").mkdir()
    digest, why = read_lineage_digest(tmp_path / "toy.gguf", LOADED)
    assert digest is None
    assert "cannot be read" in why
