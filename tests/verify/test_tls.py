"""A TLS certificate held against a verified statement: made here, with one thing wrong at a time."""

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from tests.verify.world import NOW, World

from cloister.errors import MalformedEvidence, NotTrusted, WrongUse
from cloister.verify import Verified
from cloister.verify.tls import LONGEST_LIFE, check_certificate

KEY, OTHER = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
DAY = 24 * 3600


def certificate(
    key: ec.EllipticCurvePrivateKey = KEY,
    *,
    born: float = NOW,
    life: float = DAY,
    ca: bool | None = False,
) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "enclave")])
    when = datetime.fromtimestamp(born, UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(7).not_valid_before(when).not_valid_after(when + timedelta(seconds=life))
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def spki(key: ec.EllipticCurvePrivateKey) -> str:
    return hashlib.sha256(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


@pytest.fixture
def verified(world: World) -> Verified:
    tolerant = replace(world, pins={"tolerate_insecure": frozenset({"tls"})})
    return tolerant.with_statement(tls_spki=spki(KEY), insecure=("tls",)).verify()


def test_the_attested_key_s_certificate_is_taken(verified: Verified) -> None:
    der = certificate()
    assert check_certificate(der, verified, NOW).public_bytes(Encoding.DER) == der


@pytest.mark.parametrize(
    ("step", "wrong", "now"),
    [
        ("tls.key", {"key": OTHER}, NOW),
        ("tls.authority", {"ca": True}, NOW),
        ("tls.authority", {"ca": None}, NOW),
        ("tls.lifetime", {"life": LONGEST_LIFE + 1}, NOW),
        ("tls.time", {}, NOW - 121),
        ("tls.time", {}, NOW + DAY + 1),
    ],
)
def test_every_other_one_is_refused(verified: Verified, step: str, wrong: dict[str, Any], now: float) -> None:
    with pytest.raises(NotTrusted) as caught:
        check_certificate(certificate(**wrong), verified, now)
    assert caught.value.step == step


def test_a_key_that_is_not_attested_is_named_with_both_digests(verified: Verified) -> None:
    with pytest.raises(NotTrusted, match="not the enclave's") as caught:
        check_certificate(certificate(OTHER), verified, NOW)
    assert (caught.value.expected, caught.value.got) == (spki(KEY), spki(OTHER))


def test_what_is_no_certificate_is_malformed(verified: Verified) -> None:
    with pytest.raises(MalformedEvidence):
        check_certificate(certificate()[:-1], verified, NOW)


def test_an_enclave_without_tls_has_none(world: World) -> None:
    with pytest.raises(WrongUse, match="no TLS listener"):
        check_certificate(certificate(), world.verify(), NOW)
