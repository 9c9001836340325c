"""The key of the listener that ends TLS in here (`--tls`), and its certificate."""

import contextlib
import hashlib
import ipaddress
import os
import re
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloister.errors import WrongUse

__all__ = ["LIFE", "TlsKey"]

LIFE = 24 * 3600.0
"""Seconds for which a key and its certificate are used: a certificate that somebody saved is good for as long."""

_BACKDATED = 120.0
"""Seconds by which a client's clock may be behind."""
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_SERVER_AUTH = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
_SUBJECT = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cloister enclave")])


class TlsKey:
    """A P-256 key that is born here and leaves no memory but this process's, its self-signed certificate, and the
    `context` that serves both, by TLS 1.3 alone. `spki_sha256` (hex) is what the statement says of it.

    `origins`: where the listener is reached, as "https://name:port"; the certificate holds their names. `now` in Unix
    seconds. Key and certificate are replaced together, once `rotate` is called after `LIFE`: whoever asks for evidence
    calls it, so that no statement names a key that is over.

    Raises: WrongUse without an origin, and for one that no certificate can name.
    """

    def __init__(self, origins: Sequence[str], now: float) -> None:
        self.origins = tuple(origins)
        if not origins:
            raise WrongUse("The TLS listener has no name.", step="tls", hint="Name it: --tls-name chat.example.org")
        self._names = x509.SubjectAlternativeName(list(dict.fromkeys(map(_name_of, origins))))
        self.context = _context()
        self.spki_sha256 = ""
        self._ends = 0.0
        self._renew(now)

    def rotate(self, now: float) -> None:
        if now >= self._ends:
            self._renew(now)

    def _renew(self, now: float) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        certificate = _certificate(key, self._names, now)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _load(self.context, certificate.public_bytes(Encoding.PEM) + pem)
        self.spki_sha256, self._ends = hashlib.sha256(spki).hexdigest(), now + LIFE


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # a ticket would outlive the key
    context.set_alpn_protocols(["http/1.1"])
    return context


def _certificate(key: ec.EllipticCurvePrivateKey, names: x509.SubjectAlternativeName, now: float) -> x509.Certificate:
    """For this server and for nothing else: who imports it, has imported no authority."""
    born = datetime.fromtimestamp(int(now), UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign"),
        False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(_SUBJECT)
        .issuer_name(_SUBJECT)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(born - timedelta(seconds=_BACKDATED))
        .not_valid_after(born + timedelta(seconds=LIFE))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, encipher_only=False, decipher_only=False, **usage), critical=True
        )
        .add_extension(_SERVER_AUTH, critical=False)
        .add_extension(names, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _load(context: ssl.SSLContext, pem: bytes) -> None:
    """By a name, as OpenSSL wants it, of memory that has none on any disk. Connections that run keep what they have."""
    descriptor = os.memfd_create("tls")
    try:
        with open(descriptor, "wb", closefd=False) as memory:
            memory.write(pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _name_of(origin: str) -> x509.GeneralName:
    hint = "Such as https://chat.example.org:8443."
    try:
        parts = urlsplit(origin)
        name = parts.hostname or ""
        if parts.scheme != "https" or not parts.port or origin != f"https://{parts.netloc}" or "@" in parts.netloc:
            raise ValueError("no origin with a port")
        with contextlib.suppress(ValueError):
            return x509.IPAddress(ipaddress.ip_address(name))
        if not _NAME.fullmatch(name):
            raise ValueError("no name of a host")
        return x509.DNSName(name)
    except ValueError as error:
        raise WrongUse("The TLS listener's origin is none.", step="tls", hint=hint, got=ascii(origin)[:80]) from error
