"""Whether measurements that came with the evidence are those of the signer whom the policy names."""

import base64
from collections.abc import Iterator
from importlib.resources import as_file, files
from types import MappingProxyType
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloister.errors import MalformedPolicy, WrongUse
from cloister.evidence.launch import LaunchConfig
from cloister.evidence.provenance import Payload, Provenance, parse_payload, signed_bytes
from cloister.verify.certificates import MALFORMED
from cloister.verify.factors import Factor, compare, failed, not_checked, passed
from cloister.verify.policy import Measurements, Policy, check_entry

__all__ = ["SIGSTORE_REFUSES", "joined", "public_key", "signed_measurements", "sigstore_verifier"]

_SIGSTORE_ROOT = ("_store", "https%3A%2F%2Ftuf-repo-cdn.sigstore.dev", "trusted_root.json")
"""Inside the package sigstore: the public instance's certificates and logs, as trustworthy as its code beside them."""

SIGSTORE_REFUSES = (*MALFORMED, ArithmeticError, AttributeError, LookupError)
"""What sigstore raises beside its own errors, for bundles that it did not expect."""


def signed_measurements(
    provenance: Provenance | None, *, policy: Policy, launch: LaunchConfig
) -> tuple[Measurements, tuple[Factor, ...]]:
    """What the policy's signer allows beside the policy's own measurements, and how that was found.

    (1) the policy names a signer; without one nothing that came along is believed
    (2) the payload's bytes are signed by that very signer
    (3) they are about the deployment and release that runs
    (4) each entry pins code, as the policy's own would have to

    A sigstore bundle is verified offline, from the root that the installed sigstore carries (extra `sigstore`), never
    from a cache.

    Raises: MalformedEvidence; WrongUse when the policy names a sigstore signer and the extra is not installed.
    """
    if policy.measurements_signer is None and policy.sigstore is None:
        if provenance is None:
            return MappingProxyType({}), ()
        hint = "Signed measurements came along, and the policy names nobody whose signature counts."
        return MappingProxyType({}), (not_checked("provenance", hint, provenance.key or "sigstore"),)  # (1)
    if provenance is None:
        hint = "The policy believes a signer, and nothing signed came with the evidence."
        return MappingProxyType({}), (failed("provenance", expected=_signer(policy), got="nothing", hint=hint),)
    signature = _check_sigstore(provenance, policy) if provenance.bundle else _check_key(provenance, policy)  # (2)
    if signature.verdict == "fail":
        return MappingProxyType({}), (signature,)
    payload = parse_payload(provenance.payload)
    factors = (*_check_subject(payload, launch), _check_entries(payload))  # (3) (4)
    good = all(factor.verdict == "pass" for factor in factors)
    return payload.measurements if good else MappingProxyType({}), (signature, *factors)


def public_key(text: str) -> Ed25519PublicKey:
    """Of `ed25519:` and 43 characters of base64url, whose form was checked."""
    return Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(text.removeprefix("ed25519:") + "="))


def _signer(policy: Policy) -> str:
    return policy.measurements_signer or f"sigstore: {(policy.sigstore or {}).get('identity', '')}"


def _check_key(provenance: Provenance, policy: Policy) -> Factor:
    step = "provenance.signature"
    if policy.measurements_signer is None or provenance.key != policy.measurements_signer:
        hint = "Somebody else than the policy's signer signed these measurements."
        return failed(step, expected=_signer(policy), got=provenance.key, hint=hint)
    try:
        public_key(provenance.key).verify(provenance.signature, signed_bytes(provenance.payload))
    except (InvalidSignature, ValueError):
        return failed(step, expected=provenance.key, got="another signature", hint="The measurements were changed.")
    return passed(step, provenance.key)


def _check_subject(payload: Payload, launch: LaunchConfig) -> Iterator[Factor]:
    hint = "The signed measurements are those of another deployment."
    yield compare("provenance.deployment", expected=launch.deployment, got=payload.deployment, hint=hint)
    hint = "The signed measurements are those of another release."
    yield compare("provenance.release", expected=str(launch.release), got=str(payload.release), hint=hint)


def _check_entries(payload: Payload) -> Factor:
    step = "provenance.measurements"
    try:
        for platform, entries in payload.measurements.items():
            for entry in entries:
                check_entry(platform, entry)
    except MalformedPolicy as error:
        hint = "The signer signed measurements that say nothing about the code."
        return failed(step, expected=error.expected or "entries that pin code", got=error.message, hint=hint)
    return passed(step, " ".join(sorted(payload.measurements)) or "none")


def _check_sigstore(provenance: Provenance, policy: Policy) -> Factor:
    step = "provenance.signature"
    if policy.sigstore is None:
        hint = "The policy's signer is a key, and these measurements were signed through sigstore."
        return failed(step, expected=_signer(policy), got="a sigstore bundle", hint=hint)
    make_verifier, errors, bundle_type, identity_type = _sigstore()
    try:
        verifier = make_verifier()
    except (errors, OSError, *SIGSTORE_REFUSES) as error:
        hint = "Install a sigstore that cloister knows (pip install 'cloister[sigstore]'): without its root nothing can be judged."
        return failed(step, expected="sigstore's own root", got=type(error).__name__, hint=hint)
    identity, issuer = policy.sigstore["identity"], policy.sigstore["issuer"]
    try:
        bundle = bundle_type.from_json(provenance.bundle)
        verifier.verify_artifact(provenance.payload, bundle, identity_type(identity=identity, issuer=issuer))
    except (errors, *SIGSTORE_REFUSES) as error:
        got = type(error).__name__
        return failed(step, expected=_signer(policy), got=got, hint="Not signed by that identity, or changed since.")
    return passed(step, f"{identity} ({issuer})")


def _sigstore() -> tuple[Any, Any, Any, Any]:
    """What makes an offline verifier, and the types around it: an extra that only this needs."""
    try:
        from sigstore.errors import Error
        from sigstore.models import Bundle
        from sigstore.verify.policy import Identity
    except ModuleNotFoundError as error:
        raise WrongUse(
            "The policy names a sigstore signer, and sigstore is not installed.",
            hint='pip install "cloister[sigstore]"',
        ) from error
    return sigstore_verifier, Error, Bundle, Identity


def sigstore_verifier() -> Any:
    """One that asks nobody. Not `Verifier.production(offline=True)`: that believes, unverified, a root in the user's
    cache folder, and writes that folder.

    Raises: OSError, sigstore's errors, SIGSTORE_REFUSES where the installed sigstore has no such root.
    """
    from sigstore.models import TrustedRoot
    from sigstore.verify import Verifier

    with as_file(files("sigstore").joinpath(*_SIGSTORE_ROOT)) as path:
        return Verifier(trusted_root=TrustedRoot.from_file(str(path)))


def joined(own: Measurements, signed: Measurements) -> Measurements:
    """Every entry of either."""
    return MappingProxyType({name: (*own.get(name, ()), *signed.get(name, ())) for name in {*own, *signed}})
