import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import MalformedEvidence
from cloister.evidence.launch import App, LaunchConfig, launch_digest, parse_launch

SHA = "0123456789abcdef" * 4
KEY = "ed25519:" + "A" * 43
PLAIN = LaunchConfig(
    owner_key=KEY, deployment="acme-chat", release=3, app=App("llm", SHA), models=(SHA,), config_sha256=SHA
)
FULL = replace(PLAIN, egress=("https://a.example",), logs="counts", broker_key=KEY)
MEMBERS: dict[str, Any] = json.loads(PLAIN.encode())


def encoded(**changes: Any) -> bytes:
    return json.dumps({**MEMBERS, **changes}).encode()


@pytest.mark.parametrize("launch", [PLAIN, FULL])
def test_round_trips(launch: LaunchConfig) -> None:
    assert parse_launch(launch.encode()) == launch


def test_the_digest_is_of_the_exact_bytes() -> None:
    assert launch_digest(b"{} ") == hashlib.sha256(b"{} ").digest()
    assert launch_digest(encoded()) != launch_digest(PLAIN.encode())
    assert parse_launch(encoded()) == PLAIN


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_refuses_a_missing_member(name: str) -> None:
    with pytest.raises(MalformedEvidence, match=name):
        parse_launch(json.dumps({key: value for key, value in MEMBERS.items() if key != name}).encode())


@pytest.mark.parametrize("name", sorted(MEMBERS))
@pytest.mark.parametrize("value", [None, True, -1, 1.5, "", "x\x00", {}, [1], [[]], ["a", "a"], 2**53])
def test_refuses_members_of_another_type(name: str, value: object) -> None:
    with pytest.raises(MalformedEvidence):
        parse_launch(encoded(**{name: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"owner_key": "A" * 43},
        {"owner_key": KEY + "A"},
        {"owner_key": KEY[:-1] + "B"},
        {"broker_key": None},
        {"deployment": "-x"},
        {"deployment": "a" * 64},
        {"deployment": "a b"},
        {"logs": "ALL"},
        {"app": {"kind": "llm"}},
        {"app": {"kind": "LLM", "sha256": SHA}},
        {"app": {"kind": "llm", "sha256": SHA, "more": 1}},
        {"models": [SHA, SHA]},
        {"models": [SHA.upper()]},
        {"models": ["sha256:" + SHA]},
        {"egress": ["a"] * 65},
        {"more": 1},
    ],
)
def test_refuses_what_the_protocol_does_not_have(changes: dict[str, object]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_launch(encoded(**changes))


def test_refuses_repeated_keys() -> None:
    with pytest.raises(MalformedEvidence, match="strict JSON"):
        parse_launch(PLAIN.encode().replace(b'"release":3', b'"release":2,"release":3'))


def test_refuses_truncation_everywhere() -> None:
    data = FULL.encode()
    for length in range(len(data)):
        with pytest.raises(MalformedEvidence):
            parse_launch(data[:length])


@given(
    st.dictionaries(
        st.sampled_from([*sorted(MEMBERS), "x"]), st.none() | st.integers() | st.text() | st.lists(st.text())
    )
)
def test_is_total(changes: dict[str, object]) -> None:
    try:
        parse_launch(encoded(**changes))
    except MalformedEvidence:
        return
