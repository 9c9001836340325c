"""The TLS listener's certificate, as a client that imports it would meet it."""

import hashlib
import ssl
import time
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.enclave.gateway.certificate import LIFE, TlsKey
from cloister.errors import WrongUse

NOW = 1_800_000_000.0
ORIGINS = ("https://localhost:8443", "https://127.0.0.1:8443", "https://[::1]:8443", "https://chat.example.org:443")


def handshake(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends, in memory. Raises: ssl.SSLError."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (server.wrap_bio(up, down, server_side=True), client.wrap_bio(down, up, server_hostname=name))
    for _ in range(4):
        for end in reversed(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ends[1].version()
    return ends


def trusting_nobody() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def certificate_of(key: TlsKey) -> x509.Certificate:
    der = handshake(key.context, trusting_nobody())[1].getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


def spki_of(certificate: x509.Certificate) -> str:
    der = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def test_what_it_serves_is_what_the_statement_will_name() -> None:
    key = TlsKey(ORIGINS, NOW)
    assert spki_of(certificate_of(key)) == key.spki_sha256
    assert TlsKey(ORIGINS, NOW).spki_sha256 != key.spki_sha256


def test_the_certificate_is_no_authority_and_lives_a_day() -> None:
    certificate = certificate_of(TlsKey(ORIGINS, NOW))
    extensions = certificate.extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.value.ca, constraints.critical) == (False, True)
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.digital_signature, usage.key_cert_sign, usage.crl_sign) == (True, False, False)
    assert certificate.not_valid_after_utc.timestamp() == NOW + LIFE
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc < timedelta(days=1, minutes=5)


def test_it_names_every_origin() -> None:
    names = certificate_of(TlsKey(ORIGINS, NOW)).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "chat.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]


@pytest.mark.parametrize(
    "origins",
    [
        (),
        ("http://localhost:8443",),
        ("https://localhost",),
        ("https://localhost:8443/",),
        ("https://me@localhost:8443",),
        ("https://:8443",),
        ("https://*.example.org:8443",),
        ("https://localhost:none",),
        ("https://chät.example:8443",),
        ("localhost:8443",),
    ],
)
def test_an_origin_that_no_certificate_can_name_is_refused(origins: tuple[str, ...]) -> None:
    with pytest.raises(WrongUse):
        TlsKey(origins, NOW)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2])
def test_older_versions_are_refused(version: ssl.TLSVersion) -> None:
    client = trusting_nobody()
    client.maximum_version = version
    with pytest.raises(ssl.SSLError):
        handshake(TlsKey(ORIGINS, NOW).context, client)
    assert handshake(TlsKey(ORIGINS, NOW).context, trusting_nobody())[1].version() == "TLSv1.3"


def test_no_ticket_outlives_the_key() -> None:
    context = TlsKey(ORIGINS, NOW).context
    for tickets in (context.num_tickets, 2):
        context.num_tickets = tickets
        _server, client = handshake(context, trusting_nobody())
        with pytest.raises(ssl.SSLWantReadError):
            client.read()
        assert client.session is not None
        assert client.session.has_ticket == (tickets == 2)


def test_key_and_certificate_are_replaced_together_and_not_before_their_time() -> None:
    key = TlsKey(ORIGINS, NOW)
    first = certificate_of(key)
    key.rotate(NOW + LIFE - 1)
    key.rotate(NOW - 1e6)
    assert certificate_of(key) == first
    key.rotate(NOW + LIFE)
    second = certificate_of(key)
    assert spki_of(second) == key.spki_sha256 != spki_of(first)
    assert second.not_valid_after_utc.timestamp() == NOW + 2 * LIFE


def test_who_saved_it_needs_nothing_else_and_is_fooled_by_no_other_key() -> None:
    key = TlsKey(ORIGINS, time.time())
    client = ssl.create_default_context(cadata=certificate_of(key).public_bytes(Encoding.PEM).decode())
    assert handshake(key.context, client)[1].version() == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(TlsKey(ORIGINS, time.time()).context, client)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(key.context, client, "elsewhere.example")


def test_no_descriptor_of_the_private_key_is_left() -> None:
    before = sorted(map(str, Path("/proc/self/fd").iterdir()))
    TlsKey(ORIGINS, NOW).rotate(NOW + LIFE)
    assert sorted(map(str, Path("/proc/self/fd").iterdir())) == before
