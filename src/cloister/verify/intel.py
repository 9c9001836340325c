"""Whether Intel's hardware made a quote: SGX enclaves and TDX trust domains, with the collateral that travels along.

Everything is judged twice. Each step below reads the evidence itself, so that what is wrong has its own name; the
library dcap-qvl, which verifies quotes for many others, then judges the same bytes again and must agree.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from cryptography.hazmat.primitives.asymmetric import ec

from cloister.errors import MalformedEvidence, WrongUse
from cloister.evidence.intel import (
    PCK_CHAIN,
    TEE_SGX,
    EnclaveReport,
    Quote,
    TdReport,
    parse_enclave_report,
    parse_pem_chain,
    parse_quote,
)
from cloister.evidence.intel_collateral import (
    Collateral,
    QeIdentity,
    TcbInfo,
    parse_collateral,
    parse_qe_identity,
    parse_tcb_info,
)
from cloister.verify import intel_chain, intel_report, intel_tcb
from cloister.verify.factors import Factor, failed, passed
from cloister.verify.intel_chain import Crl, Signers
from cloister.verify.intel_library import ask_library, read_pck_extension
from cloister.verify.platform import Appraisal, Expiry, TcbLevel
from cloister.verify.policy import Policy

__all__ = ["INTEL_ROOT_SHA256", "judge_sgx", "judge_tdx"]

INTEL_ROOT_SHA256 = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
"""SHA-256 of the DER certificate "Intel SGX Root CA", valid until the end of 2049, published at
https://certificates.trustedservices.intel.com/Intel_SGX_Provisioning_Certification_RootCA.cer; dcap-qvl holds the same
certificate as its own default."""

_LATEST = 2**40
"""Seconds: beyond any certificate, and within what every reader of numbers takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """Everything that is judged, parsed once."""

    quote: Quote
    raw: bytes
    qe: EnclaveReport
    collateral: Collateral
    tcb_info: TcbInfo
    identity: QeIdentity
    signers: Signers
    pck_crl: Crl
    root_crl: Crl
    policy: Policy
    now: float
    root: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pck:
    """The SGX extension of the PCK certificate (PCK Certificate Profile, section 1.3.5)."""

    ppid: bytes
    fmspc: bytes
    pce_id: bytes
    cpu_svn: bytes
    pce_svn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    factors: tuple[Factor, ...]
    platform_id: str = ""
    tcb: TcbLevel | None = None
    expiries: tuple[Expiry, ...] = ()
    counters: tuple[tuple[str, int], ...] = ()


def judge_sgx(quote: bytes, collateral: bytes, *, policy: Policy, now: float, root: bytes | None = None) -> Appraisal:
    """Judge an SGX quote (version 3) and Intel's collateral for it (the nine texts of `parse_collateral`, as JSON).

    (1) the quote is well formed, and nothing follows it
    (2) every chain of certificates ends in Intel's root (PCK Certificate Profile, section 1.3)
    (3) each certificate was signed by the next, and is of the right kind
    (4) certificates, TCB info, QE identity and revocation lists are valid now
    (5) the revocation lists are those CAs' own, and not older than the policy allows
    (6) no certificate is on them, and the platform's TCB is not revoked
    (7) TCB info and QE identity were signed by Intel, and are about this platform (PCS API 4)
    (8) the PCK key signed the quoting enclave's report, and it is Intel's, not in debug mode (Quote Library, A.4)
    (9) that report names the attestation key, which signed the quote
    (10) the enclave is initialised, not in debug mode, without privileged keys or unknown features (SDM 3D, "ATTRIBUTES")
    (11) the platform reaches a TCB level
    (12) dcap-qvl finds the same bytes genuine
    (13) the level's status, advisories and evaluation number satisfy the policy

    `now` in Unix seconds. `root`, DER, replaces Intel's: for tests alone. `collateral` b"" fails in
    "evidence.collateral". Missing revocation lists always fail: the library does not verify without them. Where an
    earlier step leaves nothing to go on, later ones are left out. `Appraisal.tcb.date` tells how far behind the
    platform is; for Intel's early updates, judge again with that collateral.

    Does not check: report_data, measurement, platform_id (the caller's); where the machine stands.

    Raises: MalformedEvidence for bytes that are not such a quote or collateral; WrongUse for a time that is none.
    """
    parsed = parse_quote(quote)  # (1)
    report = parsed.report
    if not isinstance(report, EnclaveReport):
        raise MalformedEvidence("This is not an SGX quote.", step="evidence.quote", expected="SGX", got="TDX")
    own = tuple(intel_report.check_enclave(report))  # (10)
    outcome = _judge(parsed, quote, collateral, own, policy=policy, now=now, root=root)
    measurement = {
        "mr_enclave": report.mr_enclave.hex(),
        "mr_signer": report.mr_signer.hex(),
        "isv_prod_id": str(report.isv_prod_id),
        "isv_svn": str(report.isv_svn),
    }
    return _appraisal("sgx", report.report_data, None, measurement, outcome)


def judge_tdx(
    quote: bytes,
    collateral: bytes,
    *,
    policy: Policy,
    now: float,
    launch: bytes = b"",
    root: bytes | None = None,
) -> Appraisal:
    """Judge a TDX quote (version 4 or 5) and Intel's collateral for it.

    Steps as in `judge_sgx`, but for

    (1) zero bytes may follow the quote: collectors hand out their whole buffer
    (8) the quoting enclave is the one for TDX
    (10) the trust domain is not in debug mode; SEPT_VE_DISABLE is set; no unknown or migratable attribute; XFAM as the
         TDX module allows; no service TD; the TDX module is Intel's, by signer and attributes
    (11) the TDX module too, and for TD report 1.5 also as it runs now

    `launch`: the launch config's exact bytes, looked for in RTMR3 as one extend; MRCONFIGID holds its digest on its
    own (PROTOCOL, "Launch config"). Does not replay event logs. Everything else as in `judge_sgx`.

    Raises: MalformedEvidence; WrongUse.
    """
    parsed = parse_quote(quote)  # (1)
    report = parsed.report
    if not isinstance(report, TdReport):
        raise MalformedEvidence("This is not a TDX quote.", step="evidence.quote", expected="TDX", got="SGX")
    own = (*_check_trailing(parsed), *intel_report.check_domain(report))  # (1) (10)
    outcome = _judge(parsed, quote, collateral, own, policy=policy, now=now, root=root)
    measurement = {
        "mr_td": report.mr_td.hex(),
        "mr_seam": report.mr_seam.hex(),
        **{f"rtmr{index}": value.hex() for index, value in enumerate(report.rtmr)},
        "mr_config_id": report.mr_config_id.hex(),
        "mr_owner": report.mr_owner.hex(),
        "mr_owner_config": report.mr_owner_config.hex(),
        "td_attributes": report.td_attributes.hex(),
        "xfam": report.xfam.hex(),
    }
    return _appraisal("tdx", report.report_data, _launch_digest(report, launch), measurement, outcome)


def _appraisal(
    platform: str, report_data: bytes, launch: bytes | None, measurement: dict[str, str], outcome: _Outcome
) -> Appraisal:
    return Appraisal(
        platform=platform,
        simulated=False,
        report_data=report_data,
        launch_sha256=launch,
        measurement=MappingProxyType(measurement),
        engine=None,
        platform_id=outcome.platform_id,
        factors=outcome.factors,
        tcb=outcome.tcb,
        expiries=outcome.expiries,
        counters=MappingProxyType(dict(outcome.counters)),
    )


def _launch_digest(report: TdReport, launch: bytes) -> bytes:
    """MRCONFIGID = digest || 16 zero bytes, else RTMR3 = SHA-384(zero register || SHA-384(launch)), else nothing."""
    digest, filler = report.mr_config_id[:32], report.mr_config_id[32:]
    if any(digest) and not any(filler):
        return digest
    extended = hashlib.sha384(bytes(48) + hashlib.sha384(launch).digest()).digest()
    return hashlib.sha256(launch).digest() if launch and report.rtmr[3] == extended else b""


def _judge(
    quote: Quote,
    raw: bytes,
    collateral: bytes,
    own: tuple[Factor, ...],
    *,
    policy: Policy,
    now: float,
    root: bytes | None,
) -> _Outcome:
    if not 0 <= now < _LATEST:  # nor NaN
        raise WrongUse("This is no time in Unix seconds.", step="now", got=str(now))
    if not collateral:
        hint = (
            "Without Intel's collateral nothing can be verified: cloister collateral fetch, or ask the enclave for it."
        )
        return _Outcome(factors=(*own, failed("evidence.collateral", expected="collateral", got="none", hint=hint)))
    parsed = parse_collateral(collateral)
    try:
        case = _parse(quote, raw, parsed, policy, now, root)
    except MalformedEvidence as error:
        return _Outcome(factors=(*own, _unreadable(error)))
    return _outcome(case, own)


def _unreadable(error: MalformedEvidence) -> Factor:
    """What is well framed and cannot be read inside: the steps about it cannot run, so they fail."""
    step = error.step if error.step in ("evidence.chain", "evidence.crl") else "evidence.collateral"
    hint = "Damaged, or of a kind that is not understood here. Fetch the collateral afresh."
    return failed(step, expected=error.expected or "readable collateral", got=error.got or error.message, hint=hint)


def _parse(quote: Quote, raw: bytes, collateral: Collateral, policy: Policy, now: float, root: bytes | None) -> _Case:
    issuers = collateral.tcb_info_issuers()
    same = collateral.qe_identity_issuer_chain == collateral.tcb_info_issuer_chain
    qe_issuers = issuers if same else collateral.qe_identity_issuers()
    return _Case(
        quote=quote,
        raw=raw,
        qe=parse_enclave_report(quote.qe_report),
        collateral=collateral,
        tcb_info=parse_tcb_info(collateral.tcb_info),
        identity=parse_qe_identity(collateral.qe_identity),
        signers=intel_chain.load_signers(_pck_chain(quote), issuers, qe_issuers),
        pck_crl=intel_chain.load_crl(collateral.pck_crl, name="PCK revocation list"),
        root_crl=intel_chain.load_crl(collateral.root_ca_crl, name="root revocation list"),
        policy=policy,
        now=now,
        root=root,
    )


def _pck_chain(quote: Quote) -> tuple[bytes, ...]:
    if quote.certification_type != PCK_CHAIN:
        got = f"type {quote.certification_type}"
        message = "The quote names its PCK certificate and does not bring it."
        raise MalformedEvidence(message, step="evidence.chain", expected=f"type {PCK_CHAIN}, the chain", got=got)
    return parse_pem_chain(quote.certification_data, what="evidence.chain")


def _outcome(case: _Case, own: tuple[Factor, ...]) -> _Outcome:
    signers, report = case.signers, case.quote.report
    pinned = INTEL_ROOT_SHA256 if case.root is None else hashlib.sha256(case.root).hexdigest()
    chains = tuple(intel_chain.check_chains(signers))
    factors = [
        intel_chain.check_root(signers, pinned),  # (2)
        *chains,  # (3)
        *_check_dates(case),  # (4)
        *intel_chain.check_crls(case.pck_crl, case.root_crl, signers, case.policy.limits, case.now),  # (5)
        *intel_chain.check_revoked(case.pck_crl, case.root_crl, signers),  # (6)
        *_check_signed(case),  # (7)
        *_check_quoting_enclave(case),  # (8)
        *_check_signature(case.quote),  # (9)
        *own,  # (1) (10)
    ]
    if isinstance(report, TdReport) and case.tcb_info.module is not None:
        module = intel_tcb.module_of(case.tcb_info, report.tee_tcb_svn)
        factors.append(intel_report.check_module(report, module))  # (10)
    expiries = (*intel_chain.expiries(signers), *(Expiry(what, until) for what, _, until in _dates(case)))
    counters = (
        ("tcb-evaluation-data-number", min(case.tcb_info.evaluation, case.identity.evaluation)),
        *intel_chain.crl_counters(case.pck_crl, case.root_crl, signers),
    )
    pck = _pck_extension(case.quote) if all(factor.verdict == "pass" for factor in chains) else None
    if pck is None:
        if all(factor.verdict == "pass" for factor in chains):
            hint = "Without it nobody knows which platform this certificate is for."
            got = "no SGX extension"
            factors.append(failed("evidence.chain", expected="a PCK certificate", got=got, hint=hint))
        return _Outcome(factors=tuple(factors), expiries=expiries, counters=counters)
    factors += _check_about(case, pck)  # (7)
    reached = intel_tcb.reach(
        case.tcb_info,
        case.identity,
        cpu_svn=pck.cpu_svn,
        pce_svn=pck.pce_svn,
        qe=case.qe,
        td=report if isinstance(report, TdReport) else None,
    )
    factors += _check_level(reached)  # (6) (11)
    level = reached.level
    if not any(factor.verdict == "fail" for factor in factors):
        agreement, level = ask_library(case.raw, case.collateral, level, now=case.now, root=case.root)
        factors.append(agreement)  # (12)
    factors += _check_policy(case, level)  # (13)
    return _Outcome(factors=tuple(factors), platform_id=pck.ppid.hex(), tcb=level, expiries=expiries, counters=counters)


def _check_trailing(quote: Quote) -> Iterator[Factor]:
    if quote.trailing:
        hint = "Something was appended to the quote. Only zero bytes may follow it."
        yield failed("evidence.trailing", expected="zero bytes", got=f"{len(quote.trailing)} other bytes", hint=hint)


def _dates(case: _Case) -> Iterator[tuple[str, float, float]]:
    yield "TCB info", case.tcb_info.issue_date, case.tcb_info.next_update
    yield "QE identity", case.identity.issue_date, case.identity.next_update
    for crl in (case.pck_crl, case.root_crl):
        yield crl.name, crl.this_update, crl.next_update


def _check_dates(case: _Case) -> Iterator[Factor]:
    wrong = False
    for what, since, until in (*intel_chain.validity(case.signers), *_dates(case)):
        if not since <= case.now < until:  # a list's end is its first second of being out of date; so is every other
            wrong = True
            hint = "Fetch the collateral afresh; where it is new, a clock is wrong."
            when = f"{(case.now - until) / 86400:.1f} days ago" if case.now >= until else "not valid yet"
            yield failed("evidence.expired", expected=f"{what} valid now", got=when, hint=hint)
    if not wrong:
        yield passed("evidence.expired", "everything valid now")


def _check_signed(case: _Case) -> Iterator[Factor]:
    step, collateral = "evidence.collateral", case.collateral
    pieces = (
        ("TCB info", case.signers.tcb, collateral.tcb_info_signature, collateral.tcb_info),
        ("QE identity", case.signers.qe, collateral.qe_identity_signature, collateral.qe_identity),
    )
    for what, signer, signature, text in pieces:
        if intel_chain.signs(signer.public_key(), signature, text.encode("utf-8", "surrogatepass")):
            yield passed(step, f"{what} signed")
        else:
            hint = "It was changed after Intel signed it. Fetch the collateral afresh, from another source."
            yield failed(step, expected=f"{what} signed by Intel", got="another signature", hint=hint)


def _check_about(case: _Case, pck: _Pck) -> Iterator[Factor]:
    sgx = case.quote.header.tee_type == TEE_SGX
    expected = ("SGX" if sgx else "TDX", "QE" if sgx else "TD_QE", pck.fmspc.hex(), pck.pce_id.hex())
    got = (case.tcb_info.id, case.identity.id, case.tcb_info.fmspc.hex(), case.tcb_info.pce_id.hex())
    if got == expected:
        yield passed("evidence.collateral", " ".join(got))
    else:
        hint = "The collateral is about another kind of platform. Fetch it for this one."
        yield failed("evidence.collateral", expected=" ".join(expected), got=" ".join(got), hint=hint)


def _check_quoting_enclave(case: _Case) -> Iterator[Factor]:
    step, quote = "evidence.qe", case.quote
    wrong = []
    if not intel_chain.signs(case.signers.pck.public_key(), quote.qe_report_signature, quote.qe_report):
        wrong.append(("report signed by the PCK key", "another signature"))
    named = hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest() + bytes(32)
    if case.qe.report_data != named:
        wrong.append((f"attestation key {named.hex()[:16]}", case.qe.report_data.hex()[:16]))
    wrong += intel_report.differing(case.qe, case.identity)
    for expected, got in wrong:
        hint = "Not Intel's quoting enclave, or another key than its own signed this quote."
        yield failed(step, expected=expected, got=got, hint=hint)
    if not wrong:
        yield passed(step, f"{case.identity.id}, SVN {case.qe.isv_svn}")


def _check_signature(quote: Quote) -> Iterator[Factor]:
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + quote.attestation_key)
    except ValueError:
        key = None
    if intel_chain.signs(key, quote.signature, quote.signed):
        yield passed("evidence.signature", "ECDSA P-256")
    else:
        hint = "The quote was changed after it was made, or made by something else."
        yield failed("evidence.signature", expected="signed by the attestation key", got="another signature", hint=hint)


def _check_level(reached: intel_tcb.Reached) -> Iterator[Factor]:
    if reached.level is None:
        hint = "Its firmware is older than anything that Intel still rates, or the collateral is another platform's."
        yield failed("tcb.level", expected="a level that Intel rates", got=f"{reached.missing}: below all", hint=hint)
        return
    if reached.level.status == intel_tcb.REVOKED:
        hint = "Keys of platforms with this firmware are known to have leaked. It is never accepted."
        yield failed("evidence.revoked", expected="a TCB that stands", got=intel_tcb.REVOKED, hint=hint)
    yield passed("tcb.level", reached.level.status)


def _check_policy(case: _Case, level: TcbLevel | None) -> Iterator[Factor]:
    if level is not None and level.status != intel_tcb.REVOKED:
        yield from intel_tcb.check_status(level, case.policy.tcb)
    yield intel_tcb.check_evaluation(case.tcb_info, case.identity, case.policy.tcb)


def _pck_extension(quote: Quote) -> _Pck | None:
    try:
        found = read_pck_extension(quote.certification_data)
    except ValueError:
        return None
    return _Pck(
        ppid=bytes(found.ppid),
        fmspc=bytes(found.fmspc),
        pce_id=bytes(found.pce_id),
        cpu_svn=bytes(found.cpu_svn),
        pce_svn=int(found.pce_svn),
    )
