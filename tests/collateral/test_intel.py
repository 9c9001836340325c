import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.collateral.service import NOW, document
from tests.vendors import intel as vendor

from cloister.collateral import Answer, Key, Piece, complete
from cloister.collateral.intel import answers_of, check, collateral_json, keys_of
from cloister.errors import CloisterError, MalformedEvidence
from cloister.evidence.endorsements import Endorsements

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
REAL = sorted(path.parent for tee in ("sgx", "tdx") for path in VECTORS.glob(f"{tee}/*/*/collateral.json"))


def _case(folder: Path) -> Any:
    return json.loads((folder / "case.json").read_text())


GENUINE = [
    folder
    for folder in REAL
    if _case(folder)["kind"] == "real" and _case(folder)["expected"]["verdict"] in ("accept", "policy")
]
SYNTHETIC = [folder for folder in REAL if _case(folder)["kind"].startswith("synthetic")]


def _quote(folder: Path) -> bytes:
    return (folder / "quote.bin").read_bytes()


def test_the_real_vectors_are_there() -> None:
    if not VECTORS.is_dir():
        pytest.skip("shared/vectors is not on this machine")
    assert GENUINE
    assert SYNTHETIC


@pytest.mark.parametrize("folder", GENUINE, ids=lambda folder: folder.name)
def test_real_collateral_is_intels_own(folder: Path) -> None:
    carried = document(_quote(folder), Endorsements(intel=(folder / "collateral.json").read_bytes()))
    completed = complete(carried, vendor=None, now=_case(folder)["now"])
    assert completed.document is carried
    assert [found.source for found in completed.found] == ["document"] * 4


@pytest.mark.parametrize("folder", SYNTHETIC, ids=lambda folder: folder.name)
def test_collateral_under_somebodys_own_root_is_not(folder: Path) -> None:
    carried = document(_quote(folder), Endorsements(intel=(folder / "collateral.json").read_bytes()))
    with pytest.raises(CloisterError) as refused:
        complete(carried, vendor=None, now=_case(folder)["now"])
    assert "another root" in (refused.value.got or "")


def test_the_keys_say_which_platform_a_quote_is_from() -> None:
    assert [" ".join(astuple(key)) for key in keys_of(vendor.sgx().quote)] == [
        "intel pck-crl platform",
        "intel root-crl sgx",
        "intel tcb-info sgx-00906ed50000",
        "intel qe-identity sgx",
    ]
    assert [key.kind for key in keys_of(vendor.tdx().quote, early=True)] == [
        "pck-crl",
        "root-crl",
        "tcb-info-early",
        "qe-identity-early",
    ]
    processor = vendor.sgx(subjects={"pck_ca": "Intel SGX PCK Processor CA"})
    assert keys_of(processor.quote)[0].platform == "processor"


@pytest.mark.parametrize(
    "changes", [{"certification_type": 3}, {"pck_extension": False}, {"subjects": {"pck_ca": "Somebody's CA"}}]
)
def test_a_quote_that_names_no_platform_is_malformed(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedEvidence):
        keys_of(vendor.sgx(**changes).quote)


def test_taking_apart_and_joining_changes_no_byte_of_what_is_signed() -> None:
    assert json.loads(collateral_json(FOUND)) == dict(EVIDENCE.parts)


EVIDENCE = vendor.tdx()
KEYS = keys_of(EVIDENCE.quote)
ANSWERS = answers_of(EVIDENCE.collateral, EVIDENCE.quote)


def _checked() -> dict[str, Piece]:
    found: dict[str, Piece] = {}
    for key in KEYS:
        found[key.kind] = check(key, ANSWERS[key.kind], found=found, root=EVIDENCE.root, now=NOW)
    return found


FOUND = _checked()


def _refused(key: Key, answer: Answer) -> None:
    with pytest.raises(CloisterError):
        check(key, answer, found=FOUND, root=EVIDENCE.root, now=NOW)


@pytest.mark.filterwarnings("ignore:Attribute's length:UserWarning")  # pyca, of a changed country code
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KEYS), st.binary(max_size=200), st.binary(max_size=200))
def test_noise_is_refused_with_our_own_errors(key: Key, body: bytes, chain: bytes) -> None:
    _refused(key, Answer(body, chain))


@pytest.mark.filterwarnings("ignore:Attribute's length:UserWarning")  # pyca, of a changed country code
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KEYS), st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.booleans())
def test_one_changed_bit_is_refused_with_our_own_errors(key: Key, where: float, bit: int, in_chain: bool) -> None:
    answer = ANSWERS[key.kind]
    part = "chain" if in_chain and answer.chain else "body"
    data = bytearray(getattr(answer, part))
    at = int(where * len(data))
    data[at] ^= 1 << bit
    changed = Answer(bytes(data), answer.chain) if part == "body" else Answer(answer.body, bytes(data))
    hexadecimal = key.kind in ("tcb-info", "qe-identity") and part == "body" and bit == 5
    if hexadecimal and data[at : at + 1].lower() == getattr(answer, part)[at : at + 1].lower():
        return  # the signature's hexadecimal digits may be of either case
    _refused(key, changed)
