"""The library dcap-qvl as a second judge of the same bytes: it must agree with every step of ours.

Asked with an explicit policy, never to fetch anything; what it refuses is translated into the step that it is about.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dcap_qvl  # type: ignore[import-untyped]  # it has stubs and lacks their marker

from cloister.evidence.intel_collateral import Collateral
from cloister.verify import intel_tcb
from cloister.verify.factors import Factor, failed, passed
from cloister.verify.platform import TcbLevel

__all__ = ["ask_library", "library_policy", "read_pck_extension"]

_ENDLESS = 2**40
"""Seconds of grace: how old firmware may be is this module's own question, put to the policy."""

_REFUSALS = (
    ("CertRevoked", "evidence.revoked"),
    ("Revoked", "evidence.revoked"),
    ("Crl", "evidence.crl"),
    ("CRL", "evidence.crl"),
    ("expired", "evidence.expired"),
    ("Expired", "evidence.expired"),
    ("in the future", "evidence.expired"),
    ("No matching TCB level", "tcb.level"),
    ("current TDX TCB", "tcb.level"),
    ("below minimum required", "tcb.level"),
    ("Debug mode", "evidence.debug"),
    ("SEPT_VE_DISABLE", "evidence.sept-ve"),
    ("TD attributes", "evidence.attributes"),
    ("MR service TD", "evidence.service-td"),
    ("TDX module", "evidence.seam"),
    ("tcb_info", "evidence.collateral"),
    ("qe_identity", "evidence.collateral"),
    ("QE Identity id", "evidence.collateral"),
    ("TcbInfo", "evidence.collateral"),
    ("QeIdentity", "evidence.collateral"),
    ("Fmspc", "evidence.collateral"),
    ("qe_report", "evidence.qe"),
    ("QE ", "evidence.qe"),
    ("ISV enclave report", "evidence.signature"),
    ("ertificate", "evidence.chain"),
)
"""What the library says, and the step that it is about; the first that fits."""


@contextmanager
def _unpanicked() -> Iterator[None]:
    """A panic in the library's Rust code is no Exception. It means that the library could not judge."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError("the library panicked") from None


def read_pck_extension(pem: bytes) -> Any:
    """The SGX extension of the first certificate: `ppid`, `fmspc`, `pce_id`, `cpu_svn`, `pce_svn`. Raises: ValueError."""
    with _unpanicked():
        return dcap_qvl.parse_pck_extension_from_pem(pem)


def library_policy(now: int) -> Any:
    """Everything but what its own rules of evidence demand: status, age and evaluation number are judged here."""
    policy = dcap_qvl.QuotePolicy.strict(now).allow_dynamic_platform(True)  # noqa: FBT003
    policy = policy.allow_cached_keys(True).allow_smt(True)  # noqa: FBT003
    for status in intel_tcb.STATUSES:
        if status != intel_tcb.REVOKED:
            policy = policy.allow_status(status)
    return policy.platform_grace_period(_ENDLESS).qe_grace_period(_ENDLESS)


def ask_library(
    quote: bytes, collateral: Collateral, level: TcbLevel | None, *, now: float, root: bytes | None
) -> tuple[Factor, TcbLevel | None]:
    """Its verdict as one factor, and the level that it makes of `level`. `root`, DER, None: the library's own."""
    seconds = int(now)
    try:
        with _unpanicked():
            given = dcap_qvl.QuoteCollateralV3(
                collateral.pck_crl_issuer_chain,
                collateral.root_ca_crl,
                collateral.pck_crl,
                collateral.tcb_info_issuer_chain,
                collateral.tcb_info,
                collateral.tcb_info_signature,
                collateral.qe_identity_issuer_chain,
                collateral.qe_identity,
                collateral.qe_identity_signature,
            )
            verifier = dcap_qvl.QuoteVerifier(root)
            claims = verifier.verify_with_policy(quote, given, seconds, library_policy(seconds))
        tcb = json.loads(claims.to_json())["tcb"]
        rated = TcbLevel(str(tcb["status"]), tuple(str(name) for name in tcb["advisory_ids"]))
    except (ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        return _refusal(str(error)), level
    return passed("evidence.agreement", f"dcap-qvl {dcap_qvl.__version__}"), _merged(level, rated)


def _merged(level: TcbLevel | None, rated: TcbLevel) -> TcbLevel:
    """The library knows Intel's rules for joining statuses too, and never has the word for the better."""
    if level is None:
        return rated
    status = intel_tcb.join(level.status, rated.status)
    return TcbLevel(status, tuple(dict.fromkeys((*level.advisories, *rated.advisories))), level.date)


def _refusal(message: str) -> Factor:
    step = next((step for text, step in _REFUSALS if text in message), "evidence.agreement")
    printable = ascii(" ".join(message.split()))[1:-1][:160]
    hint = "The library that judges after us refuses what our own steps accept: report this, and do not trust it."
    return failed(step, expected=f"accepted by dcap-qvl {dcap_qvl.__version__}", got=printable, hint=hint)
