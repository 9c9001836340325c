import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import MalformedEvidence
from cloister.evidence.statement import EngineStatement, ModelStatement, Statement, parse_statement

SHA = "0123456789abcdef" * 4
PLAIN = Statement(
    purpose="serve",
    aud=("https://chat.example",),
    launch_sha256=SHA,
    iat=1_800_000_000,
    exp=1_800_003_600,
    ohttp_keys=b"\x00\x29" + bytes(41),
    receipt_key=bytes(range(32)),
    engine=EngineStatement(SHA, "avx2"),
    models=(ModelStatement("demo é", SHA, "q8_0"),),
)
FULL = replace(
    PLAIN,
    models=(ModelStatement("demo", SHA, "q8_0", lineage_sha256=SHA),),
    egress=("https://a.example",),
    code="sealed",
    key_scope="group",
    group_policy_sha256=SHA,
    ehbp_key=bytes(32),
    provision_key=bytes(1216),
    tls_spki=SHA,
    insecure=("ehbp", "plaintext"),
)
MEMBERS: dict[str, Any] = json.loads(PLAIN.encode())


def encoded(**changes: Any) -> bytes:
    return json.dumps({**MEMBERS, **changes}).encode()


@pytest.mark.parametrize("statement", [PLAIN, FULL])
def test_round_trips(statement: Statement) -> None:
    assert parse_statement(statement.encode()) == statement


def test_leaves_out_what_is_absent() -> None:
    assert "ehbp_key" not in MEMBERS
    assert json.loads(FULL.encode())["insecure"] == ["ehbp", "plaintext"]


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_refuses_a_missing_member(name: str) -> None:
    with pytest.raises(MalformedEvidence, match=name):
        parse_statement(json.dumps({key: value for key, value in MEMBERS.items() if key != name}).encode())


@pytest.mark.parametrize("name", sorted(MEMBERS))
@pytest.mark.parametrize("value", [None, True, -1, 1.5, "=", "x\x00", "\u009b", {}, [1], [[]], ["a", "a"], 2**53])
def test_refuses_members_of_another_type(name: str, value: object) -> None:
    with pytest.raises(MalformedEvidence):
        parse_statement(encoded(**{name: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"purpose": ""},
        {"aud": [""]},
        {"purpose": "Serve"},
        {"launch_sha256": SHA.upper()},
        {"launch_sha256": SHA[:-1]},
        {"launch_sha256": SHA + "\n"},
        {"receipt_key": "AA"},
        {"ehbp_key": "AA"},
        {"ehbp_key": None},
        {"tls_spki": "x"},
        {"provision_key": "A" * 5000},
        {"group_policy_sha256": None},
        {"code": "closed"},
        {"key_scope": "all"},
        {"models": [{"name": "a", "sha256": SHA}]},
        {"models": [{"name": "a", "sha256": SHA, "quantization": "q", "more": 1}]},
        {"models": [{"name": "\u202e" * 300, "sha256": SHA, "quantization": "q"}]},
        {"engine": {"sha256": SHA}},
        {"engine": {"sha256": SHA, "variant": "a", "more": 1}},
        {"insecure": ["x"] * 17},
        {"aud": ["x" * 257]},
        {"ohttp_keys": "A" * 40_000},
        {"more": 1},
    ],
)
def test_refuses_what_the_protocol_does_not_have(changes: dict[str, object]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_statement(encoded(**changes))


def test_refuses_repeated_keys_at_any_depth() -> None:
    repeated = PLAIN.encode().replace(b'"v":1', b'"v":1,"v":1')
    nested = PLAIN.encode().replace(b'"variant":"avx2"', b'"variant":"avx2","variant":"avx2"')
    for data in (repeated, nested):
        with pytest.raises(MalformedEvidence, match="strict JSON"):
            parse_statement(data)


def test_refuses_truncation_everywhere() -> None:
    data = FULL.encode()
    for length in range(len(data)):
        with pytest.raises(MalformedEvidence):
            parse_statement(data[:length])


def test_is_capped() -> None:
    with pytest.raises(MalformedEvidence, match="too long"):
        parse_statement(PLAIN.encode() + b" " * 65_536)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.sampled_from([*sorted(MEMBERS), "ehbp_key", "x"]), value=VALUES)
def test_is_total(name: str, value: object) -> None:
    try:
        parse_statement(encoded(**{name: value}))
    except MalformedEvidence:
        return
