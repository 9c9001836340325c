"""The simulator's root and chip key: random per machine, made once, never shipped."""

import datetime
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from cloister.errors import WrongUse
from cloister.private_file import refuse_shared, write_once

__all__ = ["ChipKeys", "load_or_make"]

_STATE = "device.pem"
_LIFETIME = datetime.timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class ChipKeys:
    """`root` is what a policy names. The root's own key is forgotten once it has certified the chip."""

    root: x509.Certificate
    chip: x509.Certificate
    chip_key: ec.EllipticCurvePrivateKey

    def encode(self) -> bytes:
        key = self.chip_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return key + self.chip.public_bytes(Encoding.PEM) + self.root.public_bytes(Encoding.PEM)


def load_or_make(state_dir: Path, now: float) -> ChipKeys:
    """Of `state_dir` (made with mode 0700), whose `device.pem` (0600) appears whole or not at all.

    Two processes that start at once end with the same keys.

    Raises: WrongUse when others may read or change the directory or the key, or the file is not what was written.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_shared(state_dir, step="sim")
    path = state_dir / _STATE
    if not path.exists():
        write_once(path, _make(now).encode())
    refuse_shared(path, step="sim")
    return _load(path)


def _load(path: Path) -> ChipKeys:
    data = path.read_bytes()
    try:
        key = load_pem_private_key(data, password=None)
        chip, root = x509.load_pem_x509_certificates(data)
    except (ValueError, TypeError) as error:
        raise WrongUse(f"{path} is damaged.", step="sim", hint="Delete it: the next start makes another.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != chip.public_key():
        raise WrongUse(f"{path} is damaged.", step="sim", hint="Delete it: the next start makes another.")
    return ChipKeys(root, chip, key)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: float,
) -> x509.Certificate:
    is_root = subject == issuer
    start = datetime.datetime.fromtimestamp(int(now), datetime.UTC) - datetime.timedelta(days=1)
    usage = x509.KeyUsage(
        digital_signature=not is_root,
        key_cert_sign=is_root,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + _LIFETIME)
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=0 if is_root else None), critical=True)
        .add_extension(usage, critical=True)
        .sign(issuer_key, hashes.SHA384())
    )


def _make(now: float) -> ChipKeys:
    root_key = ec.generate_private_key(ec.SECP384R1())
    chip_key = ec.generate_private_key(ec.SECP384R1())
    root_name = _name(f"cloister simulator root {secrets.token_hex(4)}: NOT HARDWARE")
    root = _certificate(root_name, root_key.public_key(), root_name, root_key, now)
    chip = _certificate(_name("cloister simulated chip"), chip_key.public_key(), root_name, root_key, now)
    return ChipKeys(root, chip, chip_key)
