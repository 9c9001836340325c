import json
from collections.abc import Callable
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import MalformedEvidence
from cloister.evidence.endorsements import Endorsements, parse_endorsements
from cloister.evidence.launch import App, LaunchConfig, parse_launch
from cloister.evidence.provenance import Payload, Provenance, parse_payload, parse_provenance

SHA, KEY = "0123456789abcdef" * 4, "ed25519:" + "A" * 43
ENTRY: dict[str, str | int] = {"measurement": "aa" * 48, "vcpus": 8}
PAYLOAD = Payload("acme-chat", 3, {"sev-snp": (ENTRY, ENTRY), "tdx": ()})
SIGNED = Provenance(PAYLOAD.encode(), key=KEY, signature=bytes(64))
BUNDLED = Provenance(PAYLOAD.encode(), bundle=b'{"a":[1,"x"]}')
LAUNCH = LaunchConfig(
    owner_key=KEY, deployment="acme-chat", release=3, app=App("llm", SHA), models=(SHA,), config_sha256=SHA, egress=("a",)
)  # fmt: skip


@pytest.mark.parametrize("provenance", [SIGNED, BUNDLED])
def test_what_is_written_is_read(provenance: Provenance) -> None:
    assert parse_provenance(provenance.item().content) == provenance
    assert parse_payload(provenance.payload) == PAYLOAD


@pytest.mark.parametrize(
    "changes",
    [
        {"key": None},
        {"key": KEY + "A"},
        {"signature": "AA"},
        {"payload": ""},
        {"payload": "=="},
        {"sigstore": []},
        {"sigstore": {}},
        {"more": 1},
    ],
    ids=str,
)
def test_refuses_provenance_of_another_form(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_provenance(json.dumps({**json.loads(SIGNED.item().content), **changes}).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"deployment": 7},
        {"deployment": "a" * 64},
        {"release": -1},
        {"release": "3"},
        {"measurements": []},
        {"measurements": {"tdx": {}}},
        {"measurements": {"tdx": [1]}},
        {"measurements": {"tdx": [{}]}},
        {"measurements": {"tdx": [{"mr_td": None}]}},
        {"measurements": {"tdx": [{"mr_td": True}]}},
        {"measurements": {"tdx": [{"mr_td": 1.5}]}},
        {"measurements": {"tdx": [{f"m{at}": "x" for at in range(65)}]}},
        {"measurements": {"tdx": [{"mr_td": "x"}] * 257}},
        {"more": 1},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_refuses_a_payload_of_another_form(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_payload(json.dumps({**json.loads(PAYLOAD.encode()), **changes}).encode())


# Whatever stands in a document beside the hardware's own evidence

Parser = Callable[[bytes], object]
ENDORSED = Endorsements(intel=b'{"tcb_info": "{}"}', amd=(b"leaf", b"ca", b"root"), amd_crl=b"crl", tpm_crls=(b"one",))
PARSERS: dict[str, tuple[Parser, bytes]] = {
    "provenance, signed": (parse_provenance, SIGNED.item().content),
    "provenance, bundled": (parse_provenance, BUNDLED.item().content),
    "payload": (parse_payload, PAYLOAD.encode()),
    "launch": (parse_launch, LAUNCH.encode()),
    "endorsements": (parse_endorsements, ENDORSED.item().content),
}
_PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_TREE = st.recursive(
    _PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def is_told(parse: Parser, data: bytes) -> None:
    """Read, or refused with cloister's own error, which names its step."""
    try:
        parse(data)
    except MalformedEvidence as error:
        assert error.step


@pytest.mark.parametrize("name", PARSERS)
def test_truncation_at_every_length_is_refused(name: str) -> None:
    parse, whole = PARSERS[name]
    parse(whole)
    for length in range(len(whole)):
        with pytest.raises(MalformedEvidence):
            parse(whole[:length])
    with pytest.raises(MalformedEvidence):
        parse(whole + b"\0")


@given(data=st.data())
def test_only_our_error_escapes_whatever_is_mangled(data: st.DataObject) -> None:
    parse, whole = PARSERS[data.draw(st.sampled_from(sorted(PARSERS)))]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole)))
        inserted = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"{", b"[", b'"', b"\\u0000", b"1e999", b"-", b"\xff"])
        )
        whole = whole[:at] + inserted + whole[at + data.draw(st.integers(0, 8)) :]
    is_told(parse, whole)


@given(name=st.sampled_from(sorted(PARSERS)), tree=_TREE, data=st.binary(max_size=64))
def test_only_our_error_escapes_whatever_it_is_instead(name: str, tree: Any, data: bytes) -> None:
    parse, _ = PARSERS[name]
    encoded = cbor2.dumps(tree) if name == "endorsements" else json.dumps(tree).encode()
    for whole in (encoded, data):
        is_told(parse, whole)


@given(name=st.sampled_from(sorted(set(PARSERS) - {"endorsements"})), data=st.data())
def test_only_our_error_escapes_whatever_a_member_is(name: str, data: st.DataObject) -> None:
    parse, whole = PARSERS[name]
    members = json.loads(whole)
    members[data.draw(st.sampled_from(sorted(members)))] = data.draw(_TREE)
    is_told(parse, json.dumps(members).encode())
