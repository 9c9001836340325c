"""Whether a TPM's quote is genuine: what a provider's virtual TPM, or a pinned one, says about the boot.

Whoever runs a virtual TPM can make it say anything: alone it proves no more than its provider's word, and a default
policy is never satisfied by it.
"""

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cloister.evidence.tpm import (
    ALG_ECDSA,
    ALG_NULL,
    ALG_RSAPSS,
    ALG_RSASSA,
    ALG_SHA256,
    ALG_SHA384,
    ALG_SHA512,
    DECRYPT,
    FIXED_PARENT,
    FIXED_TPM,
    GENERATED,
    HIERARCHIES,
    RESTRICTED,
    SENSITIVE_DATA_ORIGIN,
    SIGN,
    Public,
    Quote,
    Signature,
    TpmEvidence,
    hash_name,
    parse_public,
    parse_quote,
    parse_signature,
)
from cloister.verify.boot_log import check_pcr_log
from cloister.verify.factors import Factor, compare, failed, not_checked, passed
from cloister.verify.platform import Appraisal
from cloister.verify.policy import Policy
from cloister.verify.tpm_certificates import ATTESTATION_KEY, PROVIDER_ROOTS, Chain, judge_chain

__all__ = [
    "LAUNCH_PCR",
    "PLATFORM",
    "check_attributes",
    "check_name",
    "judge",
    "judge_quote",
    "launch_digest_of",
    "pcr_measurement",
]

PLATFORM = "vtpm"
LAUNCH_PCR = 14

Key = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

_HASHES: Mapping[int, hashes.HashAlgorithm] = MappingProxyType(
    {ALG_SHA256: hashes.SHA256(), ALG_SHA384: hashes.SHA384(), ALG_SHA512: hashes.SHA512()}
)
_SCHEMES = MappingProxyType({ALG_RSASSA: "RSASSA", ALG_RSAPSS: "RSAPSS", ALG_ECDSA: "ECDSA"})
_ATTESTATION = RESTRICTED | SIGN | FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN


def judge(
    evidence: TpmEvidence,
    *,
    qualifying_data: bytes,
    policy: Policy,
    now: float,
    launch: bytes = b"",
    ak_pins: frozenset[str] = frozenset(),
    roots: frozenset[str] = PROVIDER_ROOTS,
    crls: Sequence[bytes] = (),
    eventlog: bytes | None = None,
) -> Appraisal:
    """Judge a quote and the attestation key (AK) that signed it (TCG "TPM 2.0 Library", parts 1 and 2).

    (1) the AK is certified by a provider whose root is pinned, or its Name's digest is in `ak_pins`; a certificate is of
        the bare key, so the quote must name the public area too, as that of a primary key (part 1, section 16)
    (2) the AK can sign only what the TPM itself made, and cannot leave it (part 1, section 25.2)
    (3) magic: the TPM made what is signed (part 1, section 31.2)
    (4) the AK's signature is over the quote
    (5) extraData is `qualifying_data`, compared in constant time
    (6) the SHA-256 bank and nothing else is quoted, and the values given are those selected
    (7) the quote's digest is that of the values given (part 3, section 18.4)
    (8) the boot log, when one is given, replays into the values given

    `ak_pins`: lower-case hexadecimal digests of the AK's Name (`Public.name_digest`). `crls`: DER revocation lists for
    the chain above the AK. `report_data` of the result is extraData; `platform_id` the AK's name digest.

    Does not check: that hardware stands behind this TPM ("evidence.hardware" says so), nor which PCR values are good.

    Raises: MalformedEvidence.
    """
    ak, quote = parse_public(evidence.ak), parse_quote(evidence.quote)
    chain = _judge_chain(evidence, crls, roots=roots, policy=policy, now=now)
    factors = (
        _check_ak(ak, chain, ak_pins),  # (1)
        *(chain.factors if chain else ()),
        *(() if ak.name_digest in ak_pins else (check_name(quote, ak),)),
        check_attributes(ak),  # (2)
        *judge_quote(evidence, ak.key, ak.scheme, qualifying_data=qualifying_data, eventlog=eventlog),  # (3) to (8)
        not_checked("evidence.hardware", "Provider-trusted: whoever runs this virtual TPM can make it say anything."),
    )
    return Appraisal(
        platform=PLATFORM,
        simulated=False,
        report_data=quote.extra_data,
        launch_sha256=launch_digest_of(evidence.pcrs, launch),
        measurement=pcr_measurement(evidence.pcrs),
        engine=None,
        platform_id=ak.name_digest,
        factors=factors,
        expiries=chain.expiries if chain else (),
        counters=chain.counters if chain else MappingProxyType({}),
    )


def judge_quote(
    evidence: TpmEvidence, key: Key, scheme: tuple[int, int], *, qualifying_data: bytes, eventlog: bytes | None
) -> tuple[Factor, ...]:
    """Steps (3) to (8) of `judge`, under a `key` that the caller believes in or judges itself.

    `scheme` is the AK's own (algorithm, hash); (ALG_NULL, 0) where it is not known. Raises: MalformedEvidence.
    """
    quote, signature = parse_quote(evidence.quote), parse_signature(evidence.signature)
    return (
        _check_magic(quote),  # (3)
        _check_signature(evidence.quote, signature, key, scheme),  # (4)
        _check_extra_data(quote, qualifying_data),  # (5)
        *_check_selection(quote, evidence.pcrs),  # (6)
        _check_digest(quote, signature, evidence.pcrs),  # (7)
        *([check_pcr_log(eventlog, evidence.pcrs)] if eventlog is not None else []),  # (8)
    )


def check_attributes(ak: Public) -> Factor:
    """A restricted signing key, made in this TPM and fixed to it, that decrypts nothing."""
    return compare(
        "evidence.ak-attributes",
        expected=f"{_ATTESTATION:08x}",
        got=f"{ak.attributes & (_ATTESTATION | DECRYPT):08x}",
        hint="The key is no attestation key: it could sign a quote that no TPM made.",
    )


def check_name(quote: Quote, ak: Public) -> Factor:
    """The public area given is the one whose key, a primary one, the TPM says it signed with."""
    expected = [ak.qualified_name(handle).hex() for handle in HIERARCHIES]
    if quote.qualified_signer.hex() in expected:
        return passed("evidence.ak-name", quote.qualified_signer.hex())
    hint = "The TPM signed with a key of other attributes, or one below another key: enrol it, and pin its digest."
    return failed("evidence.ak-name", expected=expected[0], got=quote.qualified_signer.hex() or "nothing", hint=hint)


def launch_digest_of(pcrs: Mapping[int, bytes], launch: bytes) -> bytes:
    """SHA-256 of the launch config's exact bytes when PCR 14 is that one extend from zero; otherwise b""."""
    digest = hashlib.sha256(launch).digest()
    return digest if pcrs.get(LAUNCH_PCR) == hashlib.sha256(bytes(32) + digest).digest() else b""


def pcr_measurement(pcrs: Mapping[int, bytes]) -> Mapping[str, str]:
    """pcr0 to pcr23, those that are quoted."""
    return MappingProxyType({f"pcr{index}": pcrs[index].hex() for index in sorted(pcrs)})


def _judge_chain(
    evidence: TpmEvidence, crls: Sequence[bytes], *, roots: frozenset[str], policy: Policy, now: float
) -> Chain | None:
    if not evidence.certificates:
        return None
    return judge_chain(evidence.certificates, crls, purpose=ATTESTATION_KEY, roots=roots, policy=policy, now=now)


def _check_ak(ak: Public, chain: Chain | None, pins: frozenset[str]) -> Factor:
    step, got = "evidence.ak", ak.name_digest
    if chain is not None and chain.leaf.public_key() != ak.key:
        hint = "The certificate is another key's."
        return failed(step, expected="the certified key", got=f"another key, {got}", hint=hint)
    if got in pins:
        return passed(step, got, "Pinned.")
    if chain is not None:
        return passed(step, got, "Certified: see the chain.")
    hint = "Nobody vouches for this key. Enrol the TPM, and pin its attestation key's digest."
    return failed(step, expected="a certified or pinned attestation key", got=got, hint=hint)


def _check_magic(quote: Quote) -> Factor:
    return compare(
        "evidence.magic",
        expected=f"{GENERATED:08x}",
        got=f"{quote.magic:08x}",
        hint="The TPM did not make this quote itself.",
    )


def _check_signature(message: bytes, signature: Signature, key: Key, scheme: tuple[int, int]) -> Factor:
    step = "evidence.signature"
    name = f"{_SCHEMES[signature.scheme]} {hash_name(signature.hash)}"
    weak = _weakness(signature, key, scheme)
    if weak:
        hint = "This verifier accepts RSA from 2048 bits, P-256 to P-521, SHA-256 or better, in the key's own scheme."
        return failed(step, expected="a strong signature", got=f"{name}: {weak}", hint=hint)
    try:
        _verify(message, signature, key)
    except (InvalidSignature, ValueError):
        hint = "The quote was changed after it was made, or made by another key."
        return failed(step, expected="signed by the attestation key", got="another signature", hint=hint)
    return passed(step, name)


def _weakness(signature: Signature, key: Key, scheme: tuple[int, int]) -> str:
    if signature.hash not in _HASHES:
        return "a weak hash"
    if scheme[0] != ALG_NULL and scheme != (signature.scheme, signature.hash):
        return "not the key's own scheme"
    if isinstance(key, rsa.RSAPublicKey) != (signature.scheme != ALG_ECDSA):
        return "not the key's kind"
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < 2048:
            return "a short key"
        return "" if len(signature.value) == key.key_size // 8 else "a wrong length"
    size = (key.key_size + 7) // 8
    return "" if len(signature.r) <= size and len(signature.s) <= size else "a wrong length"


def _verify(message: bytes, signature: Signature, key: Key) -> None:
    algorithm = _HASHES[signature.hash]
    if isinstance(key, ec.EllipticCurvePublicKey):
        r, s = int.from_bytes(signature.r, "big"), int.from_bytes(signature.s, "big")
        key.verify(encode_dss_signature(r, s), message, ec.ECDSA(algorithm))
        return
    pss = padding.PSS(padding.MGF1(algorithm), padding.PSS.AUTO)
    key.verify(signature.value, message, pss if signature.scheme == ALG_RSAPSS else padding.PKCS1v15(), algorithm)


def _check_extra_data(quote: Quote, qualifying_data: bytes) -> Factor:
    step, got = "evidence.extra-data", quote.extra_data.hex()
    if hmac.compare_digest(quote.extra_data, qualifying_data):
        return passed(step, got)
    hint = "A quote made for somebody else, or replayed: ask for a fresh one."
    return failed(step, expected=qualifying_data.hex(), got=got or "nothing", hint=hint)


def _check_selection(quote: Quote, pcrs: Mapping[int, bytes]) -> Iterator[Factor]:
    banks = sorted({bank for bank, indices in quote.selections if indices})
    yield compare(
        "evidence.pcr-bank",
        expected=hash_name(ALG_SHA256),
        got=" ".join(_bank(bank) for bank in banks),
        hint="Quote PCRs of the SHA-256 bank alone: SHA-1 proves nothing any more.",
    )
    selected = [index for _, indices in quote.selections for index in indices]
    yield compare(
        "evidence.pcr-selection",
        expected=" ".join(str(index) for index in selected),
        got=" ".join(str(index) for index in sorted(pcrs)),
        hint="The values given are not those that the TPM signed.",
    )


def _bank(algorithm: int) -> str:
    return {ALG_SHA256: "sha256", 0x0004: "sha1"}.get(algorithm, f"{algorithm:04x}")


def _check_digest(quote: Quote, signature: Signature, pcrs: Mapping[int, bytes]) -> Factor:
    values = b"".join(pcrs[index] for index in sorted(pcrs))
    return compare(
        "evidence.pcr-digest",
        expected=quote.pcr_digest.hex(),
        got=hashlib.new(hash_name(signature.hash), values).hexdigest(),
        hint="A PCR value was changed after the TPM signed it.",
    )
