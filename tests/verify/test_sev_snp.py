import datetime as dt
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st
from tests.vendors import amd
from tests.vendors.amd import DAY, NOW, YEAR, Authority, Crl, Evidence, Leaf
from tests.verify.world import flips

from cloister.errors import MalformedEvidence
from cloister.evidence.sev_snp import (
    SIGNED_SIZE,
    VCEK,
    VERSIONS,
    VLEK,
    parse_certificate_table,
    pem_or_der_certificates,
)
from cloister.verify.amd_certificates import check_chain, check_crl, check_root, load_chain, load_crl
from cloister.verify.factors import Factor
from cloister.verify.platform import Appraisal
from cloister.verify.policy import Limits, Policy, Tcb
from cloister.verify.sev_snp import ARK_SHA256, judge

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
needs_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason="needs the shared vectors (../shared/vectors)")

STRICT = Policy(
    limits=Limits(max_crl_age_days=30),
    tcb=Tcb(min_sev_snp={"bootloader": 3, "tee": 1, "snp": 4, "microcode": 77}),
)
FLOOR = Tcb(min_sev_snp={"snp": 0})
WITHOUT_CRL = Policy(tcb=FLOOR, limits=Limits(dangerously_allow_missing_crl=True))
MILAN, TURIN = amd.TCB["Milan"], amd.TCB["Turin"]

CHAIN, ROOT, CRL, SIGNATURE = "evidence.chain", "evidence.root", "evidence.crl", "evidence.signature"
KEY, PRODUCT, CHIP, TCB = "evidence.signing-key", "evidence.product", "evidence.chip-id", "evidence.tcb"
RESERVED, DEBUG, MIGRATION = "evidence.reserved", "evidence.debug", "evidence.migration"
GUEST_POLICY, VMPL, ORDER = "evidence.guest-policy", "evidence.vmpl", "evidence.tcb-order"
AUTHOR, MINIMUM = "evidence.author-key", "tcb.minimum"


def appraised(evidence: Evidence, policy: Policy = STRICT, now: float = NOW, **changes: Any) -> Appraisal:
    """`changes`: of the evidence."""
    evidence = replace(evidence, **changes)
    return judge(evidence.report, evidence.chain, evidence.crl, policy=policy, now=now, roots=evidence.roots)


def failures(appraisal: Appraisal) -> set[str]:
    return {factor.step for factor in appraisal.factors if factor.verdict == "fail"}


def factor(appraisal: Appraisal, step: str) -> Factor:
    return next(each for each in appraisal.factors if each.step == step)


@cache
def good(product: str = "Milan", kind: int = VCEK) -> Evidence:
    return amd.make(product, kind=kind)


@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", [VCEK, VLEK], ids=["VCEK", "VLEK"])
def test_accepts_genuine_reports_and_no_bit_flipped_sibling(product: str, version: int, kind: int) -> None:
    evidence = amd.make(product, version=version, kind=kind)
    assert failures(appraised(evidence)) == set()
    flipped = evidence.report[:0x95] + bytes([evidence.report[0x95] ^ 1]) + evidence.report[0x96:]
    assert failures(appraised(evidence, report=flipped)) == {SIGNATURE}


def test_says_what_the_report_says() -> None:
    appraisal = appraised(amd.make(version=5, measurement=b"\x01" * 48, guest_svn=9, id_key_digest=b"\x02" * 48))
    assert (appraisal.platform, appraisal.simulated, appraisal.engine) == ("sev-snp", False, None)
    assert (appraisal.report_data, appraisal.launch_sha256) == (amd.REPORT_DATA, amd.HOST_DATA)
    assert appraisal.platform_id == amd.CHIP_ID.hex()
    assert appraisal.tcb is None
    assert appraisal.measurement == {
        "measurement": "01" * 48,
        "id_key_digest": "02" * 48,
        "author_key_digest": "00" * 48,
        "product": "Milan",
        "guest_svn": "9",
        "family_id": bytes(range(16)).hex(),
        "image_id": bytes(range(16, 32)).hex(),
        "policy": "0x3001f",
        "platform_info": "0x25",
    }
    assert appraisal.counters == {"amd-crl-number-milan": 6}
    assert {expiry.what: expiry.at for expiry in appraisal.expiries} == {
        "AMD VCEK certificate": NOW + 7 * YEAR,
        "AMD ASK certificate": NOW + 20 * YEAR,
        "AMD ARK certificate": NOW + 20 * YEAR,
        "AMD revocation list": NOW + 300 * DAY,
    }
    info = factor(appraisal, "evidence.platform-info")
    assert (info.verdict, info.got) == ("not-checked", "on: smt ecc alias-check; guest policy: smt")
    assert factor(appraisal, "evidence.mitigations").got == "launch 0x3, current 0x7"


REFUSED: Mapping[str, tuple[dict[str, Any], set[str]]] = {
    # the chain
    "a self-made chain": (
        {
            "ark": Authority(owner="mallory"),
            "ask": Authority(owner="mallory"),
            "leaf": Leaf(owner="mallory"),
            "crl": Crl(owner="mallory"),
        },
        {ROOT},
    ),
    "an ASK of another root": ({"ask": Authority(signer="mallory")}, {CHAIN}),
    "an ARK that another signed": ({"ark": Authority(signer="mallory")}, {CHAIN}),
    "another ASK's leaf": ({"leaf": Leaf(owner="mallory")}, {CHAIN}),
    "a leaf that names another issuer": ({"leaf": Leaf(issuer="SEV-Genoa")}, {CHAIN}),
    "a leaf signed with PKCS #1 v1.5": ({"leaf": Leaf(pss=False)}, {CHAIN}),
    "an ASK signed with SHA-256": ({"ask": Authority(sha=256)}, {CHAIN}),
    "a leaf that is a CA": ({"leaf": Leaf(ca=True)}, {CHAIN}),
    "an ASK that is no CA": ({"ask": Authority(ca=False)}, {CHAIN}),
    "an ASK for other uses": ({"ask": Authority(signs_certificates=False)}, {CHAIN}),
    "an ASK that names no use": ({"ask": Authority(usage=False)}, {CHAIN}),
    "an ASK with an unknown critical extension": ({"ask": Authority(critical=True)}, {CHAIN}),
    "an expired leaf": ({"leaf": Leaf(valid=(30 * DAY, -1.0))}, {CHAIN}),
    "an expired ASK": ({"ask": Authority(valid=(30 * DAY, -1.0))}, {CHAIN}),
    "an expired ARK": ({"ark": Authority(valid=(30 * DAY, -1.0))}, {CHAIN}),
    "a leaf not yet valid": ({"leaf": Leaf(valid=(-1.0, DAY))}, {CHAIN}),
    "an ASK not yet valid": ({"ask": Authority(valid=(-1.0, DAY))}, {CHAIN}),
    "an ARK not yet valid": ({"ark": Authority(valid=(-1.0, DAY))}, {CHAIN}),
    # revocation
    "a revoked ASK": ({"crl": Crl(revoked=("ASK",))}, {CRL}),
    "a revoked ASVK": ({"kind": VLEK, "crl": Crl(revoked=("ASK",))}, {CRL}),
    "a revoked ARK": ({"crl": Crl(revoked=("ARK",))}, {CRL}),
    "another's list": ({"crl": Crl(owner="mallory")}, {CRL}),
    "a list by another name": ({"crl": Crl(issuer="ARK-Genoa")}, {CRL}),
    "a list signed with PKCS #1 v1.5": ({"crl": Crl(pss=False)}, {CRL}),
    "a list by an ARK that signs none": ({"ark": Authority(signs_lists=False)}, {CRL}),
    "a list with an unknown critical extension": ({"crl": Crl(critical=True)}, {CRL}),
    "a list out of date": ({"crl": Crl(valid=(10 * DAY, -1.0))}, {CRL}),
    "a list without an end": ({"crl": Crl(valid=(10 * DAY, None))}, {CRL}),
    "a list of tomorrow": ({"crl": Crl(valid=(-1.0, DAY))}, {CRL}),
    "a list older than the policy allows": ({"crl": Crl(valid=(30 * DAY + 1, DAY))}, {CRL}),
    # signature and key
    "another chip's signature": ({"swapped_key": True}, {SIGNATURE}),
    "a leaf on another curve": ({"leaf": Leaf(curve=ec.SECP256R1())}, {SIGNATURE}),
    "a VLEK's certificate under a VCEK's report": ({"kind": VLEK, "key_info": VCEK << 2}, {KEY}),
    "a VCEK's certificate under a VLEK's report": ({"key_info": VLEK << 2}, {KEY}),
    "no signing key": ({"key_info": 7 << 2}, {KEY}),
    "a reserved signing key": ({"key_info": 2 << 2}, {KEY}),
    "a masked chip key": ({"key_info": 1 << 1}, {KEY}),
    "a leaf of both kinds": ({"leaf": Leaf(extensions={amd.CSP_ID: amd.ia5("cloud")})}, {KEY}),
    "a leaf of neither kind": ({"leaf": Leaf(extensions={amd.HWID: None})}, {KEY}),
    "a csp_id that is no text": ({"kind": VLEK, "leaf": Leaf(extensions={amd.CSP_ID: b"\x04\x01a"})}, {KEY}),
    "an empty csp_id": ({"kind": VLEK, "leaf": Leaf(extensions={amd.CSP_ID: b"\x16\x00"})}, {KEY}),
    "a csp_id shorter than it says": ({"kind": VLEK, "leaf": Leaf(extensions={amd.CSP_ID: b"\x16\x05abc"})}, {KEY}),
    "a csp_id too long": ({"kind": VLEK, "leaf": Leaf(extensions={amd.CSP_ID: amd.ia5("a" * 126)})}, {KEY}),
    "a csp_id that paints": ({"kind": VLEK, "leaf": Leaf(extensions={amd.CSP_ID: amd.ia5("a\x1b[2J")})}, {KEY}),
    "a csp_id with a DEL": ({"kind": VLEK, "leaf": Leaf(extensions={amd.CSP_ID: amd.ia5("a\x7f")})}, {KEY}),
    # binding
    "another chip's certificate": ({"leaf": Leaf(extensions={amd.HWID: bytes(63) + b"\x01"})}, {CHIP}),
    "an hwID behind another header": (
        {"product": "Turin", "leaf": Leaf(extensions={amd.HWID: b"\x0c\x08" + amd.TURIN_CHIP_ID[:8]})},
        {KEY, CHIP},
    ),
    "an hwID cut short": ({"leaf": Leaf(extensions={amd.HWID: amd.CHIP_ID[:8]})}, {KEY, CHIP}),
    "another Turin chip's certificate": (
        {"product": "Turin", "leaf": Leaf(extensions={amd.HWID: bytes(7) + b"\x01"})},
        {CHIP},
    ),
    "a Turin chip id longer than its hwID": (
        {"product": "Turin", "chip_id": amd.TURIN_CHIP_ID[:-1] + b"\x01"},
        {CHIP},
    ),
    "a masked chip id": ({"chip_id": bytes(64)}, {CHIP}),
    "a processor of another product": ({"cpuid": amd.CPUID["Genoa"]}, {PRODUCT}),
    "an unknown processor": ({"cpuid": (0x1B, 0, 0)}, {PRODUCT}),
    "a leaf of another product": (
        {"leaf": Leaf(extensions={amd.PRODUCT_NAME: amd.ia5("Genoa")}), "cpuid": amd.CPUID["Genoa"]},
        {PRODUCT},
    ),
    "a leaf of an unknown product": ({"leaf": Leaf(extensions={amd.PRODUCT_NAME: amd.ia5("Rome")})}, {PRODUCT, KEY}),
    "a leaf without a product": ({"leaf": Leaf(extensions={amd.PRODUCT_NAME: None})}, {PRODUCT, KEY}),
    "a report of an older TCB": ({"reported_tcb": bytes([3, *MILAN[1:]])}, {TCB}),
    "a report whose reserved TCB bytes are not zero": (
        {name: bytes([*MILAN[:2], 1, *MILAN[3:]]) for name in ("reported_tcb", "current_tcb")},
        {TCB},
    ),
    "a leaf without the microcode's number": ({"leaf": Leaf(extensions={amd.SPL["microcode"]: None})}, {TCB}),
    "a leaf with a number that Milan does not have": (
        {"leaf": Leaf(extensions={amd.SPL["fmc"]: amd.integer(1)})},
        {TCB},
    ),
    "a leaf with a long number": ({"leaf": Leaf(extensions={amd.SPL["tee"]: b"\x02\x02\x00\x01"})}, {TCB, KEY}),
    "a leaf with a number and a byte more": (
        {"leaf": Leaf(extensions={amd.SPL["tee"]: b"\x02\x01\x01\x00"})},
        {TCB, KEY},
    ),
    "a leaf with a long number and a byte more": (
        {"leaf": Leaf(extensions={amd.SPL["microcode"]: b"\x02\x02\x00\xdb\x00"})},
        {TCB, KEY},
    ),
    "a leaf with a number of another type": ({"leaf": Leaf(extensions={amd.SPL["tee"]: b"\x04\x01\x01"})}, {TCB, KEY}),
    "a leaf with a long number of another type": (
        {"leaf": Leaf(extensions={amd.SPL["microcode"]: b"\x04\x02\x00\xdb"})},
        {TCB, KEY},
    ),
    "a leaf with a negative number": ({"leaf": Leaf(extensions={amd.SPL["microcode"]: b"\x02\x01\xdb"})}, {TCB, KEY}),
    # how the guest runs
    "debugging": ({"policy": 0x3001F | 1 << 19}, {DEBUG}),
    "migration": ({"policy": 0x3001F | 1 << 18}, {MIGRATION}),
    "policy bit 17 zero": ({"policy": 0x1001F}, {GUEST_POLICY}),
    "policy bit 26 one": ({"policy": 0x3001F | 1 << 26}, {GUEST_POLICY}),
    "policy bit 63 one": ({"policy": 0x3001F | 1 << 63}, {GUEST_POLICY}),
    "VMPL 1": ({"vmpl": 1}, {VMPL}),
    "VMPL 3": ({"vmpl": 3}, {VMPL}),
    "asked for by the host": ({"vmpl": 0xFFFF_FFFF}, {VMPL}),
    "committed over current": ({"committed_tcb": bytes([*MILAN[:7], 220])}, {ORDER}),
    "reported over current": ({"current_tcb": bytes([*MILAN[:7], 218]), "committed_tcb": bytes(8)}, {ORDER}),
    "an author key without its digest": ({"key_info": 1}, {AUTHOR}),
    "an author key's digest without the key": ({"author_key_digest": b"\x01" * 48}, {AUTHOR}),
    "launched under old firmware": ({"launch_tcb": bytes([2, *MILAN[1:]])}, {MINIMUM}),
    "reserved key information": ({"key_info": 1 << 5}, {RESERVED}),
    "reserved bytes behind the CPUID": ({"raw": {0x18B: b"\x01"}}, {RESERVED}),
    "a CPUID in version 2": ({"version": 2, "raw": {0x188: b"\x19"}}, {RESERVED}),
    "mitigation vectors in version 3": ({"raw": {0x1F8: b"\x01"}}, {RESERVED}),
    "reserved bytes at the end": ({"version": 5, "raw": {0x29F: b"\x01"}}, {RESERVED}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_the_right_factor_alone(name: str) -> None:
    changes, expected = REFUSED[name]
    evidence = amd.make(**changes)
    roots = good(changes.get("product", "Milan")).roots if ROOT in expected else evidence.roots
    appraisal = appraised(evidence, roots=roots)
    assert failures(appraisal) == expected
    assert all(each.expected and each.got and each.hint for each in appraisal.factors if each.verdict == "fail")


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": 0x2001F},
        {"policy": 0x3001F | 0x3F << 20},
        {"platform_info": 0},
        {"platform_info": 1 << 63},
        {"key_info": 1, "author_key_digest": b"\x01" * 48},
        {"current_tcb": bytes([5, *MILAN[1:]])},
        {"current_tcb": bytes([5, *MILAN[1:]]), "committed_tcb": bytes([5, *MILAN[1:]])},
        {"kind": VLEK, "chip_id": bytes(64)},
        {"leaf": Leaf(extensions={amd.SPL["spl4"]: None})},
        {"leaf": Leaf(extensions={amd.HWID: b"\x04\x40" + amd.CHIP_ID})},
        {"chip_id": b"\x04\x40" + bytes(62), "leaf": Leaf(extensions={amd.HWID: b"\x04\x40" + bytes(62)})},
        {"leaf": Leaf(extensions={amd.SPL["fmc"]: amd.integer(0)})},
        {"crl": Crl(serials=(1, 131073))},
        {"crl": Crl(valid=(30 * DAY, DAY))},
        {"cpuid": (0x19, 0x00, 0)},
        {"product": "Genoa", "cpuid": (0x19, 0xA0, 2)},
    ],
)
def test_accepts_what_is_no_fault(changes: dict[str, Any]) -> None:
    assert failures(appraised(amd.make(**changes))) == set()


def test_a_list_without_a_number_counts_nothing() -> None:
    assert appraised(amd.make(crl=Crl(number=None))).counters == {}


def test_an_hwid_longer_than_a_chip_id_is_refused() -> None:
    evidence = amd.make(leaf=Leaf(extensions={amd.HWID: b"\x0c\x40" + amd.CHIP_ID}))
    assert failures(appraised(evidence)) == {KEY, CHIP}


def test_a_product_that_nobody_knows_is_none_even_where_all_agree_on_it() -> None:
    evidence = amd.make(version=2, leaf=Leaf(extensions={amd.PRODUCT_NAME: amd.ia5("Rome")}))
    appraisal = appraised(evidence, roots={"Rome": evidence.roots["Milan"]})
    assert failures(appraisal) == {PRODUCT, KEY}
    assert appraisal.counters == {}


def test_a_reserved_kind_of_key_is_named_as_none() -> None:
    wrong = factor(appraised(amd.make(key_info=2 << 2)), KEY)
    assert (wrong.expected, wrong.got) == ("VCEK or VLEK", "none (2)")


def test_a_leaf_whose_key_is_no_elliptic_curves_is_refused() -> None:
    ask = good().chain[1]
    assert failures(appraised(good(), chain=(ask, *good().chain[1:]))) >= {CHAIN, SIGNATURE}


def test_a_leaf_with_a_negative_serial_number_is_malformed() -> None:
    leaf = good().chain[0]
    assert leaf.count(bytes.fromhex("a003020102020100")) == 1
    negative = leaf.replace(bytes.fromhex("a003020102020100"), bytes.fromhex("a003020102020180"))
    with pytest.raises(MalformedEvidence, match="strictly"):
        appraised(good(), chain=(negative, *good().chain[1:]))


def test_a_list_whose_entries_cannot_be_read_is_malformed() -> None:
    entry = (
        x509.RevokedCertificateBuilder()
        .serial_number(5)
        .revocation_date(dt.datetime.fromtimestamp(NOW, dt.UTC))
        .add_extension(x509.UnrecognizedExtension(x509.CRLReason.oid, b"\x0a\x01\x63"), critical=False)
    )
    crl = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(x509.load_der_x509_certificate(good().chain[2]).subject)
        .last_update(dt.datetime.fromtimestamp(NOW - DAY, dt.UTC))
        .next_update(dt.datetime.fromtimestamp(NOW + DAY, dt.UTC))
        .add_revoked_certificate(entry.build())
        .sign(amd.rsa_key("amd ARK-Milan"), hashes.SHA384())
    )
    with pytest.raises(MalformedEvidence, match="list"):
        load_crl(crl.public_bytes(Encoding.DER))


def test_a_list_is_judged_by_an_ark_alone_that_has_amds_kind_of_key() -> None:
    crl = load_crl(good().crl or b"")
    _, ask, ark = load_chain(good().chain)
    key = ec.generate_private_key(ec.SECP384R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(ark.subject)
        .issuer_name(ark.subject)
        .serial_number(1)
        .public_key(key.public_key())
        .not_valid_before(ark.not_valid_before_utc)
        .not_valid_after(ark.not_valid_after_utc)
    )
    for extension in ark.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    assert check_crl(crl, (ask, builder.sign(key, hashes.SHA384())), STRICT, NOW).got == "not signed by the ARK"


def test_shows_the_policy_and_a_tcb_in_full() -> None:
    info = factor(appraised(amd.make(policy=0x3001F | 1 << 20 | 1 << 22 | 1 << 25)), "evidence.platform-info")
    assert info.got.endswith("guest policy: smt single-socket aes-256-xts page-swap-disabled")
    zero = bytes([4, 0, 1, *MILAN[3:]])
    assert factor(appraised(amd.make(reported_tcb=zero, current_tcb=zero)), TCB).got == (
        "bootloader=4 tee=0 spl4=1 snp=24 microcode=219"
    )


def test_every_failure_is_reported_at_once() -> None:
    evidence = amd.make(
        policy=1 << 19 | 1 << 18, vmpl=2, leaf=Leaf(valid=(2.0, -1.0)), crl=Crl(revoked=("ASK",)), swapped_key=True
    )
    assert failures(appraised(evidence)) == {CHAIN, CRL, SIGNATURE, DEBUG, MIGRATION, GUEST_POLICY, VMPL}


@pytest.mark.parametrize("signature", [bytes(144), b"\xff" * 144, bytes(72) + b"\x01" + bytes(71)])
def test_refuses_signature_values_out_of_range(signature: bytes) -> None:
    report = amd.with_signature(good().report[:SIGNED_SIZE], signature)
    assert failures(appraised(good(), report=report)) == {SIGNATURE}


def test_the_chip_id_of_a_vlek_is_the_firmwares_word() -> None:
    appraisal = appraised(good("Milan", VLEK))
    assert factor(appraisal, CHIP).verdict == "not-checked"
    assert "synthetic-cloud" in factor(appraisal, KEY).got
    assert appraisal.platform_id == amd.CHIP_ID.hex()
    masked = appraised(amd.make(kind=VLEK, chip_id=bytes(64)))
    assert (masked.platform_id, factor(masked, CHIP).got) == ("", "masked")


def test_names_unknown_bits_of_the_platforms_information() -> None:
    info = factor(appraised(amd.make(platform_info=1 << 63 | 1)), "evidence.platform-info")
    assert info.got == "on: smt unknown 0x8000000000000000; guest policy: smt"


# Revocation lists, policy


def test_a_missing_list_fails_unless_the_policy_allows_it() -> None:
    assert failures(appraised(good(), crl=None)) == {CRL}
    assert "dangerously_allow_missing_crl" in factor(appraised(good(), crl=None), CRL).hint
    allowed = appraised(good(), WITHOUT_CRL, crl=None)
    assert (failures(allowed), factor(allowed, CRL).verdict) == (set(), "not-checked")


def test_a_list_that_came_is_judged_even_where_none_is_needed() -> None:
    assert failures(appraised(amd.make(crl=Crl(revoked=("ASK",))), WITHOUT_CRL)) == {CRL}


def test_without_a_maximum_age_the_lists_own_end_counts() -> None:
    assert failures(appraised(amd.make(crl=Crl(valid=(900 * DAY, 1.0))), Policy(tcb=FLOOR))) == set()


def test_a_policy_must_name_the_least_firmware_and_is_told_what_runs() -> None:
    unjudged = factor(appraised(good(), Policy()), MINIMUM)
    assert (unjudged.verdict, unjudged.got) == ("fail", "bootloader=4 tee=1 snp=24 microcode=219")
    assert "min_sev_snp = { bootloader = 4, tee = 1, snp = 24, microcode = 219 }" in unjudged.hint


@pytest.mark.parametrize(
    ("product", "least"),
    [
        ("Milan", {"bootloader": 4, "tee": 1, "snp": 24, "microcode": 219}),
        ("Turin", {"fmc": 2, "bootloader": 3, "tee": 1, "snp": 4, "microcode": 77}),
    ],
)
def test_each_components_minimum_counts(product: str, least: dict[str, int]) -> None:
    def with_minimum(minimum: dict[str, int]) -> Appraisal:
        return appraised(good(product), Policy(tcb=Tcb(min_sev_snp=minimum)))

    assert failures(with_minimum(least)) == set()
    for name in least:
        low = with_minimum({**least, name: least[name] + 1})
        assert failures(low) == {MINIMUM}
        assert factor(low, MINIMUM).got == f"reported {name}={least[name]}, launch {name}={least[name]}"


def test_a_minimum_for_a_component_that_the_product_lacks_is_not_met() -> None:
    assert failures(appraised(good(), Policy(tcb=Tcb(min_sev_snp={"fmc": 0})))) == {MINIMUM}


# Roots, confusion


def test_the_pinned_roots_do_not_know_a_synthetic_one() -> None:
    evidence = good()
    real = judge(evidence.report, evidence.chain, evidence.crl, policy=STRICT, now=NOW)
    assert failures(real) == {ROOT}


def test_another_products_chain_is_refused() -> None:
    both = {**good("Milan").roots, **good("Genoa").roots}
    chain = (good("Milan").chain[0], *good("Genoa").chain[1:])
    assert failures(appraised(good("Milan"), chain=chain, roots=both)) == {CHAIN, PRODUCT, CRL}


def test_a_root_under_another_products_name_is_refused() -> None:
    roots = {"Genoa": good("Milan").roots["Milan"]}
    assert failures(appraised(good("Milan"), roots=roots)) == {PRODUCT}


def test_another_vms_certificate_is_refused() -> None:
    other = amd.make(leaf=Leaf(owner="amd", extensions={amd.HWID: bytes(range(64))}))
    assert failures(appraised(good(), chain=other.chain)) == {CHIP}


def test_a_vlek_chain_does_not_stand_for_a_vcek() -> None:
    chain = (good().chain[0], *good("Milan", VLEK).chain[1:])
    assert failures(appraised(good(), chain=chain)) == {CHAIN}


@pytest.mark.parametrize("order", [(), (0,), (0, 1), (1, 2), (0, 1, 2, 2)])
def test_a_chain_of_another_length_is_malformed(order: tuple[int, ...]) -> None:
    chain = [good().chain[at] for at in order]
    with pytest.raises(MalformedEvidence, match="An AMD chain"):
        judge(good().report, chain, good().crl, policy=STRICT, now=NOW, roots=good().roots)


def test_a_hash_that_is_none_is_refused() -> None:
    """Which hash a signature is over stands in the certificate: one that nobody knows is no error but a refusal."""
    leaf, ask, ark = good().chain
    sha384, none = bytes.fromhex("0609608648016503040202"), bytes.fromhex("060960864801650304027f")
    assert sha384 in ask
    factor = check_chain(load_chain((leaf, ask.replace(sha384, none), ark)), NOW)
    assert factor.verdict == "fail"
    assert "ASK is not signed by its issuer" in factor.got


def test_a_chain_in_another_order_is_refused() -> None:
    leaf, ask, ark = good().chain
    with pytest.raises(MalformedEvidence):
        appraised(good(), chain=(ark, ask, leaf))  # only a leaf may have the serial number 0
    assert {ROOT, CHAIN} <= failures(appraised(good(), chain=(leaf, ark, ask)))


# Clocks


@pytest.mark.parametrize("at", [NOW - 5.0, NOW + 5.0])
@pytest.mark.parametrize("what", ["ark", "ask", "leaf", "crl"])
def test_each_bound_is_exact(what: str, at: float) -> None:
    """Both ends of each validity belong to it; a second more does not."""
    window = (NOW - at, 60.0) if at < NOW else (60.0, at - NOW)
    evidence = amd.make(
        ark=Authority(valid=window) if what == "ark" else None,
        ask=Authority(valid=window) if what == "ask" else None,
        leaf=Leaf(valid=window) if what == "leaf" else None,
        crl=Crl(valid=window) if what == "crl" else None,
    )
    outside = -1.0 if at < NOW else 1.0
    assert failures(appraised(evidence, now=at)) == set()
    assert failures(appraised(evidence, now=at + outside)) == {CRL if what == "crl" else CHAIN}


@pytest.mark.parametrize("now", [0.0, -1e18, 1e18, float("nan"), float("inf"), float("-inf")])
def test_no_time_outside_is_accepted(now: float) -> None:
    assert failures(appraised(good(), now=now)) >= {CHAIN, CRL}


# Every bit


def test_no_flipped_bit_of_a_report_is_accepted() -> None:
    """None: what is not signed has to be zero."""
    for at, flipped in enumerate(flips(good().report)):
        try:
            assert failures(appraised(good(), report=flipped)), hex(at)
        except MalformedEvidence:
            assert at < 4 or 0x34 <= at < 0x38, hex(at)


def test_no_flipped_bit_of_a_certificate_is_accepted() -> None:
    evidence = good()
    for which, der in enumerate(evidence.chain):
        for at, flipped in enumerate(flips(der)):
            chain = [*evidence.chain]
            chain[which] = flipped
            try:
                certificates = load_chain(chain)
            except MalformedEvidence:
                continue
            root = hashlib.sha256(chain[2]).hexdigest()
            verdicts = {check_root(root, evidence.roots).verdict, check_chain(certificates, NOW).verdict}
            assert "fail" in verdicts, (which, at)


def test_no_flipped_bit_of_a_revocation_list_is_accepted() -> None:
    assert good().crl is not None
    _, ask, ark = load_chain(good().chain)
    for at, flipped in enumerate(flips(good().crl or b"")):
        try:
            crl = load_crl(flipped)
        except MalformedEvidence:
            continue
        assert check_crl(crl, (ask, ark), STRICT, NOW).verdict == "fail", at


def refused(evidence: Evidence, **changes: Any) -> bool:
    try:
        return bool(failures(appraised(evidence, **changes)))
    except MalformedEvidence:
        return True


def test_certificates_and_lists_cut_short_or_followed_are_malformed() -> None:
    evidence = good()
    leaf, ask, ark = evidence.chain
    for length in [*range(0, len(leaf), 7), len(leaf) - 1]:
        with pytest.raises(MalformedEvidence):
            appraised(evidence, chain=(leaf[:length], ask, ark))
    for chain in [(leaf + b"\0", ask, ark), (leaf, ask + b"\0", ark), (leaf, ask, ark + b"\0")]:
        with pytest.raises(MalformedEvidence):
            appraised(evidence, chain=chain)
    assert evidence.crl is not None
    for crl in [evidence.crl + b"\0", *(evidence.crl[:length] for length in range(0, len(evidence.crl), 5))]:
        with pytest.raises(MalformedEvidence):
            appraised(evidence, crl=crl)


def test_signatures_with_unused_bits_are_malformed() -> None:
    """pyca would ignore how many bits of the last byte a signature says it does not use."""

    def even(made: Callable[[], bytes]) -> bytes:
        return next(der for der in iter(made, b"") if der[-1] % 2 == 0)

    def one_unused(der: bytes) -> bytes:
        return der[:-257] + b"\x01" + der[-256:]

    leaf = even(lambda: amd.certificate_leaf("Milan", VCEK, Leaf()))
    crl = even(lambda: amd.revocation_list("Milan", Crl()))
    chain = (leaf, *good().chain[1:])
    assert failures(appraised(good(), chain=chain, crl=crl)) == set()
    with pytest.raises(MalformedEvidence, match="strictly"):
        appraised(good(), chain=(one_unused(leaf), *chain[1:]))
    with pytest.raises(MalformedEvidence, match="strictly"):
        appraised(good(), crl=one_unused(crl))


@given(data=st.data())
def test_no_foreign_exception_escapes(data: st.DataObject) -> None:
    evidence = good()
    parts = [evidence.report, *evidence.chain, evidence.crl or b""]
    which = data.draw(st.integers(0, len(parts) - 1))
    part = parts[which]
    at = data.draw(st.integers(0, len(part)))
    parts[which] = part[:at] + data.draw(st.binary(max_size=6)) + part[at + data.draw(st.integers(0, 6)) :]
    report, leaf, ask, ark, crl = parts
    assert parts[which] == part or refused(evidence, report=report, chain=(leaf, ask, ark), crl=crl)


def test_the_leafs_serial_number_of_zero_warns_nobody() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert failures(appraised(good())) == set()
    assert caught == []


# Real evidence


def real(case: Path, crl: bytes | None = None, now: float | None = None, policy: Policy = WITHOUT_CRL) -> Appraisal:
    chain = ((case / "leaf.der").read_bytes(), *pem_or_der_certificates((case / "ask_ark.pem").read_bytes()))
    at = json.loads((case / "case.json").read_text())["now"] if now is None else now
    return judge((case / "report.bin").read_bytes(), chain, crl, policy=policy, now=at)


CASES = {
    "dstack/milan_v3": set[str](),
    "go-sev-guest/debug_policy_bit": {DEBUG},
    "trustee/milan_v2": set(),
    "trustee/vcek_invalid_legacy": {CHAIN, SIGNATURE, CHIP, TCB},
    "veraison/genoa_v3_tsm": set(),
    "virtee-sev/milan_v2": set(),
    "virtee-sev/milan_v2__after_vcek_expiry": {CHAIN},
    "virtee-sev/milan_v2__flipped_chip_id": {SIGNATURE, CHIP},
    "virtee-sev/milan_v2__flipped_host_data": {SIGNATURE},
    "virtee-sev/milan_v2__flipped_measurement": {SIGNATURE},
    "virtee-sev/milan_v2__flipped_policy_debug_bit": {SIGNATURE, DEBUG},
    "virtee-sev/milan_v2__flipped_report_data": {SIGNATURE},
    "virtee-sev/milan_v2__flipped_signature": {SIGNATURE},
}


@needs_vectors
@pytest.mark.parametrize("name", CASES)
def test_judges_real_evidence_as_stated(name: str) -> None:
    case = VECTORS / "sev-snp" / name
    stated = json.loads((case / "case.json").read_text())
    appraisal = real(case)
    assert failures(appraisal) == CASES[name]
    assert stated["expected"]["verdict"] == ("reject" if CASES[name] else "accept")
    claims = stated["claims"]
    assert appraisal.report_data.hex() == claims["report_data"]
    assert appraisal.measurement["measurement"] == claims["measurement"]
    assert appraisal.launch_sha256 == bytes.fromhex(claims["host_data"])
    assert appraisal.platform_id == claims["chip_id"]
    if not CASES[name]:
        assert failures(real(case, now=stated["window"][1] + 31 * DAY)) == {CHAIN}


@needs_vectors
def test_every_real_case_is_named_here() -> None:
    there = {str(path.parent.relative_to(VECTORS / "sev-snp")) for path in VECTORS.glob("sev-snp/*/*/report.bin")}
    assert there == CASES.keys()


@needs_vectors
@pytest.mark.parametrize(
    ("name", "case"), [("crl_milan", "virtee-sev/milan_v2"), ("crl_genoa", "veraison/genoa_v3_tsm")]
)
def test_judges_real_revocation_lists(name: str, case: str) -> None:
    folder = VECTORS / "sev-snp" / "openpcc" / name
    now = json.loads((folder / "case.json").read_text())["now"]
    crl = (folder / "crl.pem").read_bytes()
    outside = {CHAIN} if name == "crl_genoa" else set()  # the Genoa chip's certificate is younger than this list
    strict = Policy(tcb=FLOOR, limits=Limits(max_crl_age_days=30))
    assert failures(real(VECTORS / "sev-snp" / case, crl, now, strict)) == outside
    assert failures(real(VECTORS / "sev-snp" / case, crl, now + DAY, strict)) == outside | {CRL}
    other = "openpcc/crl_genoa" if name == "crl_milan" else "openpcc/crl_milan"
    wrong = (VECTORS / "sev-snp" / other / "crl.pem").read_bytes()
    assert CRL in failures(real(VECTORS / "sev-snp" / case, wrong, now))


@needs_vectors
@pytest.mark.parametrize("name", ["milan", "genoa", "turin_vcek", "milan_vlek", "genoa_vlek", "turin_vlek"])
def test_the_pinned_roots_are_the_published_ones(name: str) -> None:
    """Under each, VCEK's and VLEK's CA alike: only the leaf and what rests on it is another's here."""
    chain = pem_or_der_certificates((VECTORS / "sev-snp" / "amd-roots" / f"{name}.pem").read_bytes())
    product = name.partition("_")[0].capitalize()
    evidence = amd.make(product, leaf=Leaf(owner="mallory"))
    appraisal = appraised(evidence, WITHOUT_CRL, chain=(evidence.chain[0], *chain), crl=None, roots=ARK_SHA256)
    assert factor(appraisal, ROOT).verdict == "pass"
    assert factor(appraisal, CHAIN).got == "leaf is not signed by its issuer"


@needs_vectors
def test_judges_a_real_certificate_table() -> None:
    case = VECTORS / "sev-snp" / "veraison" / "genoa_v3_tsm"
    chain = parse_certificate_table((case / "auxblob.bin").read_bytes()).chain(VCEK)
    now = json.loads((case / "case.json").read_text())["now"]
    appraisal = judge((case / "report.bin").read_bytes(), chain, None, policy=WITHOUT_CRL, now=now)
    assert failures(appraisal) == set()


@needs_vectors
@pytest.mark.parametrize("name", ["az-snp-vtpm_evidence_v0", "az-snp-vtpm_evidence_v2"])
def test_judges_the_hardware_report_of_real_azure_evidence(name: str) -> None:
    """Microsoft's paravisor asks for its report at VMPL 0 itself."""
    case = VECTORS / "azure-vtpm" / "trustee" / name
    report = (case / "hcl_report.bin").read_bytes()[32 : 32 + 1184]
    chain = ((case / "vcek.der").read_bytes(), *pem_or_der_certificates((case / "ask_ark.pem").read_bytes()))
    now = json.loads((case / "case.json").read_text())["now"]
    assert failures(judge(report, chain, None, policy=WITHOUT_CRL, now=now)) == set()
