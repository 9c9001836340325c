import hashlib
import hmac
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from tests.vendors.tpm import EK, NOW, Maker, Tpm, pinned

from cloister.errors import MalformedEvidence, WrongUse
from cloister.evidence.tpm import parse_public, sized
from cloister.verify.enrol import Credential, check_activation, check_endorsement, kdfa, kdfe, make_credential
from cloister.verify.policy import Policy

SECRET = bytes(range(32))
AK_NAME = parse_public(Tpm().area).name
RSA = rsa.generate_private_key(65537, 2048)
ECC = ec.generate_private_key(ec.SECP256R1())
MAKER = Maker()


def entropy(size: int) -> bytes:
    return b"\x5a" * size


def endorsement_area(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, attributes: int = 0x000300B2) -> bytes:
    """The TCG's templates L-1 and L-2 (EK Credential Profile, annex B.3)."""
    head = bytes.fromhex("000b") + attributes.to_bytes(4, "big") + sized(bytes(32)) + bytes.fromhex("000600800043")
    if isinstance(key, rsa.RSAPrivateKey):
        modulus = key.public_key().public_numbers().n.to_bytes(256, "big")
        return b"\0\1" + head + bytes.fromhex("0010080000000000") + sized(modulus)
    point = key.public_key().public_numbers()
    tail = sized(point.x.to_bytes(32, "big")) + sized(point.y.to_bytes(32, "big"))
    return b"\0\x23" + head + bytes.fromhex("001000030010") + tail


def activate(
    credential: Credential, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, name: bytes = AK_NAME
) -> bytes | None:
    """What the TPM does (part 3, section 12.5): None where it answers TPM_RC_INTEGRITY."""
    encrypted, blob = credential.secret[2:], credential.blob[2:]
    if isinstance(key, rsa.RSAPrivateKey):
        seed = key.decrypt(encrypted, padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"IDENTITY\0"))
    else:
        x, y = encrypted[2:34], encrypted[36:]
        peer = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), ec.SECP256R1())
        own = key.public_key().public_numbers().x.to_bytes(32, "big")
        seed = kdfe("sha256", key.exchange(ec.ECDH(), peer.public_key()), b"IDENTITY", x, own, 256)
    mac, identity = blob[2:34], blob[34:]
    expected = hmac.digest(kdfa("sha256", seed, b"INTEGRITY", b"", b"", 256), identity + name, "sha256")
    if mac != expected:
        return None
    decryptor = Cipher(AES(kdfa("sha256", seed, b"STORAGE", name, b"", 128)), CFB(bytes(16))).decryptor()
    return decryptor.update(identity)[2:]


@pytest.mark.parametrize("key", [RSA, ECC], ids=["RSA", "ECC"])
def test_the_tpm_that_holds_both_keys_opens_it(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
    credential = make_credential(sized(endorsement_area(key)), AK_NAME, SECRET, entropy)
    assert activate(credential, key) == SECRET
    assert check_activation(SECRET, SECRET).verdict == "pass"


@pytest.mark.parametrize("key", [RSA, ECC], ids=["RSA", "ECC"])
def test_another_attestation_key_does_not(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
    credential = make_credential(endorsement_area(key), AK_NAME, SECRET, entropy)
    assert activate(credential, key, name=parse_public(Tpm().area).name) is None


def test_another_endorsement_key_does_not() -> None:
    credential = make_credential(endorsement_area(ECC), AK_NAME, SECRET, entropy)
    assert activate(credential, ec.generate_private_key(ec.SECP256R1())) is None


def test_no_bit_of_a_credential_may_change() -> None:
    credential = make_credential(endorsement_area(ECC), AK_NAME, SECRET, entropy)
    for at in range(4, len(credential.blob)):
        blob = credential.blob[:at] + bytes([credential.blob[at] ^ 1]) + credential.blob[at + 1 :]
        assert activate(replace(credential, blob=blob), ECC) is None


def test_a_wrong_answer_fails() -> None:
    for answer in (b"", bytes(32), SECRET[:-1], SECRET + b"\0"):
        factor = check_activation(SECRET, answer)
        assert (factor.step, factor.verdict) == ("enrol.activation", "fail")
        assert SECRET.hex() not in repr(factor)


def test_the_ephemeral_key_comes_from_the_given_entropy() -> None:
    area = endorsement_area(ECC)
    first, second = (make_credential(area, AK_NAME, SECRET, entropy) for _ in range(2))
    assert first == second
    assert make_credential(area, AK_NAME, SECRET, lambda size: b"\1" * size).secret != first.secret


def test_the_tools_file_has_its_header() -> None:
    credential = Credential(sized(b"blob"), sized(b"secret"))
    assert credential.tool_file() == bytes.fromhex("badcc0de00000001") + b"\0\4blob\0\6secret"


@pytest.mark.parametrize("secret", [b"", SECRET[:-1], SECRET + b"\0"])
def test_a_secret_has_32_bytes(secret: bytes) -> None:
    with pytest.raises(WrongUse):
        make_credential(endorsement_area(ECC), AK_NAME, secret, entropy)


@pytest.mark.parametrize(
    "name",
    [b"", AK_NAME[:-1], AK_NAME + b"\0", b"\0\x12" + AK_NAME[2:]],
    ids=["none", "short", "long", "another hash"],
)
def test_a_name_has_its_hash_and_its_digest(name: bytes) -> None:
    with pytest.raises(WrongUse):
        make_credential(endorsement_area(ECC), name, SECRET, entropy)


def test_a_key_that_wraps_nothing_is_no_endorsement_key() -> None:
    with pytest.raises(MalformedEvidence):
        make_credential(Tpm().area, AK_NAME, SECRET, entropy)
    with pytest.raises(MalformedEvidence):
        make_credential(endorsement_area(ECC).replace(b"\0\x23\0\x0b", b"\0\x23\0\x04"), AK_NAME, SECRET, entropy)


def test_derives_keys_block_by_block() -> None:
    long = kdfa("sha256", b"key", b"LABEL", b"u", b"v", 512)
    assert long[:32] == hmac.digest(b"key", b"\0\0\0\1LABEL\0uv\0\0\2\0", "sha256")
    assert long[32:] == hmac.digest(b"key", b"\0\0\0\2LABEL\0uv\0\0\2\0", "sha256")
    assert kdfe("sha1", b"z", b"USE", b"u", b"v", 128) == hashlib.sha1(b"\0\0\0\1zUSE\0uv").digest()[:16]


def refused(area: bytes, chain: tuple[bytes, ...], **changes: Any) -> set[str]:
    given: dict[str, Any] = {"policy": Policy(), "now": NOW, "roots": pinned(MAKER.root), "crls": [MAKER.crl()]}
    factors = check_endorsement(area, chain, **{**given, **changes})
    return {factor.step for factor in factors if factor.verdict == "fail"}


def test_a_certified_endorsement_key_is_accepted() -> None:
    assert refused(endorsement_area(RSA), MAKER.chain(RSA.public_key(), EK)) == set()
    agreement = replace(EK, usages=("key_agreement",))
    assert refused(endorsement_area(ECC), MAKER.chain(ECC.public_key(), agreement)) == set()


def test_a_foreign_endorsement_key_is_refused() -> None:
    genuine = MAKER.chain(RSA.public_key(), EK)
    foreign = Maker().chain(RSA.public_key(), EK)
    assert refused(endorsement_area(ECC), genuine) == {"evidence.ek"}
    assert refused(endorsement_area(RSA), foreign) >= {"evidence.root"}
    assert refused(endorsement_area(RSA), genuine, roots=frozenset()) == {"evidence.root"}


def test_an_endorsement_key_must_be_for_that_and_not_revoked() -> None:
    area = endorsement_area(RSA)
    assert refused(area, MAKER.chain(RSA.public_key())) == {"evidence.chain"}
    assert refused(area, MAKER.chain(RSA.public_key(), replace(EK, until=NOW - 1))) == {"evidence.chain"}
    assert refused(area, MAKER.chain(RSA.public_key(), EK), crls=[MAKER.crl(5)]) == {"evidence.crl"}


@pytest.mark.parametrize("attributes", [0x000300B0, 0x000300A2, 0x00030092, 0x000200B2, 0x000700B2, 0x000100B2])
def test_a_key_that_could_leave_its_tpm_is_refused(attributes: int) -> None:
    area = endorsement_area(RSA, attributes)
    assert refused(area, MAKER.chain(RSA.public_key(), EK)) == {"evidence.ek-attributes"}
