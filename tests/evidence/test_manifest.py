import hashlib
import subprocess
from pathlib import Path

import pytest

from cloister.errors import MalformedEvidence
from cloister.evidence.manifest import manifest, manifest_digest


def test_a_person_can_repeat_it(tmp_path: Path) -> None:
    contents = {"b.py": b"two", "a.py": b"one", "Z.so": b"three"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    command = "sha256sum b.py a.py Z.so | LC_ALL=C sort | sha256sum"
    said = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    entries = {name: hashlib.sha256(content).digest() for name, content in contents.items()}
    assert said.split()[0] == manifest_digest(entries).hex()


def test_order_does_not_matter_but_names_and_contents_do() -> None:
    one, two = bytes(32), bytes([1]) * 32
    assert manifest_digest({"a": one, "b": two}) == manifest_digest({"b": two, "a": one})
    assert len({manifest_digest(e) for e in ({"a": one}, {"b": one}, {"a": two}, {}, {"a": one, "b": one})}) == 5


def test_of_nothing_is_the_hash_of_nothing() -> None:
    assert manifest_digest({}) == hashlib.sha256(b"").digest()


@pytest.mark.parametrize("name", ["", "a\nb", "a\\b", "a\rb"])
def test_refuses_names_that_sha256sum_escapes(name: str) -> None:
    with pytest.raises(MalformedEvidence):
        manifest({name: bytes(32)})


def test_refuses_digests_of_another_size() -> None:
    with pytest.raises(MalformedEvidence):
        manifest({"a": bytes(20)})
