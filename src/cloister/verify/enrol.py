"""Enrolment of a TPM: to be sure that an attestation key lives in the very TPM whose endorsement key (EK) was certified.

An EK signs nothing. So the verifier seals a secret to the EK and to the Name of the attestation key; only the TPM that
holds both gives the secret back (TCG "TPM 2.0 Library", part 1, section 24, "Credential Protection").

    verifier: check_endorsement -> make_credential -> (to the TPM: TPM2_ActivateCredential) -> check_activation -> pin
"""

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES

from cloister.errors import MalformedEvidence, WrongUse
from cloister.evidence.tpm import (
    ALG_SHA256,
    ALG_SHA384,
    ALG_SHA512,
    DECRYPT,
    FIXED_PARENT,
    FIXED_TPM,
    HASH_SIZES,
    RESTRICTED,
    SENSITIVE_DATA_ORIGIN,
    SIGN,
    Public,
    hash_name,
    parse_public,
    sized,
)
from cloister.verify.factors import Factor, compare, failed, passed
from cloister.verify.policy import Policy
from cloister.verify.tpm_certificates import ENDORSEMENT_KEY, PROVIDER_ROOTS, judge_chain

__all__ = ["SECRET_SIZE", "Credential", "check_activation", "check_endorsement", "kdfa", "kdfe", "make_credential"]

SECRET_SIZE = 32
"""Bytes of a secret that is worth sealing: no digest of a name algorithm is shorter."""

Entropy = Callable[[int], bytes]

_ENDORSEMENT = RESTRICTED | DECRYPT | FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN
_OAEP_HASHES: dict[int, hashes.HashAlgorithm] = {
    ALG_SHA256: hashes.SHA256(),
    ALG_SHA384: hashes.SHA384(),
    ALG_SHA512: hashes.SHA512(),
}
_TOOL_MAGIC = bytes.fromhex("badcc0de00000001")


@dataclass(frozen=True, slots=True)
class Credential:
    """What TPM2_ActivateCredential takes: `blob` a TPM2B_ID_OBJECT, `secret` a TPM2B_ENCRYPTED_SECRET."""

    blob: bytes
    secret: bytes

    def tool_file(self) -> bytes:
        """The file that `tpm2_activatecredential --credential-blob` reads."""
        return _TOOL_MAGIC + self.blob + self.secret


def check_endorsement(
    ek_public: bytes,
    certificates: Sequence[bytes],
    *,
    policy: Policy,
    now: float,
    roots: frozenset[str] = PROVIDER_ROOTS,
    crls: Sequence[bytes] = (),
) -> tuple[Factor, ...]:
    """Whether a TPM's maker, or a cloud provider, certified this endorsement key.

    (1) the chain (DER, the EK's certificate first) ends in one of `roots`, valid now and nothing revoked
    (2) the certificate is this very key's
    (3) the key decrypts and signs nothing, was made in its TPM and is fixed to it (TCG "EK Credential Profile")

    `ek_public`: TPM2B_PUBLIC or TPMT_PUBLIC. Does not check: that the key's holder is there; that is what a credential
    is for. Raises: MalformedEvidence.
    """
    public = parse_public(ek_public)
    chain = judge_chain(certificates, crls, purpose=ENDORSEMENT_KEY, roots=roots, policy=policy, now=now)
    return (
        *chain.factors,  # (1)
        _check_certified(chain.leaf.public_key() == public.key, public),  # (2)
        compare(  # (3)
            "evidence.ek-attributes",
            expected=f"{_ENDORSEMENT:08x}",
            got=f"{public.attributes & (_ENDORSEMENT | SIGN):08x}",
            hint="The key is no endorsement key: it could leave its TPM, or decrypt for anybody.",
        ),
    )


def make_credential(ek_public: bytes, ak_name: bytes, secret: bytes, entropy: Entropy) -> Credential:
    """Seal `secret` so that only the TPM with this EK opens it, and only while it holds the key of this Name.

    (1) a fresh seed, shared with the EK: RSA-OAEP (part 1, annex B.10.4) or one-pass ECDH (annex C.6.1)
    (2) the secret encrypted under a key from seed and Name (section 24.4)
    (3) an HMAC over ciphertext and Name, under another key from the seed (section 24.5)

    `ak_name` as `Public.name` has it; `secret` fresh and 32 bytes; `entropy` gives that many random bytes (RSA-OAEP's
    own padding is random beyond it). Does not check that the EK is certified.

    Raises: MalformedEvidence for an EK that wraps in another way; WrongUse for a secret or Name of another size.
    """
    public = parse_public(ek_public)
    if len(secret) != SECRET_SIZE or HASH_SIZES.get(int.from_bytes(ak_name[:2], "big")) != len(ak_name) - 2:
        raise WrongUse("A credential holds 32 bytes, for a key named by a known hash.", step="enrol.credential")
    if public.name_hash not in _OAEP_HASHES or not public.symmetric_bits:
        raise MalformedEvidence("The endorsement key wraps nothing, or with a weak hash.", step="enrol.ek")
    algorithm = hash_name(public.name_hash)
    seed, encrypted = _share_seed(public, entropy)  # (1)
    key = kdfa(algorithm, seed, b"STORAGE", ak_name, b"", public.symmetric_bits)
    encryptor = Cipher(AES(key), CFB(bytes(16))).encryptor()
    identity = encryptor.update(sized(secret)) + encryptor.finalize()  # (2)
    mac_key = kdfa(algorithm, seed, b"INTEGRITY", b"", b"", HASH_SIZES[public.name_hash] * 8)
    mac = hmac.digest(mac_key, identity + ak_name, algorithm)  # (3)
    return Credential(blob=sized(sized(mac) + identity), secret=sized(encrypted))


def check_activation(secret: bytes, answer: bytes) -> Factor:
    """Whether the TPM gave back the very secret that was sealed to it; compared in constant time."""
    if hmac.compare_digest(secret, answer):
        return passed("enrol.activation", "opened by the TPM")
    hint = "The attestation key lives in another TPM than the endorsement key, or somebody answers for it."
    return failed("enrol.activation", expected="the sealed secret", got="something else", hint=hint)


def kdfa(algorithm: str, key: bytes, label: bytes, context_u: bytes, context_v: bytes, bits: int) -> bytes:
    """Part 1, section 11.4.10.2: SP 800-108 in counter mode over HMAC."""
    blocks = -(-bits // (8 * hashlib.new(algorithm).digest_size))
    fixed = label + b"\0" + context_u + context_v + bits.to_bytes(4, "big")
    stream = b"".join(hmac.digest(key, i.to_bytes(4, "big") + fixed, algorithm) for i in range(1, blocks + 1))
    return stream[: bits // 8]


def kdfe(algorithm: str, z: bytes, use: bytes, party_u: bytes, party_v: bytes, bits: int) -> bytes:
    """Part 1, section 11.4.10.3: SP 800-56A's one-step derivation."""
    blocks = -(-bits // (8 * hashlib.new(algorithm).digest_size))
    fixed = z + use + b"\0" + party_u + party_v
    stream = b"".join(hashlib.new(algorithm, i.to_bytes(4, "big") + fixed).digest() for i in range(1, blocks + 1))
    return stream[: bits // 8]


def _check_certified(same: bool, public: Public) -> Factor:
    if same:
        return passed("evidence.ek", public.name_digest)
    hint = "The certificate is another TPM's."
    return failed("evidence.ek", expected="the certified key", got=f"another key, {public.name_digest}", hint=hint)


def _share_seed(public: Public, entropy: Entropy) -> tuple[bytes, bytes]:
    """The seed, and what the TPM needs to have it too."""
    size, algorithm = HASH_SIZES[public.name_hash], hash_name(public.name_hash)
    if isinstance(public.key, rsa.RSAPublicKey):
        seed, digest = entropy(size), _OAEP_HASHES[public.name_hash]
        return seed, public.key.encrypt(seed, padding.OAEP(padding.MGF1(digest), digest, b"IDENTITY\0"))
    width = (public.key.key_size + 7) // 8
    ephemeral = _ephemeral(public.key.curve, entropy)
    z = ephemeral.exchange(ec.ECDH(), public.key)
    point, other = ephemeral.public_key().public_numbers(), public.key.public_numbers()
    x, y, peer = (value.to_bytes(width, "big") for value in (point.x, point.y, other.x))
    return kdfe(algorithm, z, b"IDENTITY", x, peer, size * 8), sized(x) + sized(y)


def _ephemeral(curve: ec.EllipticCurve, entropy: Entropy) -> ec.EllipticCurvePrivateKey:
    """FIPS 186-5, appendix A.2.1: 64 bits more than the order has, so that the remainder is as good as uniform."""
    order = curve.group_order
    wide = int.from_bytes(entropy((order.bit_length() + 7) // 8 + 8), "big")
    return ec.derive_private_key(wide % (order - 1) + 1, curve)
