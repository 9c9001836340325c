"""Whether a simulated TEE's evidence is genuine: real checks, under a root that means nothing to anybody else."""

import hashlib
from types import MappingProxyType

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.errors import MalformedEvidence, MalformedPolicy
from cloister.evidence.document import Document
from cloister.evidence.simulated import (
    ENDORSEMENTS_MEDIA_TYPE,
    PLATFORM,
    SimReport,
    combined_measurement,
    parse_chain,
    parse_report,
    signed_bytes,
)
from cloister.verify.certificates import check_leaf, load_certificate, public_key_p384
from cloister.verify.factors import Factor, compare, failed, not_checked, passed
from cloister.verify.platform import Appraisal
from cloister.verify.policy import Policy

__all__ = ["appraise"]


def appraise(document: Document, policy: Policy, now: float) -> Appraisal:
    """Judge the `cpu` and `endorsements` items.

    (2a) the policy names a simulator's root
    (2b) that very root issued the chip's certificate, valid now
    (2c) the chip's key signed the report
    (2d) the report's one measurement is that of its components

    Proves that *this simulator* made the report. Does not prove that anything is hidden from whoever runs it.

    Raises: MalformedEvidence; MalformedPolicy when the root that the policy names is not a certificate.
    """
    report = parse_report(document.items["cpu"].content)
    chip = _chip_certificate(document)
    factors = (
        _check_chip(chip, policy, now),  # (2a) (2b)
        _check_signature(report, chip),  # (2c)
        _check_combined(report),  # (2d)
        not_checked(
            "hardware", "SIMULATED: whoever runs this machine can read everything. For trying things out only."
        ),
    )
    components = {name: str(value) for name, value in report.body.components.items()}
    return Appraisal(
        platform=PLATFORM,
        simulated=True,
        report_data=report.body.report_data,
        launch_sha256=report.body.launch_sha256,
        measurement=MappingProxyType({**components, "measurement": "sha256:" + report.body.measurement.hex()}),
        engine=components["engine"],
        platform_id=_platform_id(chip),
        factors=factors,
    )


def _chip_certificate(document: Document) -> x509.Certificate:
    item = document.items.get("endorsements")
    if item is None or item.media_type != ENDORSEMENTS_MEDIA_TYPE:
        raise MalformedEvidence("The simulated chip's certificate is missing.", step="endorsements")
    chain = parse_chain(item.content)
    if len(chain) != 1:
        raise MalformedEvidence("A simulated chip has exactly one certificate.", step="endorsements.chain")
    return load_certificate(chain[0], what="endorsements.chain")


def _platform_id(chip: x509.Certificate) -> str:
    spki = chip.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def _root(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion) as error:
        where = "policy.dangerously_trust_simulator"
        raise MalformedPolicy("The simulator's root is not a PEM certificate.", step=where) from error


def _check_chip(chip: x509.Certificate, policy: Policy, now: float) -> Factor:
    if policy.simulator_root is None:
        hint = "A simulated TEE protects nothing. To try it anyway, name its root: --dangerously-trust-simulator ROOT.pem, or dangerously_trust_simulator in the policy."
        return failed("evidence.root", expected="hardware", got="a simulator", hint=hint)
    return check_leaf("evidence.chip-certificate", chip, _root(policy.simulator_root), now)


def _check_signature(report: SimReport, chip: x509.Certificate) -> Factor:
    step = "evidence.signature"
    r, s = (int.from_bytes(half, "big") for half in (report.signature[:48], report.signature[48:]))
    try:
        public_key_p384(chip, what="endorsements.chain").verify(
            encode_dss_signature(r, s), signed_bytes(report.encoded), ec.ECDSA(hashes.SHA384())
        )
    except InvalidSignature:
        hint = "The report was changed after it was made, or made by something else."
        return failed(step, expected="signed by the chip", got="another signature", hint=hint)
    return passed(step, "ECDSA P-384")


def _check_combined(report: SimReport) -> Factor:
    return compare(
        "evidence.measurement",
        expected=combined_measurement(report.body.components).hex(),
        got=report.body.measurement.hex(),
        hint="The report contradicts itself.",
    )
