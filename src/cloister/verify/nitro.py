"""Whether an AWS Nitro attestation document is genuine: COSE signature, chain to AWS's root, no debug mode."""

import hashlib
import hmac
from types import MappingProxyType

from cryptography import x509

from cloister.evidence.nitro import LAUNCH_PCR, NitroDocument, launch_pcr, parse_document
from cloister.verify.certificates import load_certificate
from cloister.verify.factors import Factor, compare, failed, not_checked, passed
from cloister.verify.p384 import chain_expiries, check_chain, check_root, check_signature
from cloister.verify.platform import Appraisal
from cloister.verify.policy import Policy

__all__ = ["PLATFORM", "ROOT_SHA256", "judge"]

PLATFORM = "nitro"

# AWS, "Verifying the root of trust"; https://aws-nitro-enclaves.amazonaws.com/AWS_NitroEnclaves_Root-G1.zip holds the
# certificate (root.pem, DER of 533 bytes). AWS names this same SHA-256 fingerprint in the documentation.
ROOT_SHA256 = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"

_ES384 = -35
_CODE_PCRS = (0, 1, 2)
_MEASURED_PCRS = range(LAUNCH_PCR)


def judge(
    document: bytes,
    *,
    policy: Policy,
    now: float,
    launch: bytes = b"",
    nonce: bytes | None = None,
    root_sha256: str = ROOT_SHA256,
) -> Appraisal:
    """Judge one attestation document (AWS, `attestation_process.md`, section 3.2; RFC 9052, section 4.4).

    (a) the signature's algorithm is ES384, the only one that AWS uses
    (b) the chain ends in the pinned root
    (c) each certificate is signed by the next, valid at `now`, and used for what it was issued for
    (d) the certificate's key signed the document
    (e) the enclave does not run in debug mode, in which PCR0 to PCR2 are zero
    (f) the document carries `nonce`, where one is given
    (g) what is never checked is said: AWS issues no revocation lists for verifiers to use (section 3.2.3)

    `report_data` is the document's user_data as it is (up to 512 bytes), b"" where there is none; `launch_sha256` is
    SHA-256(launch) where PCR16 is exactly one extension by `launch_extension(launch)`, else b"". `platform_id` is the
    EC2 instance: Nitro names no physical machine. Measurement: pcr0 to pcr15 in hexadecimal, those that are not zero.

    Does not check: measurements, user_data, `timestamp` and `public_key`. Of `policy`, nothing applies: a Nitro system
    has no TCB status and no revocation list.

    Raises: MalformedEvidence.
    """
    _ = policy
    parsed = parse_document(document)
    chain = _chain(parsed)
    factors = (
        _check_algorithm(parsed),  # (a)
        check_root(chain[-1], root_sha256, vendor="AWS"),  # (b)
        check_chain(chain, now),  # (c)
        check_signature(chain[0], parsed.signature, parsed.signed, hint="The document was changed, or forged."),  # (d)
        _check_debug(parsed),  # (e)
        *([] if nonce is None else [_check_nonce(parsed, nonce)]),  # (f)
        not_checked(
            "evidence.crl", "AWS asks verifiers not to use revocation lists: a certificate lives hours."
        ),  # (g)
    )
    return Appraisal(
        platform=PLATFORM,
        simulated=False,
        report_data=parsed.user_data or b"",
        launch_sha256=_launch_sha256(parsed, launch),
        measurement=MappingProxyType(
            {f"pcr{at}": parsed.pcrs[at].hex() for at in _MEASURED_PCRS if any(parsed.pcrs.get(at, b""))}
        ),
        engine=None,
        platform_id=parsed.module_id.split("-enc", 1)[0],
        factors=factors,
        expiries=chain_expiries(chain, what="enclave"),
    )


def _chain(document: NitroDocument) -> tuple[x509.Certificate, ...]:
    """The signing certificate first, the root last."""
    ders = (document.certificate, *reversed(document.cabundle))
    return tuple(
        load_certificate(der, what="nitro.certificate" if at == 0 else "nitro.cabundle") for at, der in enumerate(ders)
    )


def _check_algorithm(document: NitroDocument) -> Factor:
    hint = "AWS signs with ES384 and nothing else."
    return compare("evidence.algorithm", expected=str(_ES384), got=str(document.algorithm), hint=hint)


def _check_debug(document: NitroDocument) -> Factor:
    zero = [f"PCR{at}" for at in _CODE_PCRS if not any(document.pcrs.get(at, b""))]
    if not zero:
        return passed("evidence.debug", "off")
    hint = "An enclave in debug mode shows its console and its memory to the host. Start it without --debug-mode."
    return failed("evidence.debug", expected="off", got=f"on: {', '.join(zero)} zero", hint=hint)


def _check_nonce(document: NitroDocument, nonce: bytes) -> Factor:
    got = document.nonce or b""
    if hmac.compare_digest(got, nonce):
        return passed("evidence.nonce", nonce.hex()[:64])
    hint = "Replayed: the document was made for somebody else's question."
    return failed("evidence.nonce", expected=nonce.hex()[:64], got=got.hex()[:64] or "none", hint=hint)


def _launch_sha256(document: NitroDocument, launch: bytes) -> bytes:
    return hashlib.sha256(launch).digest() if document.pcrs.get(LAUNCH_PCR) == launch_pcr(launch) else b""
