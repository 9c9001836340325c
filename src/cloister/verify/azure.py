"""Whether an Azure confidential VM's evidence is genuine: hardware report, runtime data, virtual TPM, each bound to the last.

The hardware measures Microsoft's paravisor alone, which runs the virtual TPM inside the VM's protection; what booted
after it stands in the PCRs.
"""

import hashlib
import hmac
from collections.abc import Iterator, Sequence
from types import MappingProxyType

from cloister.evidence.azure import RuntimeData, parse_runtime
from cloister.evidence.tpm import ALG_NULL, Public, TpmEvidence, parse_public, parse_quote
from cloister.verify.factors import Factor, failed, not_checked, passed
from cloister.verify.platform import Appraisal
from cloister.verify.policy import Policy
from cloister.verify.tpm_certificates import ATTESTATION_KEY, PROVIDER_ROOTS, Chain, judge_chain
from cloister.verify.vtpm import check_attributes, check_name, judge_quote, launch_digest_of, pcr_measurement

__all__ = ["judge"]


def judge(
    hardware: Appraisal,
    runtime: bytes,
    tpm: TpmEvidence,
    *,
    qualifying_data: bytes,
    policy: Policy,
    now: float,
    launch: bytes = b"",
    eventlog: bytes | None = None,
    roots: frozenset[str] = PROVIDER_ROOTS,
    crls: Sequence[bytes] = (),
) -> Appraisal:
    """Join what the hardware's verifier found (`verify.sev_snp`, `verify.intel`) with the virtual TPM's quote.

    From Microsoft's "Confidential VM guest attestation":

    (1) the hardware's report is genuine: `hardware`'s own factors
    (2) the first half of its report_data is SHA-256 of the runtime data's exact bytes
    (3) the TPM's attestation key (AK) is the runtime data's HCLAkPub; where its whole public area is given, the quote
        names that area, and it is a restricted signing key's
    (4) a certificate chain above the AK, where one is given, ends in a pinned root and is that key's
    (5) the quote is the AK's, over `qualifying_data`, and over the PCR values given: `verify.vtpm`, steps (3) to (8)

    The result's `report_data` is the runtime data's user data (64 bytes that the guest wrote before the report was
    made); `measurement` has the PCRs, and the paravisor's under the hardware's own names; `launch_sha256` is PCR 14's.

    Does not check: which PCR values or which paravisor are good; the AK's attributes, where only its key is known.

    Raises: MalformedEvidence.
    """
    parsed = parse_runtime(runtime)
    ak = parse_public(tpm.ak) if tpm.ak else None
    chain = (
        judge_chain(tpm.certificates, crls, purpose=ATTESTATION_KEY, roots=roots, policy=policy, now=now)
        if tpm.certificates
        else None
    )
    scheme = ak.scheme if ak is not None else (ALG_NULL, 0)
    factors = (
        *hardware.factors,  # (1)
        _check_runtime(hardware, runtime),  # (2)
        _check_ak(parsed, ak, chain),  # (3) (4)
        *(chain.factors if chain else ()),  # (4)
        *_check_area(ak, tpm),
        *judge_quote(tpm, parsed.ak, scheme, qualifying_data=qualifying_data, eventlog=eventlog),  # (5)
        not_checked("evidence.vm-configuration", "What the host configured, for display.", _settings(parsed)),
    )
    return Appraisal(
        platform=f"azure-{hardware.platform}",
        simulated=hardware.simulated,
        report_data=parsed.user_data,
        launch_sha256=launch_digest_of(tpm.pcrs, launch),
        measurement=MappingProxyType({**hardware.measurement, **pcr_measurement(tpm.pcrs)}),
        engine=None,
        platform_id=hardware.platform_id,
        factors=factors,
        tcb=hardware.tcb,
        expiries=(*hardware.expiries, *(chain.expiries if chain else ())),
        counters=MappingProxyType({**hardware.counters, **(chain.counters if chain else {})}),
    )


def _check_runtime(hardware: Appraisal, runtime: bytes) -> Factor:
    step, digest = "evidence.runtime", hashlib.sha256(runtime).digest()
    if hmac.compare_digest(hardware.report_data[:32], digest):
        return passed(step, digest.hex())
    hint = "The runtime data are another VM's, or were changed: the hardware does not vouch for them."
    return failed(step, expected=hardware.report_data[:32].hex(), got=digest.hex(), hint=hint)


def _check_ak(runtime: RuntimeData, ak: Public | None, chain: Chain | None) -> Factor:
    expected = f"HCLAkPub, RSA {runtime.ak.key_size}"
    if ak is not None and ak.key != runtime.ak:
        hint = "The quote comes from another TPM than the one that the hardware vouches for."
        return failed("evidence.ak", expected=expected, got=f"another key, {ak.name_digest}", hint=hint)
    if chain is not None and chain.leaf.public_key() != runtime.ak:
        return failed("evidence.ak", expected=expected, got="a certificate of another key", hint="Another VM's chain.")
    return passed("evidence.ak", expected)


def _check_area(ak: Public | None, tpm: TpmEvidence) -> Iterator[Factor]:
    if ak is not None:
        yield check_name(parse_quote(tpm.quote), ak)
        yield check_attributes(ak)
        return
    yield not_checked("evidence.ak-attributes", "That this key signs only what the TPM made is the paravisor's word.")


def _settings(runtime: RuntimeData) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(runtime.configuration.items()))[:512]
