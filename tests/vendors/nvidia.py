"""A synthetic NVIDIA: device reports, their chains and reference manifests under throw-away roots."""

import base64
import datetime as dt
import hashlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.vendors.p384 import NOW, Issued, Link, issue, raw_signature

NONCE = bytes(range(32))
DRIVER, VBIOS = "590.12", "96.00.A5.00.01"
FWID = hashlib.sha384(b"firmware").digest()
SERIAL = "48B02D0000000001"

_FOREVER = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC).timestamp() - NOW
ALWAYS = (1000 * 86_400.0, _FOREVER)

HOPPER_OID, BLACKWELL_OID = x509.ObjectIdentifier("2.23.133.5.4.1"), x509.ObjectIdentifier("2.23.133.5.4.1.1")
ROOT, IDENTITY, PROVISIONER, BROM, DEVICE = range(5)


def der(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    size = len(content)
    head = bytes([size]) if size < 0x80 else bytes([0x81, size]) if size < 0x100 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + head + content


def fwid(digest: bytes, algorithm: str = "608648016503040202") -> bytes:
    return der(0x30, der(0x06, bytes.fromhex(algorithm)), der(0x04, digest))


def hopper_dice(digest: bytes = FWID) -> bytes:
    spki = ec.derive_private_key(7, ec.SECP384R1()).public_key()
    return der(0x30, b"\x02\x01\x01", spki.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo), fwid(digest))


def blackwell_dice(digest: bytes = FWID) -> bytes:
    return der(
        0x30, der(0x80, b"NVIDIA"), der(0x81, b"GB100"), der(0xA6, fwid(digest), fwid(bytes(48))), der(0x87, b"\x05")
    )


def device_name(product: str, serial: str = SERIAL, vendor: str = "NVIDIA") -> tuple[x509.ExtensionType, bool]:
    text = f"{vendor}:{product}:{serial}".encode()
    name = x509.OtherName(x509.ObjectIdentifier("1.3.6.1.4.1.412.274.1"), der(0x0C, text))
    return x509.SubjectAlternativeName([name]), False


def dice(product: str) -> tuple[tuple[x509.ExtensionType, bool], ...]:
    if product.startswith("GB"):
        return ((x509.UnrecognizedExtension(BLACKWELL_OID, blackwell_dice()), False),)
    return ((x509.UnrecognizedExtension(HOPPER_OID, hopper_dice()), False),)


def links(product: str = "GH100") -> tuple[Link, ...]:
    leaf = (device_name(product), *dice(product))
    return (
        Link("NVIDIA Device Identity CA", valid=ALWAYS),
        Link(f"NVIDIA {product} Identity", valid=ALWAYS),
        Link(f"NVIDIA {product} Provisioner", valid=ALWAYS),
        Link(f"{product} BROM", valid=ALWAYS),
        Link(f"{product} FMC", ca=False, constraints=False, valid=ALWAYS, extensions=leaf),
    )


@cache
def device(product: str = "GH100") -> Issued:
    """A genuine one of each product, made once."""
    return issue(links(product))


def chain(issued: Issued | None = None) -> bytes:
    return b"".join(c.public_bytes(Encoding.PEM) for c in reversed((issued or device()).certificates))


def measurements(**changed: bytes) -> dict[int, bytes]:
    """SPDM index -> digest; every fourth is unused. `m3=…` replaces one."""
    values = {at: bytes(48) if at % 4 == 0 else hashlib.sha384(bytes([at])).digest() for at in range(1, 65)}
    return values | {int(name.removeprefix("m")): value for name, value in changed.items()}


def record(values: Mapping[int, bytes]) -> bytes:
    return b"".join(
        bytes([at, 1]) + (3 + len(value)).to_bytes(2, "little") + b"\x01" + len(value).to_bytes(2, "little") + value
        for at, value in values.items()
    )


GPU_FIELDS: Mapping[int, bytes] = {
    6: bytes.fromhex("00a5009601000000"),
    14: bytes.fromhex("37040000"),
    3: DRIVER.encode() + b"\0",
    11: b"\xaa",
    20: FWID,
}
BOARD_FIELDS: Mapping[int, bytes] = {**GPU_FIELDS, 15: b"885\0\0\0\0\0\0", 17: b"G520\0", 18: b"0200\0"}
"""As a whole report has them: what NVIDIA's service files a VBIOS's manifest under."""

DRIVER_RIM, VBIOS_RIM = "NV_GPU_DRIVER_GH100_590.12", "NV_GPU_VBIOS_G520_0200_885_9600A50001"

SWITCH_FIELDS: Mapping[int, bytes] = {6: b"96.10.55.00.01", 22: bytes.fromhex("203eb31ad9ed0008")}


def opaque(fields: Mapping[int, bytes]) -> bytes:
    return b"".join(
        kind.to_bytes(2, "little") + len(data).to_bytes(2, "little") + data for kind, data in fields.items()
    )


def exchange(
    *,
    nonce: bytes = NONCE,
    values: Mapping[int, bytes] | None = None,
    fields: Mapping[int, bytes] = GPU_FIELDS,
    blocks: int | None = None,
    request: bytes = b"\x11\xe0\x01\xff",
    response: bytes = b"\x11\x60\x00\x00",
    raw_record: bytes | None = None,
    raw_opaque: bytes | None = None,
) -> bytes:
    """Request and response without a signature."""
    values = measurements() if values is None else values
    body = record(values) if raw_record is None else raw_record
    tail = opaque(fields) if raw_opaque is None else raw_opaque
    head = request + nonce + b"\0" + response + bytes([len(values) if blocks is None else blocks])
    return head + len(body).to_bytes(3, "little") + body + bytes(32) + len(tail).to_bytes(2, "little") + tail


def report(issued: Issued | None = None, *, key: ec.EllipticCurvePrivateKey | None = None, **changes: Any) -> bytes:
    """A whole report, by the device that `issued` ends in, or by another `key`."""
    message = exchange(**changes)
    return message + raw_signature(key or (issued or device()).keys[-1], message)


RIM_LINKS = (
    Link("NVIDIA CoRIM signing Root CA", valid=ALWAYS),
    Link("NVIDIA Reference Value CA", valid=ALWAYS),
    Link("NVIDIA Reference Value L3", path_length=0, valid=ALWAYS),
    Link("HCC RIM L4 Signer", ca=False, valid=(86_400.0, 86_400.0)),
)

_SIGNED_INFO = (
    '<ds:SignedInfo xmlns:ds="http://www.w3.org/2000/09/xmldsig#"{inherited}>'
    '<ds:CanonicalizationMethod Algorithm="http://www.w3.org/2006/12/xml-c14n11"></ds:CanonicalizationMethod>'
    '<ds:SignatureMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"></ds:SignatureMethod>'
    '<ds:Reference URI=""><ds:Transforms>'
    '<ds:Transform Algorithm="http://www.w3.org/2000/09/xmldsig#enveloped-signature"></ds:Transform>'
    '<ds:Transform Algorithm="http://www.w3.org/2006/12/xml-c14n11"></ds:Transform></ds:Transforms>'
    '<ds:DigestMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#sha384"></ds:DigestMethod>'
    "<ds:DigestValue>{digest}</ds:DigestValue></ds:Reference></ds:SignedInfo>"
)


@cache
def rim_signer() -> Issued:
    return issue(RIM_LINKS)


def golden(indices: range, **changed: bytes) -> dict[int, bytes]:
    """Manifest index (SPDM's less one) -> digest, for what `measurements` has in use."""
    values = measurements(**changed)
    return {at: values[at + 1] for at in indices if any(values[at + 1])}


DRIVER_GOLDEN, VBIOS_GOLDEN = golden(range(32, 64)), golden(range(32))


def resource(index: int, *digests: bytes, active: str = "True", size: str = "48", count: int | None = None) -> str:
    """Attributes in the order that Canonical XML has them."""
    hashed = "".join(f' h:Hash{at}="{digest.hex()}"' for at, digest in enumerate(digests))
    count = len(digests) if count is None else count
    return f'<Resource active="{active}" alternatives="{count}" index="{index}" size="{size}" type="Measurement"{hashed}></Resource>'


def manifest(
    version: str = DRIVER,
    values: Mapping[int, bytes] | None = None,
    *,
    product: str = "GH100",
    payload: str | None = None,
) -> str:
    """A manifest without signature, in its canonical form: what is hashed."""
    values = DRIVER_GOLDEN if values is None else values
    payload = "".join(resource(at, value) for at, value in values.items()) if payload is None else payload
    return (
        '<SoftwareIdentity xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" '
        f'xmlns:h="http://www.w3.org/2001/04/xmlenc#sha384" tagId="{"ab" * 48}">'
        f'<Meta colloquialVersion="{version}" product="{product}"></Meta>'
        f"<Payload>{payload}{resource(99, bytes(48), active='False')}</Payload></SoftwareIdentity>"
    )


def signed_manifest(
    text: str | None = None, issued: Issued | None = None, *, key: ec.EllipticCurvePrivateKey | None = None
) -> bytes:
    """Signed as W3C's XML-DSig says, by hand: an oracle of its own for the library that verifies."""
    text = manifest() if text is None else text
    issued = issued or rim_signer()
    digest = base64.b64encode(hashlib.sha384(text.encode()).digest()).decode()
    # Canonical XML 1.1 gives the signed element the namespaces that are in scope, sorted: the default one first.
    canonical = _SIGNED_INFO.replace(
        '<ds:SignedInfo xmlns:ds="http://www.w3.org/2000/09/xmldsig#"{inherited}>',
        '<ds:SignedInfo xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" '
        'xmlns:ds="http://www.w3.org/2000/09/xmldsig#" xmlns:h="http://www.w3.org/2001/04/xmlenc#sha384">',
    ).format(digest=digest)
    signature = base64.b64encode(raw_signature(key or issued.keys[-1], canonical.encode())).decode()
    certificates = "".join(
        f"<ds:X509Certificate>{base64.b64encode(der_bytes).decode()}</ds:X509Certificate>"
        for der_bytes in reversed(issued.ders)
    )
    block = (
        '<ds:Signature xmlns:ds="http://www.w3.org/2000/09/xmldsig#">'
        + _SIGNED_INFO.replace(' xmlns:ds="http://www.w3.org/2000/09/xmldsig#"{inherited}', "").format(digest=digest)
        + f"<ds:SignatureValue>{signature}</ds:SignatureValue>"
        + f"<ds:KeyInfo><ds:X509Data>{certificates}</ds:X509Data></ds:KeyInfo></ds:Signature>"
    )
    return text.replace("</SoftwareIdentity>", block + "</SoftwareIdentity>").encode()


def rims() -> dict[str, bytes]:
    """NVIDIA's manifests for the device that `report(fields=BOARD_FIELDS)` speaks of, by name."""
    return {DRIVER_RIM: signed_manifest(), VBIOS_RIM: signed_manifest(manifest(VBIOS, VBIOS_GOLDEN))}
