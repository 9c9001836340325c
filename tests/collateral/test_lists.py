from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from tests.vendors import intel

from cloister.collateral import Answer, Key
from cloister.collateral.lists import check_list
from cloister.errors import MalformedEvidence, NotTrusted

NOW, DAY = intel.NOW, 86400.0
KEY = Key("intel", "root-crl", "sgx")
ROOT = intel.intel().certificate("root", intel.Settings())


def _list(*, issuer: x509.Name = ROOT.subject, limited: bool = False) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer)
        .last_update(datetime.fromtimestamp(NOW - DAY, UTC))
        .next_update(datetime.fromtimestamp(NOW + DAY, UTC))
        .add_extension(x509.CRLNumber(7), critical=False)
    )
    if limited:
        scope = x509.IssuingDistributionPoint(None, None, True, False, None, False, False)  # noqa: FBT003
        builder = builder.add_extension(scope, critical=True)
    entry = x509.RevokedCertificateBuilder().serial_number(0x77).revocation_date(datetime.fromtimestamp(NOW, UTC))
    crl = builder.add_revoked_certificate(entry.build()).sign(intel.intel().keys["root"], hashes.SHA256())
    return crl.public_bytes(Encoding.DER)


def test_a_list_tells_what_it_revokes_and_until_when() -> None:
    piece = check_list(KEY, Answer(_list()), ROOT, NOW)
    assert (piece.revoked, piece.issued, piece.next_update) == (frozenset({0x77}), NOW - DAY, NOW + DAY)


def test_a_list_of_another_name_is_refused_even_under_the_same_key() -> None:
    other = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Another CA")])
    with pytest.raises(NotTrusted, match="not signed by its issuer"):
        check_list(KEY, Answer(_list(issuer=other)), ROOT, NOW)


def test_a_list_of_some_certificates_only_is_refused() -> None:
    with pytest.raises(MalformedEvidence, match="limited scope"):
        check_list(KEY, Answer(_list(limited=True)), ROOT, NOW)


def _with_unused_bits(data: bytes) -> bytes:
    at = len(data) - len(x509.load_der_x509_crl(data).signature) - 1
    return data[:at] + b"\1" + data[at + 1 :]


UNUSED_BITS = _with_unused_bits(_list())


@pytest.mark.parametrize(
    "data", [b"", b"\x30\x00", b"-----BEGIN X509 CRL-----\n", _list()[:-1], _list() + b"\0", UNUSED_BITS]
)
def test_what_is_no_list_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        check_list(KEY, Answer(data), ROOT, NOW)
