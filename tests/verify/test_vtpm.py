import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_public_key
from tests.vendors.tpm import (
    DAY,
    NOW,
    ZERO_PCRS,
    Maker,
    Tpm,
    event,
    event_log,
    extended,
    pinned,
    quote,
    selection,
    sign,
)
from tests.verify.world import flips

from cloister.errors import MalformedEvidence
from cloister.evidence.tpm import (
    ALG_NULL,
    ALG_RSAPSS,
    TpmEvidence,
    parse_public,
    parse_signature,
    public_area,
    sized,
)
from cloister.verify.boot_log import check_rtmr_log
from cloister.verify.platform import Appraisal
from cloister.verify.policy import Limits, Policy
from cloister.verify.tpm_certificates import PROVIDER_ROOTS
from cloister.verify.vtpm import judge, judge_quote

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
real = pytest.mark.skipif(not VECTORS.is_dir(), reason="the real vectors are not beside this tree")

EXTRA = bytes(range(32))
LAUNCH = b'{"v":1}'
PCRS = {**ZERO_PCRS, 14: extended(LAUNCH), 4: extended(b"loader", b"kernel")}
LOG = event_log(event(4, b"loader"), event(4, b"kernel"), tail=bytes(64))

MAKER = Maker()
TPM = Tpm().certified(MAKER)
RSA_TPM = Tpm(key=rsa.generate_private_key(65537, 2048)).certified(MAKER)
GOOD = TPM.evidence(EXTRA, PCRS)
ALLOWING = Policy(limits=Limits(dangerously_allow_missing_crl=True))


def appraise(evidence: TpmEvidence = GOOD, **changes: Any) -> Appraisal:
    given: dict[str, Any] = {
        "qualifying_data": EXTRA,
        "policy": Policy(),
        "now": NOW,
        "launch": LAUNCH,
        "roots": pinned(MAKER.root),
        "crls": [MAKER.crl()],
    }
    return judge(evidence, **{**given, **changes})


def failures(appraisal: Appraisal) -> set[str]:
    return {factor.step for factor in appraisal.factors if factor.verdict == "fail"}


def refused(evidence: TpmEvidence = GOOD, **changes: Any) -> set[str]:
    return failures(appraise(evidence, **changes))


def verdicts(appraisal: Appraisal) -> dict[str, str]:
    return {factor.step: factor.verdict for factor in appraisal.factors}


def resigned(message: bytes, tpm: Tpm = TPM, **changes: Any) -> TpmEvidence:
    """What only a broken TPM, or a key that is no attestation key, would sign."""
    return replace(GOOD, quote=message, signature=sign(message, tpm.key), **changes)


def test_a_certified_quote_is_accepted_and_labelled_provider_trusted() -> None:
    appraisal = appraise(eventlog=LOG)
    assert failures(appraisal) == set()
    assert verdicts(appraisal)["evidence.hardware"] == "not-checked"
    assert (appraisal.platform, appraisal.simulated, appraisal.report_data) == ("vtpm", False, EXTRA)
    assert appraisal.launch_sha256 == hashlib.sha256(LAUNCH).digest()
    assert appraisal.measurement["pcr4"] == PCRS[4].hex()
    assert appraisal.platform_id in TPM.pin
    assert appraisal.counters == {"tpm-crl CN=TPM Root": 3}
    assert {expiry.what for expiry in appraisal.expiries} == {
        "certificate of CN=attestation key",
        "certificate of CN=TPM CA",
        "certificate of CN=TPM Root",
        "revocation list of CN=TPM Root",
    }


def test_each_kind_of_key_is_accepted() -> None:
    for tpm in (RSA_TPM, *(Tpm(ec.generate_private_key(curve())) for curve in (ec.SECP384R1, ec.SECP521R1))):
        assert refused(tpm.certified(MAKER).evidence(EXTRA, PCRS)) == set()


def test_no_single_bit_of_a_quote_may_change() -> None:
    """Quote, signature and PCR values under a pinned key, the key's public area under a certified one: none unsigned."""
    for tpm in (TPM, RSA_TPM):
        good = tpm.evidence(EXTRA, PCRS)
        bare = replace(good, certificates=())
        mutants = [replace(bare, quote=data) for data in flips(good.quote)]
        mutants += [replace(bare, signature=data) for data in flips(good.signature)]
        mutants += [replace(bare, pcrs={**PCRS, index: data}) for index in (0, 14) for data in flips(PCRS[index])]
        mutants += [replace(good, ak=data) for data in flips(good.ak)]
        for mutant in mutants:
            try:
                assert refused(mutant, ak_pins=tpm.pin if mutant.certificates == () else frozenset())
            except MalformedEvidence:
                continue


def test_a_key_that_nobody_certified_is_refused() -> None:
    assert refused(replace(GOOD, certificates=())) == {"evidence.ak"}


def test_a_pinned_key_needs_no_certificate() -> None:
    bare = replace(GOOD, certificates=())
    assert refused(bare, ak_pins=TPM.pin) == set()
    assert refused(bare, ak_pins=Tpm().pin) == {"evidence.ak"}


def test_a_pinned_key_may_live_below_another_key() -> None:
    message = quote(EXTRA, PCRS, signer=b"\0\x0b" + b"\x55" * 32)
    assert refused(resigned(message, certificates=()), ak_pins=TPM.pin) == set()
    assert refused(resigned(message)) == {"evidence.ak-name"}


def test_a_pin_does_not_excuse_a_bad_chain() -> None:
    assert refused(ak_pins=TPM.pin, roots=frozenset()) == {"evidence.root"}


def test_a_chain_that_brings_its_own_root_is_refused() -> None:
    forged = TPM.certified(Maker())
    assert refused(forged.evidence(EXTRA, PCRS)) >= {"evidence.root"}
    assert refused(roots=PROVIDER_ROOTS) == {"evidence.root"}


def test_a_foreign_key_under_a_genuine_chain_is_refused() -> None:
    other = replace(Tpm(), chain=TPM.chain)
    assert refused(other.evidence(EXTRA, PCRS)) == {"evidence.ak"}


def test_a_quote_of_another_tpm_is_refused() -> None:
    other = Tpm().certified(MAKER).evidence(EXTRA, PCRS)
    assert refused(replace(GOOD, quote=other.quote, signature=other.signature)) == {
        "evidence.signature",
        "evidence.ak-name",
    }


@pytest.mark.parametrize("attributes", [0x00040072, 0x00050070, 0x00050062, 0x00050052, 0x00010072, 0x00070072])
def test_a_key_that_is_no_attestation_key_is_refused(attributes: int) -> None:
    tpm = replace(TPM, attributes=attributes)
    assert refused(tpm.evidence(EXTRA, PCRS)) == {"evidence.ak-attributes"}


def test_attributes_that_the_quote_does_not_name_are_refused() -> None:
    lying = sized(public_area(TPM.key.public_key(), attributes=0x00050472))
    assert refused(replace(GOOD, ak=lying)) == {"evidence.ak-name"}


def test_a_message_that_no_tpm_made_is_refused() -> None:
    message = quote(EXTRA, PCRS, magic=0xFF544346, signer=TPM.signer)
    assert refused(resigned(message)) == {"evidence.magic"}


@pytest.mark.parametrize("signature", [bytes(32), b"\xff" * 32, b"\1" * 31, b"\1" * 33, b""])
def test_signatures_out_of_range_are_refused(signature: bytes) -> None:
    forged = bytes.fromhex("0018000b") + sized(signature) * 2
    assert refused(replace(GOOD, signature=forged)) == {"evidence.signature"}


def test_a_zero_rsa_signature_is_refused() -> None:
    good = RSA_TPM.evidence(EXTRA, PCRS)
    for value in (bytes(256), b"\1" * 255, b"\1" * 512):
        assert refused(replace(good, signature=bytes.fromhex("0014000b") + sized(value))) == {"evidence.signature"}


def test_signatures_with_weak_or_foreign_algorithms_are_refused() -> None:
    good = RSA_TPM.evidence(EXTRA, PCRS)
    for signature in (
        sign(good.quote, RSA_TPM.key, hash_id=0x0004),
        sign(good.quote, RSA_TPM.key, hash_id=0x000C),
        sign(good.quote, RSA_TPM.key, scheme=ALG_RSAPSS),
        GOOD.signature,
    ):
        assert "evidence.signature" in refused(replace(good, signature=signature))


@pytest.mark.parametrize(
    ("tpm", "forged", "said"),
    [
        (RSA_TPM, GOOD.signature, "not the key's kind"),
        (TPM, sign(GOOD.quote, RSA_TPM.key), "not the key's kind"),
        (RSA_TPM, bytes.fromhex("0014000b") + sized(bytes(255)), "a wrong length"),
        (TPM, bytes.fromhex("0018000b") + sized(bytes(33)) + sized(bytes(32)), "a wrong length"),
        (TPM, bytes.fromhex("0018000b") + sized(bytes(32)) + sized(bytes(33)), "a wrong length"),
    ],
    ids=["RSA, another's", "ECC, another's", "RSA, short", "ECC, r too long", "ECC, s too long"],
)
def test_says_what_is_weak_in_a_signature_of_a_key_without_scheme(tpm: Tpm, forged: bytes, said: str) -> None:
    """As of a key of which only the numbers are known (Azure's)."""
    key = tpm.key.public_key()
    evidence = replace(GOOD, signature=forged)
    factors = judge_quote(evidence, key, (ALG_NULL, 0), qualifying_data=EXTRA, eventlog=None)
    (wrong,) = [factor for factor in factors if factor.step == "evidence.signature"]
    assert (wrong.verdict, wrong.got.partition(": ")[2]) == ("fail", said)


def test_a_signature_has_one_length() -> None:
    """The same two numbers with a zero in front of one are another encoding."""
    signed = parse_signature(GOOD.signature)
    for r, s in ((b"\0" + signed.r, signed.s), (signed.r, b"\0" + signed.s)):
        longer = bytes.fromhex("0018000b") + sized(r) + sized(s)
        assert refused(replace(GOOD, signature=longer)) == {"evidence.signature"}


def test_rsapss_is_accepted_from_a_key_of_that_scheme() -> None:
    area = RSA_TPM.area.replace(bytes.fromhex("0014000b0800"), bytes.fromhex("0016000b0800"))
    signer = parse_public(area).qualified_name(bytes.fromhex("40000001"))
    message = quote(EXTRA, PCRS, signer=signer)
    signature = sign(message, RSA_TPM.key, scheme=ALG_RSAPSS)
    evidence = TpmEvidence(message, signature, PCRS, sized(area), RSA_TPM.chain)
    assert refused(evidence) == set()
    assert refused(replace(evidence, signature=sign(message, RSA_TPM.key))) == {"evidence.signature"}


def test_a_key_without_a_scheme_of_its_own_may_sign_in_any_strong_one() -> None:
    area = TPM.area.replace(bytes.fromhex("0018000b0003"), bytes.fromhex("00100003"))
    signer = parse_public(area).qualified_name(bytes.fromhex("4000000c"))
    message = quote(EXTRA, PCRS, signer=signer, hash_name="sha384")
    evidence = TpmEvidence(message, sign(message, TPM.key, hash_id=0x000C), PCRS, sized(area), TPM.chain)
    assert refused(evidence) == set()
    weak = quote(EXTRA, PCRS, signer=signer, hash_name="sha1")
    evidence = replace(evidence, quote=weak, signature=sign(weak, TPM.key, hash_id=0x0004))
    assert refused(evidence) == {"evidence.signature"}


def test_short_rsa_keys_are_refused() -> None:
    short = Tpm(key=rsa.generate_private_key(65537, 1024))
    assert refused(short.evidence(EXTRA, PCRS), ak_pins=short.pin) == {"evidence.signature"}


@pytest.mark.parametrize("extra", [b"", EXTRA[:-1], EXTRA + b"\0", bytes(32)])
def test_a_replayed_quote_is_refused(extra: bytes) -> None:
    assert refused(TPM.evidence(extra, PCRS)) == {"evidence.extra-data"}
    assert refused(qualifying_data=extra) == {"evidence.extra-data"}


def with_selections(*selections: bytes, pcrs: dict[int, bytes] = PCRS) -> TpmEvidence:
    message = quote(EXTRA, pcrs, selections=selections, signer=TPM.signer)
    return resigned(message, pcrs=pcrs)


ALL = tuple(range(24))


@pytest.mark.parametrize(
    ("selections", "steps"),
    [
        ([selection(ALL, bank=0x0004)], {"evidence.pcr-bank"}),
        ([selection(ALL, bank=0x000C)], {"evidence.pcr-bank"}),
        ([selection(ALL), selection([0], bank=0x0004)], {"evidence.pcr-bank", "evidence.pcr-selection"}),
        ([selection(ALL), selection([], bank=0x0004)], set()),
        ([selection(ALL), selection([0])], {"evidence.pcr-selection"}),
        ([selection(ALL[:-1])], {"evidence.pcr-selection"}),
        ([], {"evidence.pcr-bank", "evidence.pcr-selection"}),
    ],
    ids=["SHA-1", "SHA-384", "SHA-1 beside", "empty bank beside", "twice", "one less", "none"],
)
def test_only_the_sha256_bank_counts_and_all_of_it_is_given(selections: Sequence[bytes], steps: set[str]) -> None:
    assert refused(with_selections(*selections)) == steps


def test_a_quote_over_nothing_is_refused() -> None:
    assert refused(with_selections(selection([]), pcrs={})) == {"evidence.pcr-bank"}


def test_a_changed_pcr_is_refused() -> None:
    assert refused(replace(GOOD, pcrs={**PCRS, 0: b"\1" * 32})) == {"evidence.pcr-digest"}
    assert refused(replace(GOOD, pcrs={0: bytes(32)})) == {"evidence.pcr-digest", "evidence.pcr-selection"}


def test_the_boot_log_must_replay_into_the_pcrs() -> None:
    assert refused(eventlog=event_log(event(4, b"loader"))) == {"evidence.eventlog"}
    assert refused(eventlog=event_log(event(4, b"kernel"), event(4, b"loader"))) == {"evidence.eventlog"}
    assert refused(eventlog=event_log()) == {"evidence.eventlog"}
    assert verdicts(appraise(eventlog=LOG))["evidence.eventlog"] == "pass"
    assert "evidence.eventlog" not in verdicts(appraise())


def test_a_pcr_that_the_log_touches_and_the_quote_lacks_does_not_match() -> None:
    pcrs = {index: PCRS[index] for index in (0, 14)}
    assert refused(TPM.evidence(EXTRA, pcrs), eventlog=LOG) == {"evidence.eventlog"}


def test_a_malformed_log_is_malformed_evidence() -> None:
    with pytest.raises(MalformedEvidence):
        appraise(eventlog=LOG[:-70])


@pytest.mark.parametrize(
    "pcr",
    [bytes(32), extended(LAUNCH, LAUNCH), extended(b"other"), hashlib.sha256(LAUNCH).digest()],
    ids=["never", "twice", "another", "set"],
)
def test_the_launch_config_is_exactly_one_extend_of_pcr_14(pcr: bytes) -> None:
    assert appraise(TPM.evidence(EXTRA, {**PCRS, 14: pcr})).launch_sha256 == b""


def test_a_quote_without_pcr_14_says_nothing_about_the_launch() -> None:
    assert appraise(TPM.evidence(EXTRA, {0: bytes(32)})).launch_sha256 == b""


def test_everything_wrong_is_reported_together() -> None:
    pcrs = {**PCRS, 0: b"\1" * 32}
    evidence = replace(GOOD, quote=GOOD.quote[:-1] + b"\0", pcrs=pcrs)
    steps = refused(evidence, now=NOW + 60 * DAY, qualifying_data=b"", eventlog=event_log(), roots=frozenset())
    assert steps == {
        "evidence.root",
        "evidence.chain",
        "evidence.crl",
        "evidence.signature",
        "evidence.extra-data",
        "evidence.pcr-digest",
        "evidence.eventlog",
    }


def test_every_failure_tells_what_to_do() -> None:
    steps = appraise(replace(GOOD, pcrs={}, certificates=()), now=NOW + 60 * DAY, qualifying_data=b"x").factors
    wrong = [factor for factor in steps if factor.verdict == "fail"]
    assert len(wrong) == 4
    assert all(factor.expected and factor.got and factor.hint for factor in wrong)


def bare(folder: Path) -> TpmEvidence:
    key = load_pem_public_key((folder / "ak.pem").read_bytes())
    assert isinstance(key, rsa.RSAPublicKey)
    pcrs = json.loads((folder / "pcrs_sha256.json").read_text())
    return TpmEvidence(
        (folder / "message.bin").read_bytes(),
        (folder / "signature.tpmt").read_bytes(),
        {int(index): bytes.fromhex(value) for index, value in pcrs.items()},
        public_area(key),
    )


@real
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("swtpm_rsa", set()),
        ("swtpm_rsa__wrong_nonce", {"evidence.extra-data"}),
        ("swtpm_rsa__wrong_pcr8", {"evidence.pcr-digest"}),
        ("swtpm_rsa__wrong_signature", {"evidence.signature"}),
        ("swtpm_rsa__wrong_magic", {"evidence.magic", "evidence.signature"}),
    ],
)
def test_real_quotes(name: str, steps: set[str]) -> None:
    folder = VECTORS / "vtpm" / "self" / name
    nonce = bytes.fromhex((folder / "nonce.hex").read_text())
    pin = frozenset({(folder / "ak.name").read_bytes()[2:].hex()})
    appraisal = judge(bare(folder), qualifying_data=nonce, policy=Policy(), now=NOW, ak_pins=pin)
    assert failures(appraisal) == steps
    unpinned = judge(bare(folder), qualifying_data=nonce, policy=Policy(), now=NOW)
    assert failures(unpinned) == steps | {"evidence.ak", "evidence.ak-name"}


@real
def test_no_single_bit_of_a_real_quote_may_change() -> None:
    folder = VECTORS / "vtpm" / "self" / "swtpm_rsa"
    good = bare(folder)
    given: dict[str, Any] = {
        "qualifying_data": bytes.fromhex((folder / "nonce.hex").read_text()),
        "policy": Policy(),
        "now": NOW,
        "ak_pins": frozenset({(folder / "ak.name").read_bytes()[2:].hex()}),
    }
    mutants = [replace(good, quote=data) for data in flips(good.quote)]
    mutants += [replace(good, signature=data) for data in flips(good.signature)]
    mutants += [replace(good, ak=data) for data in flips(good.ak)]
    for mutant in mutants:
        try:
            assert failures(judge(mutant, **given))
        except MalformedEvidence:
            continue


@real
def test_a_real_quote_of_24_pcrs() -> None:
    evidence = json.loads((VECTORS / "vtpm" / "trustee" / "tpm_evidence" / "evidence.json").read_text())
    key = load_der_public_key(base64.b64decode(evidence["ak_public"]))
    assert isinstance(key, rsa.RSAPublicKey)
    quoted = evidence["tpm_quote"]
    pcrs = {index: bytes.fromhex(value) for index, value in enumerate(quoted["pcrs"])}
    message = base64.b64decode(quoted["message"])
    parsed = TpmEvidence(message, base64.b64decode(quoted["signature"]), pcrs, public_area(key))
    extra = message[8 + 34 + 2 : 8 + 34 + 2 + int.from_bytes(message[42:44], "big")]
    pin = frozenset({parse_public(parsed.ak).name_digest})
    given: dict[str, Any] = {"qualifying_data": extra, "policy": Policy(), "now": NOW, "ak_pins": pin}
    assert failures(judge(parsed, **given)) == set()
    assert failures(judge(replace(parsed, pcrs={**pcrs, 3: b"\1" * 32}), **given)) == {"evidence.pcr-digest"}


@real
def test_the_real_ccel_is_that_of_its_quote_and_another_boot_is_not() -> None:
    def check(folder: Path, name: str) -> str:
        rtmrs = json.loads((folder / "case.json").read_text())["claims"]["rtmr"]
        values = {index: bytes.fromhex(value) for index, value in enumerate(rtmrs)}
        return check_rtmr_log((folder / name).read_bytes(), values).verdict

    assert check(VECTORS / "tdx" / "go-tdx-guest" / "gce_cos113_with_ccel", "ccel.bin") == "pass"
    assert check(VECTORS / "tdx" / "trustee" / "debug_td", "ccel_of_another_boot.bin") == "fail"
