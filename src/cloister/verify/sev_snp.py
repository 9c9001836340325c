"""Whether an AMD SEV-SNP report is genuine: AMD's chain, the chip's signature, the chip itself, and how the guest runs."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.evidence.sev_snp import LAYOUTS, PLATFORM, VCEK, VLEK, Report, parse_report, product_of, tcb_components
from cloister.verify.amd_certificates import (
    RESERVED_SPL,
    Endorsed,
    chain_expiries,
    check_chain,
    check_crl,
    check_root,
    crl_counters,
    load_chain,
    load_crl,
    read_extensions,
)
from cloister.verify.factors import Factor, compare, failed, not_checked, passed
from cloister.verify.platform import Appraisal
from cloister.verify.policy import SNP_TCB, Policy

__all__ = ["ARK_SHA256", "judge"]

# The second certificate of https://kdsintf.amd.com/vcek/v1/PRODUCT/cert_chain (AMD 57230, chapter 4), SHA-256 of its
# DER; each is also the second of https://kdsintf.amd.com/vlek/v1/PRODUCT/cert_chain.
ARK_SHA256: Mapping[str, str] = MappingProxyType(
    {
        "Milan": "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
        "Genoa": "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
        "Turin": "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
    }
)

_POLICY_BITS = ("cxl-allowed", "aes-256-xts", "rapl-disabled", "ciphertext-hiding", "page-swap-disabled")
_PLATFORM_BITS = ("smt", "tsme", "ecc", "rapl-disabled", "ciphertext-hiding", "alias-check", "iommu-write-safe", "tio")
_KINDS: Mapping[int, str] = MappingProxyType({VCEK: "VCEK", VLEK: "VLEK"})
_HOST_REQUESTED = 0xFFFFFFFF


def judge(
    report: bytes,
    chain: Sequence[bytes],
    crl: bytes | None,
    *,
    policy: Policy,
    now: float,
    roots: Mapping[str, str] = ARK_SHA256,
) -> Appraisal:
    """Judge one report. `chain` is DER: (VCEK or VLEK, ASK or ASVK, ARK); `crl` the ARK's, DER or PEM, None if absent.

    AMD 56860 (firmware ABI, the report) and 57230 (certificates):

    (1)  length, version 2 to 5, signature algorithm: `parse_report`
    (2)  the chain's last certificate is the pinned ARK of a product (57230, chapter 4)
    (3)  ARK signed ASK, ASK signed the leaf, all valid at `now` and used for what they are for (57230, chapter 3)
    (4)  the ARK's revocation list is current and has none of them
    (5)  the report says which kind of key signed it, and the leaf is of that kind (56860, section 7.3)
    (6)  the leaf's key signed bytes 0 to 0x29F (56860, chapter 10)
    (7)  the leaf is for this product, this chip and the TCB that the report claims (57230, section 3.1)
    (8)  reserved bytes are zero, those behind the signature too
    (9)  guest policy: no debugging, no migration agent, bit 17 one, unknown bits zero (56860, section 4.3)
    (10) the report was asked for at VMPL 0
    (11) TCB versions are in order: committed and reported at most current (56860, section 2.2)
    (12) the author's key is there when the report says so
    (13) the reported TCB and that of the launch have at least the policy's minimum in each component
    (14) what is never judged is said: platform_info, mitigation vectors, how up to date the TCB is

    `launch_sha256` is HOST_DATA itself. `platform_id` is CHIP_ID in hexadecimal, "" where it is masked (only under a VLEK).

    Does not check: report_data, measurement, the ID block's keys (all in `measurement`, for the policy), the firmware's
    version beyond its TCB. AMD publishes no TCB status: without `policy.tcb.min_sev_snp` the age of the firmware is
    reported as not checked.

    Raises: MalformedEvidence.
    """
    parsed = parse_report(report)  # (1)
    certificates = load_chain(chain)
    leaf, ask, ark = certificates
    revocations = load_crl(crl) if crl is not None else None
    endorsed = read_extensions(leaf)
    root = hashlib.sha256(ark.public_bytes(Encoding.DER)).hexdigest()
    product = endorsed.product or ""
    factors = (
        check_root(root, roots),  # (2)
        check_chain(certificates, now),  # (3)
        check_crl(revocations, (ask, ark), policy, now),  # (4)
        _check_signing_key(parsed, endorsed),  # (5)
        _check_signature(parsed, leaf),  # (6)
        _check_product(parsed, endorsed, [name for name, digest in roots.items() if digest == root]),  # (7)
        _check_chip(parsed, endorsed),  # (7)
        _check_endorsed_tcb(parsed, endorsed),  # (7)
        _check_reserved(parsed),  # (8)
        _check_debug(parsed),  # (9)
        _check_migration(parsed),  # (9)
        _check_guest_policy(parsed),  # (9)
        _check_vmpl(parsed),  # (10)
        _check_tcb_order(parsed, product),  # (11)
        _check_author_key(parsed),  # (12)
        _check_minimum(parsed, product, policy.tcb.min_sev_snp),  # (13)
        *_unjudged(parsed),  # (14)
    )
    return Appraisal(
        platform=PLATFORM,
        simulated=False,
        report_data=parsed.report_data,
        launch_sha256=parsed.host_data,
        measurement=_measurement(parsed, product),
        engine=None,
        platform_id=parsed.chip_id.hex() if any(parsed.chip_id) else "",
        factors=factors,
        expiries=chain_expiries(certificates, revocations, kind=_KINDS.get(parsed.signing_key, "leaf")),
        counters=crl_counters(product, revocations),
    )


def _check_signing_key(report: Report, endorsed: Endorsed) -> Factor:
    step = "evidence.signing-key"
    claimed = _KINDS.get(report.signing_key, f"none ({report.signing_key})")
    if report.mask_chip_key or report.signing_key not in _KINDS:
        got = "masked by the host" if report.mask_chip_key else claimed
        hint = "The host has the firmware sign nothing (MASK_CHIP_KEY): it has to be set otherwise."
        return failed(step, expected="VCEK or VLEK", got=got, hint=hint)
    leaf = "VCEK" if endorsed.hwid is not None else "VLEK" if endorsed.csp_id is not None else "neither"
    if endorsed.hwid is not None and endorsed.csp_id is not None:
        leaf = "both"
    if endorsed.faults or claimed != leaf:
        got = "; ".join([f"certificate of kind {leaf}", *endorsed.faults])[:200]
        return failed(step, expected=claimed, got=got, hint="The certificate is for another kind of key.")
    return passed(step, claimed if endorsed.csp_id is None else f"{claimed} of {endorsed.csp_id}")


def _check_signature(report: Report, leaf: x509.Certificate) -> Factor:
    step = "evidence.signature"
    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        return failed(step, expected="a P-384 key", got="another kind of key", hint="A forged certificate.")
    try:
        key.verify(encode_dss_signature(*report.signature), report.signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        hint = "The report was changed after it was made, or the certificate is another chip's or another TCB's."
        return failed(step, expected="signed by the certificate's key", got="another signature", hint=hint)
    return passed(step, "ECDSA P-384 SHA-384")


def _check_product(report: Report, endorsed: Endorsed, rooted: Sequence[str]) -> Factor:
    """`rooted`: products of the pinned root, none when it is not pinned (which is another step's failure)."""
    step = "evidence.product"
    said = {"certificate": endorsed.product, "root": rooted[0] if rooted else endorsed.product}
    if report.cpuid is not None:
        said["processor"] = product_of(report.cpuid)
    names = set(said.values())
    if len(names) == 1 and endorsed.product in LAYOUTS:
        return passed(step, str(endorsed.product))
    got = ", ".join(f"{who} {ascii(name or 'unknown')[1:-1]}" for who, name in said.items())
    hint = "The certificate is for another processor, or for one that this version does not know."
    return failed(step, expected="one known product", got=got, hint=hint)


def _check_chip(report: Report, endorsed: Endorsed) -> Factor:
    step, masked = "evidence.chip-id", not any(report.chip_id)
    if endorsed.hwid is None:  # a VLEK is its cloud's: nothing binds it to one chip
        hint = "The key is one that AMD gave to a cloud (VLEK): which chip signed is the firmware's word alone."
        return not_checked(step, hint, "masked" if masked else report.chip_id.hex())
    if masked:
        hint = "The host hides the chip's id (MASK_CHIP_ID): it has to be set otherwise, or sign with a VLEK."
        return failed(step, expected=endorsed.hwid.hex(), got="masked", hint=hint)
    got = report.chip_id
    if got == endorsed.hwid.ljust(len(got), b"\0"):
        return passed(step, endorsed.hwid.hex())
    hint = "The certificate is another chip's: fetch the one for this chip id."
    return failed(step, expected=endorsed.hwid.hex(), got=got.hex(), hint=hint)


def _check_endorsed_tcb(report: Report, endorsed: Endorsed) -> Factor:
    """Every byte of the reported TCB; a number that the certificate lacks counts as zero if it is a reserved one."""
    step, product = "evidence.tcb", endorsed.product or ""
    got = tcb_components(report.reported_tcb, product)
    expected = {name: endorsed.tcb.get(name, 0 if name in RESERVED_SPL else None) for name in got}
    surplus = [name for name in endorsed.tcb if name not in got and endorsed.tcb[name]]
    if expected == got and not surplus:
        return passed(step, _tcb_text(got))
    hint = "The certificate is for another TCB of this chip: fetch the one for the reported TCB."
    text = " ".join(f"{name}={value}" for name, value in {**expected, **{n: endorsed.tcb[n] for n in surplus}}.items())
    return failed(step, expected=text, got=_tcb_text(got), hint=hint)


def _tcb_text(tcb: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in tcb.items() if value or name not in RESERVED_SPL)


def _check_reserved(report: Report) -> Factor:
    wrong = report.nonzero_reserved()
    if not wrong:
        return passed("evidence.reserved", "zero")
    hint = "Somebody wrote where the report has nothing, or it is of a newer kind than its version says."
    return failed("evidence.reserved", expected="zero", got=", ".join(wrong), hint=hint)


def _check_debug(report: Report) -> Factor:
    hint = "The host may read and change this guest's memory: start it without the policy's DEBUG bit."
    return compare("evidence.debug", expected="off", got="on" if report.policy >> 19 & 1 else "off", hint=hint)


def _check_migration(report: Report) -> Factor:
    got = "allowed" if report.policy >> 18 & 1 else "off"
    hint = "Another guest (a migration agent) may read this one: start it without the policy's MIGRATE_MA bit."
    return compare("evidence.migration", expected="off", got=got, hint=hint)


def _check_guest_policy(report: Report) -> Factor:
    step, got = "evidence.guest-policy", f"{report.policy:#x}"
    if report.policy >> 17 & 1 and not report.policy >> 26:
        return passed(step, got)
    return failed(step, expected="bit 17 one, bits 26 to 63 zero", got=got, hint="A policy that AMD does not define.")


def _check_vmpl(report: Report) -> Factor:
    got = "asked for by the host" if report.vmpl == _HOST_REQUESTED else str(report.vmpl)
    hint = "The report has to come from the guest's own kernel (configfs-tsm: privlevel 0)."
    return compare("evidence.vmpl", expected="0", got=got, hint=hint)


def _check_tcb_order(report: Report, product: str) -> Factor:
    step, current = "evidence.tcb-order", tcb_components(report.current_tcb, product)
    wrong = [
        f"{which} {name} {value} over {current[name]}"
        for which, raw in (("committed", report.committed_tcb), ("reported", report.reported_tcb))
        for name, value in tcb_components(raw, product).items()
        if value > current[name]
    ]
    if not wrong:
        return passed(step, f"current {_tcb_text(current)}")
    hint = "No such firmware exists: the report contradicts itself."
    return failed(step, expected="committed and reported at most current", got=", ".join(wrong), hint=hint)


def _check_author_key(report: Report) -> Factor:
    said, there = report.author_key_en, any(report.author_key_digest)
    return compare(
        "evidence.author-key",
        expected="present" if said else "absent",
        got="present" if there else "absent",
        hint="The report contradicts itself.",
    )


def _check_minimum(report: Report, product: str, minimum: Mapping[str, int]) -> Factor:
    """Over the reported TCB, to which the chip's key is bound, and that at launch, under which the guest was measured."""
    step, reported = "tcb.minimum", tcb_components(report.reported_tcb, product)
    if not minimum:
        named = ", ".join(f"{name} = {value}" for name, value in reported.items() if name in SNP_TCB)
        hint = f"AMD rates no firmware, so the policy must: [tcb] min_sev_snp = {{ {named} }} accepts this and what is newer."
        return failed(step, expected="at least what the policy names", got=_tcb_text(reported), hint=hint)
    low = [
        f"{which} {name}={tcb.get(name, 'nothing')}"
        for which, tcb in (("reported", reported), ("launch", tcb_components(report.launch_tcb, product)))
        for name in minimum
        if tcb.get(name, -1) < minimum[name]
    ]
    if not low:
        return passed(step, _tcb_text(reported))
    expected = " ".join(f"{name}>={value}" for name, value in minimum.items())
    hint = "Firmware older than the policy allows: the operator has to update it and start the guest anew."
    return failed(step, expected=expected, got=", ".join(low), hint=hint)


def _unjudged(report: Report) -> Iterator[Factor]:
    bits = [name for at, name in enumerate(_PLATFORM_BITS) if report.platform_info >> at & 1]
    if unknown := report.platform_info >> len(_PLATFORM_BITS):
        bits.append(f"unknown {unknown << len(_PLATFORM_BITS):#x}")
    allowed = ["smt"] if report.policy >> 16 & 1 else []
    allowed += ["single-socket"] if report.policy >> 20 & 1 else []
    allowed += [name for at, name in enumerate(_POLICY_BITS, 21) if report.policy >> at & 1]
    got = f"on: {' '.join(bits) or 'nothing'}; guest policy: {' '.join(allowed) or 'nothing'}"
    yield not_checked(
        "evidence.platform-info", "How the host set up its machine; pin platform_info to have it so.", got
    )
    if report.launch_mit_vector is not None and report.current_mit_vector is not None:
        got = f"launch {report.launch_mit_vector:#x}, current {report.current_mit_vector:#x}"
        yield not_checked(
            "evidence.mitigations", "Which mitigations the firmware says it has; nobody judged them.", got
        )


def _measurement(report: Report, product: str) -> Mapping[str, str]:
    return MappingProxyType(
        {
            "product": product,
            "measurement": report.measurement.hex(),
            "id_key_digest": report.id_key_digest.hex(),
            "author_key_digest": report.author_key_digest.hex(),
            "guest_svn": str(report.guest_svn),
            "family_id": report.family_id.hex(),
            "image_id": report.image_id.hex(),
            "policy": f"{report.policy:#x}",
            "platform_info": f"{report.platform_info:#x}",
        }
    )
