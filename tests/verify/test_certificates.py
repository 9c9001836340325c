import datetime
from collections.abc import Callable
from functools import partial

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from tests.verify.world import flips

from cloister.errors import MalformedEvidence
from cloister.verify import amd_certificates, intel_chain, tpm_certificates
from cloister.verify.certificates import check_leaf, load_certificate, public_key_p384

NOW = 1_800_000_000.0
START = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
DAY = datetime.timedelta(days=1)
ROOT_KEY = ec.generate_private_key(ec.SECP384R1())
LEAF_KEY = ec.generate_private_key(ec.SECP384R1())


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def builder(
    subject: str, key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey, until: datetime.datetime = START + DAY
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name("root"))
        .public_key(key)
        .serial_number(7)
        .not_valid_before(START - DAY)
        .not_valid_after(until)
    )


def usage(*, data: bool, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=data,
        key_cert_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def leaf(*, ca: bool = False, data: bool = True, certificates: bool = False) -> x509.Certificate:
    constraints = x509.BasicConstraints(ca=ca, path_length=None)
    made = builder("leaf", LEAF_KEY.public_key()).add_extension(constraints, critical=True)
    made = made.add_extension(usage(data=data, certificates=certificates), critical=True)
    return made.sign(ROOT_KEY, hashes.SHA384())


ROOT = builder("root", ROOT_KEY.public_key()).sign(ROOT_KEY, hashes.SHA384())
LEAF = leaf()


def test_accepts_a_leaf_of_the_root() -> None:
    assert check_leaf("chip", LEAF, ROOT, NOW).verdict == "pass"


def test_refuses_a_leaf_of_another_root_with_the_same_name() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    other = builder("root", key.public_key()).sign(key, hashes.SHA384())
    assert check_leaf("chip", LEAF, other, NOW).verdict == "fail"


def test_refuses_an_issuer_of_another_name_with_the_same_key() -> None:
    other = builder("toor", ROOT_KEY.public_key()).sign(ROOT_KEY, hashes.SHA384())
    assert check_leaf("chip", LEAF, other, NOW).verdict == "fail"


def test_refuses_a_leaf_that_is_over_before_its_root_is() -> None:
    root = builder("root", ROOT_KEY.public_key(), until=START + 9 * DAY).sign(ROOT_KEY, hashes.SHA384())
    assert check_leaf("chip", LEAF, root, NOW + 86_000).verdict == "pass"
    assert check_leaf("chip", LEAF, root, NOW + 86_401).expected == "valid now"


def test_refuses_a_valid_leaf_once_its_root_is_over() -> None:
    root = builder("root", ROOT_KEY.public_key(), until=START - DAY / 2).sign(ROOT_KEY, hashes.SHA384())
    assert check_leaf("chip", LEAF, root, NOW - 86_000).verdict == "pass"
    assert check_leaf("chip", LEAF, root, NOW).verdict == "fail"


@pytest.mark.parametrize("now", [NOW - 86_401, NOW + 86_401, float("nan")])
def test_refuses_outside_the_validity(now: float) -> None:
    assert check_leaf("chip", LEAF, ROOT, now).expected == "valid now"


@pytest.mark.parametrize(
    "wrong",
    [
        leaf(ca=True),
        leaf(certificates=True),
        leaf(data=False),
        builder("l", LEAF_KEY.public_key()).sign(ROOT_KEY, hashes.SHA384()),
    ],
)
def test_refuses_a_leaf_that_may_do_something_else(wrong: x509.Certificate) -> None:
    assert check_leaf("chip", wrong, ROOT, NOW).verdict == "fail"


def test_refuses_a_key_of_another_kind() -> None:
    for key in (
        ec.generate_private_key(ec.SECP256R1()).public_key(),
        ed25519.Ed25519PrivateKey.generate().public_key(),
    ):
        with pytest.raises(MalformedEvidence, match="P-384"):
            public_key_p384(builder("leaf", key).sign(ROOT_KEY, hashes.SHA384()), what="chip")


def test_every_flipped_bit_is_refused() -> None:
    for mutant in flips(LEAF.public_bytes(Encoding.DER)):
        try:
            certificate = load_certificate(mutant, what="chip")
        except MalformedEvidence:
            continue
        assert check_leaf("chip", certificate, ROOT, NOW).verdict == "fail"


def test_refuses_unused_bits_in_the_signature() -> None:
    """Where the signature's last bits happen to be zero, pyca reads another count of unused bits as the same."""
    certificate = next(made for made in iter(leaf, None) if made.signature[-1] & 1 == 0)
    der, signature = certificate.public_bytes(Encoding.DER), certificate.signature
    assert load_certificate(der, what="chip")
    with pytest.raises(MalformedEvidence):
        load_certificate(der.replace(b"\0" + signature, b"\1" + signature), what="chip")


@pytest.mark.parametrize("first", [0x80, 0x00])
@pytest.mark.filterwarnings("default")
def test_refuses_serial_numbers_that_are_not_positive(first: int) -> None:
    der = leaf().public_bytes(Encoding.DER)  # signed anew: what was loaded once is remembered, and warns no more
    assert der.count(b"\x02\x01\x07\x30") == 1
    with pytest.warns(UserWarning, match="serial"), pytest.raises(MalformedEvidence):
        load_certificate(der.replace(b"\x02\x01\x07\x30", bytes([2, 1, first, 0x30])), what="chip")


def test_every_truncation_and_trailing_byte_is_malformed() -> None:
    der = LEAF.public_bytes(Encoding.DER)
    for mutant in [der[:length] for length in range(len(der))] + [der + b"\0"]:
        with pytest.raises(MalformedEvidence):
            load_certificate(mutant, what="chip")


@given(data=st.data())
def test_is_total(data: st.DataObject) -> None:
    der = LEAF.public_bytes(Encoding.DER)
    at = data.draw(st.integers(0, len(der)))
    mangled = der[:at] + data.draw(st.binary(max_size=6)) + der[at + data.draw(st.integers(0, 6)) :]
    try:
        check_leaf("chip", load_certificate(mangled, what="chip"), ROOT, NOW)
    except MalformedEvidence:
        return


def revocation_list(*extensions: x509.ExtensionType) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    made = x509.CertificateRevocationListBuilder().issuer_name(name("CA")).last_update(START).next_update(START + DAY)
    for extension in extensions:
        made = made.add_extension(extension, critical=False)
    while (der := made.sign(key, hashes.SHA256()).public_bytes(Encoding.DER))[-1] & 1:
        pass  # a bit that is left out must have been zero
    return der


def with_unused_bits(der: bytes) -> bytes:
    """The same list in another encoding: its signature's bit string says that it has a bit less."""
    at = len(der) - len(x509.load_der_x509_crl(der).signature) - 1
    return der[:at] + b"\1" + der[at + 1 :]


LISTS: dict[str, Callable[[bytes], object]] = {
    "intel": partial(intel_chain.load_crl, name="PCK CRL"),
    "tpm": tpm_certificates._load_crl,
    "amd": amd_certificates.load_crl,
}


@pytest.mark.parametrize("vendor", LISTS)
def test_a_revocation_list_has_one_encoding_and_a_number_of_at_most_20_octets(vendor: str) -> None:
    load = LISTS[vendor]
    good = revocation_list(x509.CRLNumber(2**160 - 1))
    load(good)
    for other in (with_unused_bits(good), revocation_list(x509.CRLNumber(2**160))):
        with pytest.raises(MalformedEvidence):
            load(other)


def test_intels_lists_have_a_number() -> None:
    with pytest.raises(MalformedEvidence, match="without a number"):
        intel_chain.load_crl(revocation_list(), name="PCK CRL")
