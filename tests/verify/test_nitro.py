import json
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from tests.vendors import amd, aws
from tests.vendors.p384 import DAY, NOW, Issued, changed, issue, raw_signature

from cloister.errors import MalformedEvidence
from cloister.evidence.launch import launch_digest
from cloister.evidence.nitro import launch_pcr, parse_document
from cloister.verify import nitro
from cloister.verify.certificates import load_certificate
from cloister.verify.p384 import check_signature
from cloister.verify.platform import Appraisal
from cloister.verify.policy import Policy

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "nitro"
CASES = sorted(VECTORS.glob("*/*/case.json"))
REASONS = {
    "debug mode": {"evidence.debug"},
    "COSE signature": {"evidence.signature"},
    "cert 3 validity": {"evidence.chain"},
    "root pin": {"evidence.root", "evidence.signature"},
    "alg": {"evidence.algorithm", "evidence.signature"},
}

GOOD = aws.document()


def judge(document: bytes, issued: Issued | None = None, **changes: Any) -> Appraisal:
    asked: dict[str, Any] = {
        "policy": Policy(),
        "now": NOW,
        "launch": aws.LAUNCH,
        "nonce": aws.NONCE,
        "root_sha256": (issued or aws.nitro()).root_sha256,
    }
    return nitro.judge(document, **{**asked, **changes})


def failures(appraisal: Appraisal) -> set[str]:
    return {factor.step for factor in appraisal.factors if factor.verdict == "fail"}


def refused(document: bytes, issued: Issued | None = None, **changes: Any) -> set[str]:
    """The steps that failed; each says what was expected and got, and what to do."""
    appraisal = judge(document, issued, **changes)
    wrong = [factor for factor in appraisal.factors if factor.verdict == "fail"]
    assert all(factor.expected and factor.got and factor.hint for factor in wrong)
    return failures(appraisal)


def under(links: Any, **changes: Any) -> set[str]:
    """A document under another chain that its verifier was told to believe in."""
    issued = issue(links, **changes)
    return refused(aws.document(issued), issued)


def test_believes_a_genuine_document() -> None:
    appraisal = judge(GOOD)
    assert failures(appraisal) == set()
    assert (appraisal.platform, appraisal.simulated, appraisal.engine) == ("nitro", False, None)
    assert appraisal.report_data == aws.USER_DATA
    assert appraisal.launch_sha256 == launch_digest(aws.LAUNCH)
    assert appraisal.platform_id == "i-0123456789abcdef0"
    assert appraisal.measurement == {f"pcr{at}": bytes([at + 1]).hex() * 48 for at in range(5)}


def test_says_that_aws_has_no_revocation_lists() -> None:
    assert [f.step for f in judge(GOOD).factors if f.verdict == "not-checked"] == ["evidence.crl"]


def test_tells_when_each_certificate_ends() -> None:
    ends = {expiry.what: expiry.at for expiry in judge(GOOD).expiries}
    assert len(ends) == 5
    assert ends["enclave certificate"] == NOW + 10_800
    assert ends["enclave CA certificate 1"] == NOW + DAY


def test_each_bit_matters() -> None:
    """No byte of a Nitro document is unsigned."""
    signer = load_certificate(aws.nitro().ders[-1], what="x")
    for at in range(len(GOOD)):
        mutant = GOOD[:at] + bytes([GOOD[at] ^ 1 << at % 8]) + GOOD[at + 1 :]
        try:
            parsed = parse_document(mutant)
        except MalformedEvidence:
            continue
        accepted = check_signature(signer, parsed.signature, parsed.signed, hint="").verdict == "pass"
        assert not accepted or refused(mutant), at


def test_a_flipped_bit_in_signature_or_payload_fails_the_signature_alone() -> None:
    mutants = [GOOD[:-1] + bytes([GOOD[-1] ^ 1]), GOOD.replace(aws.USER_DATA, bytes([0, *aws.USER_DATA[1:]]))]
    assert [refused(mutant) for mutant in mutants] == [{"evidence.signature"}] * 2


@pytest.mark.parametrize("half", [bytes(48), b"\xff" * 48])
def test_signature_values_out_of_range_are_refused(half: bytes) -> None:
    assert refused(GOOD[:-96] + half * 2) == {"evidence.signature"}


def test_a_signature_has_96_bytes_by_a_key_on_p384() -> None:
    parsed, signer = parse_document(GOOD), load_certificate(aws.nitro().ders[-1], what="x")
    for signature in (parsed.signature + b"\0", parsed.signature[:-1], b""):
        wrong = check_signature(signer, signature, parsed.signed, hint="?")
        assert (wrong.verdict, wrong.expected) == ("fail", "96 bytes")
    other = load_certificate(amd.make().chain[2], what="x")
    wrong = check_signature(other, parsed.signature, parsed.signed, hint="?")
    assert (wrong.verdict, wrong.expected) == ("fail", "a P-384 key")


def test_another_key_signed() -> None:
    assert refused(aws.document(key=ec.generate_private_key(ec.SECP384R1()))) == {"evidence.signature"}


def test_the_signature_is_over_coses_structure_not_the_payload_alone() -> None:
    signature = raw_signature(aws.nitro().keys[-1], parse_document(GOOD).payload)
    assert refused(GOOD[:-96] + signature) == {"evidence.signature"}


@pytest.mark.parametrize("protected", [b"\xa1\x01\x26", b"\xa1\x01\x00", b"\xa1\x01\x38\x23"], ids=bytes.hex)
def test_refuses_another_algorithm_even_where_the_signature_holds(protected: bytes) -> None:
    payload = cbor2.dumps(aws.fields(aws.nitro()))
    document = aws.sign(payload, aws.nitro().keys[-1], protected=protected)
    assert refused(document) == {"evidence.algorithm"}


def test_a_chain_that_brings_its_own_root_is_refused_by_the_root_alone() -> None:
    assert refused(aws.document(issue(aws.LINKS))) == {"evidence.root"}


def test_the_production_root_is_the_default() -> None:
    assert {f.step for f in nitro.judge(GOOD, policy=Policy(), now=NOW).factors if f.verdict == "fail"} == {
        "evidence.root"
    }


def test_a_chain_without_its_root_is_refused() -> None:
    document = aws.document(cabundle=list(aws.nitro().ders[1:-1]))
    assert refused(document) == {"evidence.root"}


def test_a_chain_with_a_missing_link_is_refused() -> None:
    ders = aws.nitro().ders
    assert refused(aws.document(cabundle=[ders[0], *ders[2:-1]])) == {"evidence.chain"}


def test_a_chain_in_another_order_is_refused() -> None:
    ders = aws.nitro().ders
    assert refused(aws.document(cabundle=[ders[0], ders[2], ders[1], ders[3]])) == {"evidence.chain"}


def test_another_enclaves_certificate_is_refused() -> None:
    other = issue(aws.LINKS)
    wrong = refused(aws.document(certificate=other.ders[-1], key=other.keys[-1]))
    assert wrong == {"evidence.chain"}
    assert refused(aws.document(certificate=other.ders[-1])) == {"evidence.chain", "evidence.signature"}


def test_something_that_is_no_certificate_is_malformed() -> None:
    for changes in ({"certificate": b"x"}, {"cabundle": [b"x"]}, {"certificate": aws.nitro().ders[-1] + b"\0"}):
        with pytest.raises(MalformedEvidence):
            judge(aws.document(**changes))


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("valid", [(-1.0, 2 * DAY), (2 * DAY, -1.0)], ids=["not yet valid", "expired"])
def test_each_certificates_time_counts(at: int, valid: tuple[float, float]) -> None:
    assert under(changed(aws.LINKS, at, valid=valid)) == {"evidence.chain"}


def test_the_clock_is_compared_with_the_earliest_end_and_the_latest_start() -> None:
    start, end = NOW - 60, NOW + 10_800
    for now in (start, end):
        assert refused(GOOD, now=now) == set()
    for now in (start - 1, end + 1, 0.0, -1e300, 1e300, float("inf"), float("-inf"), float("nan")):
        assert refused(GOOD, now=now) == {"evidence.chain"}


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize(
    "wrong",
    [
        {"ca": False},
        {"ca": False, "signs_certificates": True},
        {"constraints": False},
        {"signs_certificates": False},
        {"usage": False},
    ],
    ids=str,
)
def test_only_certificate_authorities_issue(at: int, wrong: dict[str, Any]) -> None:
    assert under(changed(aws.LINKS, at, path_length=None, **wrong)) == {"evidence.chain"}


@pytest.mark.parametrize(("at", "length"), [(aws.ROOT, 2), (aws.REGIONAL, 1), (aws.ZONAL, 0)])
def test_path_lengths_are_kept(at: int, length: int) -> None:
    assert under(changed(aws.LINKS, at, path_length=length)) == {"evidence.chain"}
    assert under(changed(aws.LINKS, at, path_length=length + 1)) == set()


@pytest.mark.parametrize(
    "wrong",
    [
        {"ca": True},
        {"signs_certificates": True},
        {"ca": True, "signs_certificates": False, "signs_data": True},
        {"signs_data": False},
        {"usage": False},
    ],
    ids=str,
)
def test_the_signing_certificate_signs_data_only(wrong: dict[str, Any]) -> None:
    assert under(changed(aws.LINKS, aws.ENCLAVE, **wrong)) == {"evidence.chain"}


@pytest.mark.parametrize("at", range(5))
def test_names_are_chained_too(at: int) -> None:
    """The root's issuer is nobody's: it is pinned whole."""
    assert under(aws.LINKS, names={at: "somebody else"}) == (set() if at == aws.ROOT else {"evidence.chain"})


@pytest.mark.parametrize("at", range(5))
def test_every_key_is_on_p384(at: int) -> None:
    wrong = {"evidence.chain", "evidence.signature"} if at == aws.ENCLAVE else {"evidence.chain"}
    assert under(changed(aws.LINKS, at, curve=ec.SECP256R1())) == wrong


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_every_certificate_is_signed_with_sha384(at: int) -> None:
    assert under(changed(aws.LINKS, at, digest=hashes.SHA256())) == {"evidence.chain"}


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("critical", [True, False])
def test_an_unknown_extension_matters_where_it_is_critical(at: int, critical: bool) -> None:
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    wrong = {"evidence.chain"} if critical else set()
    assert under(changed(aws.LINKS, at, extensions=((unknown, critical),))) == wrong


@pytest.mark.parametrize("zero", [["pcr0", "pcr1", "pcr2"], ["pcr0"], ["pcr1"], ["pcr2"]], ids=str)
def test_debug_mode_is_refused(zero: list[str]) -> None:
    assert refused(aws.document(pcrs=aws.pcrs(**{name: bytes(48) for name in zero}))) == {"evidence.debug"}


def test_absent_code_registers_are_debug_mode() -> None:
    assert refused(aws.document(pcrs={3: b"\1" * 48})) == {"evidence.debug"}


def test_another_nonce_is_refused() -> None:
    assert refused(GOOD, nonce=bytes(32)) == {"evidence.nonce"}
    for value in (None, b"", aws.NONCE[:-1], aws.NONCE + b"\0"):
        assert refused(aws.document(nonce=value)) == {"evidence.nonce"}


def test_without_a_nonce_nothing_is_said_about_it() -> None:
    assert "evidence.nonce" not in {factor.step for factor in judge(GOOD, nonce=None).factors}


@pytest.mark.parametrize(
    "register",
    [b"", bytes(48), launch_pcr(b"other"), launch_pcr(aws.LAUNCH)[:32]],
    ids=["absent", "never extended", "another launch", "another size"],
)
def test_another_launch_register_gives_no_launch_digest(register: bytes) -> None:
    pcrs = aws.pcrs(pcr16=register)
    if not register:
        del pcrs[16]
    appraisal = judge(aws.document(pcrs=pcrs))
    assert (failures(appraisal), appraisal.launch_sha256) == (set(), b"")


def test_the_measurement_leaves_out_what_is_not_there() -> None:
    pcrs = dict.fromkeys((0, 1, 2, 8, 15, 16, 31), b"\x01" * 48) | {3: bytes(48)}
    assert set(judge(aws.document(pcrs=pcrs)).measurement) == {"pcr0", "pcr1", "pcr2", "pcr8", "pcr15"}


def test_user_data_is_given_back_as_it_is() -> None:
    for value in (None, b"", b"short", bytes(512)):
        assert judge(aws.document(user_data=value)).report_data == (value or b"")


def test_a_module_without_an_enclaves_id_names_itself() -> None:
    assert judge(aws.document(module_id="i-0")).platform_id == "i-0"


@pytest.mark.skipif(not CASES, reason="real vectors lie beside the repository, in ../shared/vectors")
@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.parent.name}-{path.parent.name}")
def test_real_documents_get_the_verdict_of_their_case(case: Path) -> None:
    said = json.loads(case.read_text())
    document = (case.parent / "document.cbor").read_bytes()
    wrong = failures(nitro.judge(document, policy=Policy(), now=said["now"]))
    reason = said["expected"]["reason"]
    if said["expected"]["verdict"] == "accept":
        assert wrong == set()
        flipped = document[:-1] + bytes([document[-1] ^ 1])
        assert failures(nitro.judge(flipped, policy=Policy(), now=said["now"])) == {"evidence.signature"}
    else:
        assert wrong == next(steps for known, steps in REASONS.items() if reason.startswith(known))


@pytest.mark.skipif(not CASES, reason="real vectors lie beside the repository, in ../shared/vectors")
@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.parent.name}-{path.parent.name}")
def test_real_documents_are_good_exactly_in_their_window(case: Path) -> None:
    said = json.loads(case.read_text())
    if said["window"]:
        document, (start, end) = (case.parent / "document.cbor").read_bytes(), said["window"]
        wrong = [
            "evidence.chain" in failures(nitro.judge(document, policy=Policy(), now=now))
            for now in (start - 1, start, end, end + 1)
        ]
        assert wrong == [True, False, False, True]
