import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import MalformedEvidence
from cloister.evidence.bundle import (
    CHUNK,
    MAX_HEAD,
    BundleHead,
    Manifest,
    Resources,
    Section,
    encode_head,
    parse_bundle_head,
    parse_manifest,
)

ID = "0123456789abcdef" * 2
MANIFEST = Manifest(
    name="hello",
    kind="wsgi",
    entry="app:app",
    health="/health",
    python="3.11",
    secrets=("API_TOKEN",),
    egress=("api.example.com",),
    resources=Resources(memory=512, cores=2),
    sections=(Section("code", "11" * 32, 10240), Section("requirements", "22" * 32, CHUNK + 1)),
)
LLM = Manifest(name="chat", kind="llm", model="demo", sections=(Section("model", "33" * 32, 0),))
HEAD = encode_head(MANIFEST, ID)


def test_a_head_comes_back_as_it_was_written() -> None:
    found = parse_bundle_head(HEAD + b"ciphertext")
    assert found == BundleHead(MANIFEST, MANIFEST.encode(), ID, len(HEAD))
    assert found.sha256 == MANIFEST.sha256
    assert parse_manifest(LLM.encode()) == LLM
    for more in (replace(MANIFEST, logs="public"), replace(MANIFEST, domain="hello.example.com")):
        assert parse_manifest(more.encode()) == more
    with pytest.raises(MalformedEvidence):
        parse_manifest(replace(LLM, logs="public").encode())


def test_the_same_app_has_the_same_manifest_and_another_packaging_another_head() -> None:
    other = parse_bundle_head(encode_head(MANIFEST, ID[::-1]))
    assert other.manifest_bytes == MANIFEST.encode()
    assert encode_head(MANIFEST, ID[::-1]) != HEAD


def test_sections_lie_one_behind_the_other() -> None:
    found = parse_bundle_head(HEAD)
    code, requirements = found.placements
    assert (code.offset, code.length) == (len(HEAD), 10240 + 16)
    assert (requirements.offset, requirements.length) == (code.offset + code.length, CHUNK + 1 + 32)
    assert found.total == requirements.offset + requirements.length
    assert parse_bundle_head(encode_head(LLM, ID)).total == len(encode_head(LLM, ID)) + 16


def test_models_are_those_of_the_sections() -> None:
    assert LLM.models == ("33" * 32,)
    assert MANIFEST.models == ()


@pytest.mark.parametrize("length", range(0, len(HEAD), 7))
def test_a_head_that_is_cut_is_refused(length: int) -> None:
    with pytest.raises(MalformedEvidence):
        parse_bundle_head(HEAD[:length])


@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_malformed(data: bytes) -> None:
    for content in (data, HEAD[:20] + data, HEAD[:-30] + data):
        try:
            parse_bundle_head(content)
        except MalformedEvidence:
            continue


def changed(**members: Any) -> bytes:
    found = {**json.loads(MANIFEST.encode()), **members}
    return json.dumps(
        {name: value for name, value in found.items() if value is not None}, separators=(",", ":")
    ).encode()


CODE = {"name": "code", "sha256": "11" * 32, "size": 1}
MODEL = {"name": "model", "sha256": "33" * 32, "size": 1}
WHEELS = {"name": "requirements", "sha256": "22" * 32, "size": 1}


@pytest.mark.parametrize(
    "members",
    [
        {"v": 2},
        {"name": "Hello"},
        {"kind": "php"},
        {"entry": "app"},
        {"entry": None},
        {"health": "health"},
        {"python": None},
        {"python": "2.7"},
        {"secrets": ["A B"]},
        {"secrets": ["A", "A"]},
        {"resources": {"memory": 0}},
        {"resources": {"disk": 1}},
        {"sections": []},
        {"sections": [WHEELS]},
        {"sections": [WHEELS, CODE]},
        {"sections": [CODE, CODE, WHEELS]},
        {"sections": [CODE, WHEELS, MODEL]},
        {"model": "demo"},
        {"logs": "none"},
        {"logs": "everything"},
        {"domain": "hello"},
        {"domain": "https://hello.example.com"},
        {"sections": [{**CODE, "size": -1}, WHEELS]},
        {"sections": [{**CODE, "sha256": "11"}, WHEELS]},
        {"extra": 1},
        {"kind": "llm"},
    ],
    ids=str,
)
def test_members_that_are_wrong_or_contradict_each_other_are_refused(members: dict[str, Any]) -> None:
    assert changed() == MANIFEST.encode()
    with pytest.raises(MalformedEvidence):
        parse_manifest(changed(**members))


def test_another_spelling_is_refused() -> None:
    for other in (b" " + MANIFEST.encode(), json.dumps(json.loads(MANIFEST.encode())).encode()):
        with pytest.raises(MalformedEvidence):
            parse_manifest(other)


def test_another_size_of_chunks_is_refused() -> None:
    with pytest.raises(MalformedEvidence):
        parse_bundle_head(HEAD.replace(b"1048576", b"1048577"))


def test_the_largest_head_fits() -> None:
    many = replace(MANIFEST, secrets=tuple(sorted(f"S{number:062}" for number in range(64))))
    assert len(encode_head(many, ID)) < MAX_HEAD
    assert parse_bundle_head(encode_head(many, ID)).manifest == many
