from dataclasses import astuple
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.collateral.service import NOW, document
from tests.vendors import amd as vendor

from cloister.collateral import Answer, Key, Piece, complete
from cloister.collateral.amd import answers_of, check, keys_of, products_of
from cloister.errors import CloisterError, MalformedEvidence
from cloister.evidence.endorsements import Endorsements
from cloister.evidence.sev_snp import parse_report, pem_or_der_certificates, pem_or_der_crl

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "sev-snp"


@pytest.mark.parametrize(
    ("case", "crl", "now"),
    [
        ("virtee-sev/milan_v2", "crl_milan", 1749081600.0),
        ("veraison/genoa_v3_tsm", "crl_genoa", 1747699200.0),
    ],
)
def test_real_collateral_is_amds_own(case: str, crl: str, now: float) -> None:
    if not VECTORS.is_dir():
        pytest.skip("shared/vectors is not on this machine")
    folder = VECTORS / case
    leaf = (folder / "leaf.der").read_bytes()
    chain = (leaf, *pem_or_der_certificates((folder / "ask_ark.pem").read_bytes()))
    revoked = pem_or_der_crl((VECTORS / "openpcc" / crl / "crl.pem").read_bytes())
    carried = document((folder / "report.bin").read_bytes(), Endorsements(amd=chain, amd_crl=revoked))
    assert complete(carried, vendor=None, now=now).document is carried


def _pieces(evidence: vendor.Evidence) -> tuple[tuple[Key, ...], dict[str, Answer], dict[str, Piece]]:
    answers = dict(answers_of(Endorsements(amd=evidence.chain, amd_crl=evidence.crl)))
    keys = keys_of(parse_report(evidence.report), "Milan")
    found: dict[str, Piece] = {}
    for key in keys:
        found[key.kind] = check(key, answers[key.kind], found=found, roots=evidence.roots, now=NOW)
    return keys, answers, found


EVIDENCE = vendor.make()
KEYS, ANSWERS, FOUND = _pieces(EVIDENCE)


def test_the_keys_say_which_chip_at_which_firmware() -> None:
    assert [" ".join(astuple(key)) for key in KEYS] == [
        "amd vcek-ca milan",
        "amd vcek-crl milan",
        f"amd vcek milan-{vendor.CHIP_ID.hex()}-{vendor.TCB['Milan'].hex()}",
    ]


def test_a_processor_that_nobody_knows_is_malformed() -> None:
    with pytest.raises(MalformedEvidence):
        products_of(parse_report(vendor.make(cpuid=(0x77, 1, 1)).report), Endorsements())


def test_a_report_that_no_key_signed_is_malformed() -> None:
    with pytest.raises(MalformedEvidence, match="No key signed"):
        keys_of(parse_report(vendor.make(key_info=7 << 2).report), "Milan")


@pytest.mark.filterwarnings("ignore:Attribute's length:UserWarning")  # pyca, of a changed country code
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KEYS), st.binary(max_size=300))
def test_noise_is_refused_with_our_own_errors(key: Key, body: bytes) -> None:
    with pytest.raises(CloisterError):
        check(key, Answer(body), found=FOUND, roots=EVIDENCE.roots, now=NOW)


@pytest.mark.filterwarnings("ignore:Attribute's length:UserWarning")  # pyca, of a changed country code
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KEYS[1:]), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_one_changed_bit_is_refused_with_our_own_errors(key: Key, where: float, bit: int) -> None:
    data = bytearray(ANSWERS[key.kind].body)
    data[int(where * len(data))] ^= 1 << bit
    with pytest.raises(CloisterError):
        check(key, Answer(bytes(data)), found=FOUND, roots=EVIDENCE.roots, now=NOW)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.kind)
def test_each_is_good_until_its_end_and_no_longer(key: Key) -> None:
    piece = FOUND[key.kind]
    for now, good in (
        (piece.issued, True),
        (piece.next_update, True),
        (piece.issued - 1, False),
        (piece.next_update + 1, False),
    ):
        if good and not all(other.issued <= now <= other.next_update for other in FOUND.values()):
            continue  # what it is checked with has its own time
        if good:
            assert check(key, piece.answer, found=FOUND, roots=EVIDENCE.roots, now=now) == piece
        else:
            with pytest.raises(CloisterError):
                check(key, piece.answer, found=FOUND, roots=EVIDENCE.roots, now=now)
