"""What a TPM 2.0 says: a quote over its PCRs, the signature, and the public area of the key that signed.

Byte formats of the TCG's "TPM 2.0 Library, Part 2: Structures": big-endian, every variable part behind its length. The
document's `tpm` item holds them as the TPM's tools write them:

```
tpm = CBOR {"quote": TPMS_ATTEST, "signature": TPMT_SIGNATURE, "pcrs": {"0": 32 bytes, …}, "ak": TPM2B_PUBLIC,
            "certificates": [DER of the attestation key, of its CA, …, of the root]}
```
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

import cbor2
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from cloister.errors import MalformedEvidence
from cloister.evidence.document import MAX_ITEM, Item
from cloister.evidence.strict_cbor import load_map

__all__ = [
    "ALG_ECDSA",
    "ALG_NULL",
    "ALG_RSAPSS",
    "ALG_RSASSA",
    "ALG_SHA1",
    "ALG_SHA256",
    "ALG_SHA384",
    "ALG_SHA512",
    "ATTEST_QUOTE",
    "DECRYPT",
    "FIXED_PARENT",
    "FIXED_TPM",
    "GENERATED",
    "HASH_SIZES",
    "HIERARCHIES",
    "MEDIA_TYPE",
    "PCR_COUNT",
    "RESTRICTED",
    "SENSITIVE_DATA_ORIGIN",
    "SIGN",
    "Public",
    "Quote",
    "Signature",
    "TpmEvidence",
    "encode_rsassa",
    "hash_name",
    "parse_public",
    "parse_quote",
    "parse_signature",
    "parse_tpm",
    "public_area",
    "sized",
    "tpm_item",
]

MEDIA_TYPE = "application/cbor"

GENERATED = 0xFF544347
"""TPM_GENERATED_VALUE: a restricted key signs nothing that starts so, unless the TPM itself made it."""

HIERARCHIES = (bytes.fromhex("4000000b"), bytes.fromhex("40000001"), bytes.fromhex("4000000c"))
"""Handles of the endorsement, owner and platform hierarchies: the qualified names of their primary keys' parents."""

ATTEST_QUOTE = 0x8018
PCR_COUNT = 24

ALG_RSA, ALG_ECC = 0x0001, 0x0023
ALG_SHA1, ALG_SHA256, ALG_SHA384, ALG_SHA512 = 0x0004, 0x000B, 0x000C, 0x000D
ALG_AES, ALG_CFB, ALG_NULL = 0x0006, 0x0043, 0x0010
ALG_RSASSA, ALG_RSAPSS, ALG_ECDSA = 0x0014, 0x0016, 0x0018

FIXED_TPM, FIXED_PARENT, SENSITIVE_DATA_ORIGIN = 1 << 1, 1 << 4, 1 << 5
RESTRICTED, DECRYPT, SIGN = 1 << 16, 1 << 17, 1 << 18

HASH_SIZES: Mapping[int, int] = MappingProxyType({ALG_SHA1: 20, ALG_SHA256: 32, ALG_SHA384: 48, ALG_SHA512: 64})

_HASH_NAMES = MappingProxyType({ALG_SHA1: "sha1", ALG_SHA256: "sha256", ALG_SHA384: "sha384", ALG_SHA512: "sha512"})
_CURVES: Mapping[int, tuple[type[ec.EllipticCurve], int]] = MappingProxyType(
    {0x0003: (ec.SECP256R1, 32), 0x0004: (ec.SECP384R1, 48), 0x0005: (ec.SECP521R1, 66)}
)
_RSA_BITS = (1024, 2048, 3072, 4096)
_AES_BITS = (128, 192, 256)
_MAX_BANKS = 16
_MAX_SELECT = 4
_MAX_CERTIFICATES = 6


@dataclass(frozen=True, slots=True)
class Quote:
    """A TPMS_ATTEST that holds a quote (Part 2, section 10.12.8). Nothing of it is believed before its signature is.

    `extra_data` is the caller's qualifying data; `selections` are (bank's hash algorithm, PCR indices) in their order;
    `pcr_digest` is the digest over the selected PCRs, by the signature's hash.
    """

    magic: int
    qualified_signer: bytes
    extra_data: bytes
    clock: int
    reset_count: int
    restart_count: int
    safe: bool
    firmware_version: int
    selections: tuple[tuple[int, tuple[int, ...]], ...]
    pcr_digest: bytes


@dataclass(frozen=True, slots=True)
class Signature:
    """A TPMT_SIGNATURE (Part 2, section 11.3.4): RSA has `value`, ECDSA has `r` and `s` (unsigned, big-endian)."""

    scheme: int
    hash: int
    value: bytes = b""
    r: bytes = b""
    s: bytes = b""


@dataclass(frozen=True, slots=True)
class Public:
    """A TPMT_PUBLIC (Part 2, section 12.2.4) of an RSA or ECC key; `encoded` are its exact bytes.

    `scheme` (algorithm, hash) is (ALG_NULL, 0) where the key has none of its own; `symmetric_bits` is AES-CFB's key
    length of a storage or endorsement key, 0 of a signing key.
    """

    encoded: bytes
    name_hash: int
    attributes: int
    auth_policy: bytes
    symmetric_bits: int
    scheme: tuple[int, int]
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey

    @property
    def name(self) -> bytes:
        """The object's Name: its hash algorithm, then the digest of the public area (Part 1, section 16)."""
        return self.name_hash.to_bytes(2, "big") + hashlib.new(hash_name(self.name_hash), self.encoded).digest()

    def qualified_name(self, parent: bytes) -> bytes:
        """The Name with its whole ancestry: `parent` is the parent's qualified name, of a primary key its hierarchy's
        handle (4 bytes)."""
        digest = hashlib.new(hash_name(self.name_hash), parent + self.name).digest()
        return self.name_hash.to_bytes(2, "big") + digest

    @property
    def name_digest(self) -> str:
        """The Name without its algorithm, as lower-case hexadecimal: what a pinned key is pinned by."""
        return self.name[2:].hex()


@dataclass(frozen=True, slots=True)
class TpmEvidence:
    """As transported, PCR values by index. `ak` b"" only where the key comes from elsewhere (Azure's runtime data).

    `certificates`: DER, the attestation key's own first, its root last; () when it has none.
    """

    quote: bytes
    signature: bytes
    pcrs: Mapping[int, bytes]
    ak: bytes
    certificates: tuple[bytes, ...] = ()


def hash_name(algorithm: int) -> str:
    """hashlib's name of a TPM_ALG_ID. Raises: MalformedEvidence for one that is unknown here."""
    if algorithm not in _HASH_NAMES:
        _refuse("tpm.hash", f"TPM hash algorithm 0x{algorithm:04x} is unknown.")
    return _HASH_NAMES[algorithm]


def sized(data: bytes) -> bytes:
    """A TPM2B: two bytes of length, then the bytes."""
    return len(data).to_bytes(2, "big") + data


def parse_tpm(content: bytes) -> TpmEvidence:
    """The container alone; what lies in it has parsers of its own.

    Raises: MalformedEvidence for other keys, types or sizes, more than 64 KiB, PCRs that no TPM has.
    """
    keys = frozenset({"quote", "signature", "pcrs", "ak", "certificates"})
    fields = load_map(content, keys=keys, max_bytes=MAX_ITEM, what="tpm")
    certificates = fields["certificates"]
    if not isinstance(certificates, list) or len(certificates) > _MAX_CERTIFICATES:
        _refuse("tpm.certificates", "tpm.certificates is not a short list.")
    return TpmEvidence(
        quote=_bytes(fields["quote"], "quote"),
        signature=_bytes(fields["signature"], "signature"),
        pcrs=_pcrs(fields["pcrs"]),
        ak=_bytes(fields["ak"], "ak"),
        certificates=tuple(_bytes(certificate, "certificates") for certificate in certificates),
    )


def tpm_item(evidence: TpmEvidence) -> Item:
    """The document's `tpm` item, which `parse_tpm` reads."""
    content = {
        "quote": evidence.quote,
        "signature": evidence.signature,
        "pcrs": {str(index): evidence.pcrs[index] for index in sorted(evidence.pcrs)},
        "ak": evidence.ak,
        "certificates": list(evidence.certificates),
    }
    return Item(MEDIA_TYPE, cbor2.dumps(content))


def parse_quote(data: bytes) -> Quote:
    """Exact length. The magic is read, not judged: a signed message of another origin is for the verifier to refuse.

    Raises: MalformedEvidence, also for an attestation of another type.
    """
    reader = _Reader(data, "tpm.quote")
    magic = reader.number(4)
    if (kind := reader.number(2)) != ATTEST_QUOTE:
        _refuse("tpm.quote.type", "The TPM's attestation is not a quote.", "8018", f"{kind:04x}")
    quote = Quote(
        magic=magic,
        qualified_signer=reader.sized(66),
        extra_data=reader.sized(66),
        clock=reader.number(8),
        reset_count=reader.number(4),
        restart_count=reader.number(4),
        safe=reader.boolean(),
        firmware_version=reader.number(8),
        selections=_selections(reader),
        pcr_digest=reader.sized(64),
    )
    reader.end()
    return quote


def parse_signature(data: bytes) -> Signature:
    """Exact length; RSASSA, RSAPSS and ECDSA alone. Raises: MalformedEvidence."""
    reader = _Reader(data, "tpm.signature")
    scheme, hash_algorithm = reader.number(2), reader.number(2)
    if hash_algorithm not in HASH_SIZES:
        _refuse("tpm.signature.hash", "The TPM's signature has an unknown hash.", got=f"{hash_algorithm:04x}")
    if scheme in (ALG_RSASSA, ALG_RSAPSS):
        signature = Signature(scheme, hash_algorithm, value=reader.sized(512))
    elif scheme == ALG_ECDSA:
        signature = Signature(scheme, hash_algorithm, r=reader.sized(66), s=reader.sized(66))
    else:
        _refuse("tpm.signature.scheme", "The TPM's signature has an unknown scheme.", got=f"{scheme:04x}")
    reader.end()
    return signature


def parse_public(data: bytes) -> Public:
    """A TPM2B_PUBLIC, as the TPM's tools write it, or the bare TPMT_PUBLIC in it.

    The two cannot be confused: no public area is as short as its own type would say.

    Raises: MalformedEvidence for other key types, curves, sizes and schemes; for points off their curve.
    """
    bare = data[:2] in (ALG_RSA.to_bytes(2, "big"), ALG_ECC.to_bytes(2, "big"))
    if not bare:
        outer = _Reader(data, "tpm.ak")
        data = outer.sized(1024)
        outer.end()
    reader = _Reader(data, "tpm.ak")
    kind, name_hash, attributes = reader.number(2), reader.number(2), reader.number(4)
    if kind not in (ALG_RSA, ALG_ECC):
        _refuse("tpm.ak.type", "The TPM's key is neither RSA nor ECC.", got=f"{kind:04x}")
    if name_hash not in HASH_SIZES:
        _refuse("tpm.ak.name", "The TPM's key has an unknown name algorithm.", got=f"{name_hash:04x}")
    auth_policy = reader.sized(64)
    symmetric_bits = _symmetric(reader)
    scheme = _scheme(reader)
    key = _rsa_key(reader) if kind == ALG_RSA else _ecc_key(reader)
    reader.end()
    return Public(data, name_hash, attributes, auth_policy, symmetric_bits, scheme, key)


def public_area(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey, *, attributes: int = 0x00050072) -> bytes:
    """The TPMT_PUBLIC of an attestation key, as `tpm2_createak` makes it: restricted, RSASSA or ECDSA with SHA-256.

    For evidence that carries the bare key only; the Name tells whether the real key's area is the same. Azure's virtual
    TPM has its attestation key with `attributes` 0x00050472.
    """
    head = ALG_SHA256.to_bytes(2, "big") + attributes.to_bytes(4, "big") + sized(b"") + ALG_NULL.to_bytes(2, "big")
    if isinstance(key, rsa.RSAPublicKey):
        size = key.key_size // 8
        parameters = bytes.fromhex("0014000b") + key.key_size.to_bytes(2, "big") + bytes(4)
        return ALG_RSA.to_bytes(2, "big") + head + parameters + sized(key.public_numbers().n.to_bytes(size, "big"))
    curves = [(number, size) for number, (kind, size) in _CURVES.items() if isinstance(key.curve, kind)]
    if not curves:
        _refuse("tpm.ak.curve", "No TPM has a key on this curve.")
    curve, size = curves[0]
    point = key.public_numbers()
    unique = b"".join(sized(value.to_bytes(size, "big")) for value in (point.x, point.y))
    parameters = bytes.fromhex("0018000b") + curve.to_bytes(2, "big") + ALG_NULL.to_bytes(2, "big")
    return ALG_ECC.to_bytes(2, "big") + head + parameters + unique


def encode_rsassa(value: bytes) -> bytes:
    """The TPMT_SIGNATURE around a bare RSASSA signature with SHA-256."""
    return bytes.fromhex("0014000b") + sized(value)


def _refuse(step: str, message: str, expected: str | None = None, got: str | None = None) -> NoReturn:
    raise MalformedEvidence(message, step=step, expected=expected, got=got)


def _bytes(value: object, name: str) -> bytes:
    if not isinstance(value, bytes):
        _refuse(f"tpm.{name}", f"tpm.{name} is not bytes.")
    return value


def _pcrs(value: object) -> Mapping[int, bytes]:
    """Indices are text, in ascending order: the maps that this document's CBOR allows have keys of text."""
    if not isinstance(value, dict) or not all(
        isinstance(digest, bytes) and len(digest) == 32 for digest in value.values()
    ):
        _refuse("tpm.pcrs", "tpm.pcrs is not a map of 32 bytes each.")
    indices = [index for index in range(PCR_COUNT) if str(index) in value]
    if [str(index) for index in indices] != list(value):
        _refuse("tpm.pcrs", "tpm.pcrs has indices that no PCR has, or in another order.")
    return MappingProxyType({index: value[str(index)] for index in indices})


class _Reader:
    """Takes parts from the front; refuses what is cut short, and at the end what is left."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._what = what
        self._at = 0

    def take(self, size: int) -> bytes:
        if len(self._data) - self._at < size:
            _refuse(self._what, f"{self._what} is cut short.")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def boolean(self) -> bool:
        if (value := self.number(1)) > 1:
            _refuse(self._what, f"{self._what} has a truth value that is neither yes nor no.")
        return value == 1

    def sized(self, limit: int) -> bytes:
        if (size := self.number(2)) > limit:
            _refuse(self._what, f"{self._what} has a part that is too long.", f"at most {limit}", str(size))
        return self.take(size)

    def end(self) -> None:
        if self._at != len(self._data):
            _refuse(self._what, f"{self._what} has bytes after its end.")


def _selections(reader: _Reader) -> tuple[tuple[int, tuple[int, ...]], ...]:
    if (count := reader.number(4)) > _MAX_BANKS:
        _refuse("tpm.quote.pcrs", "The quote selects more banks than a TPM has.", got=str(count))
    return tuple(_selection(reader) for _ in range(count))


def _selection(reader: _Reader) -> tuple[int, tuple[int, ...]]:
    bank, size = reader.number(2), reader.number(1)
    if size > _MAX_SELECT:
        _refuse("tpm.quote.pcrs", "The quote selects PCRs that no TPM has.", got=f"{size} bytes")
    bitmap = int.from_bytes(reader.take(size), "little")
    if bitmap >> PCR_COUNT:
        _refuse("tpm.quote.pcrs", "The quote selects PCRs that no TPM has.", got=f"{bitmap:x}")
    return bank, tuple(index for index in range(PCR_COUNT) if bitmap >> index & 1)


def _symmetric(reader: _Reader) -> int:
    algorithm = reader.number(2)
    if algorithm == ALG_NULL:
        return 0
    bits, mode = reader.number(2), reader.number(2)
    if algorithm != ALG_AES or bits not in _AES_BITS or mode != ALG_CFB:
        _refuse("tpm.ak.symmetric", "The TPM's key wraps with something else than AES-CFB.")
    return bits


def _scheme(reader: _Reader) -> tuple[int, int]:
    scheme = reader.number(2)
    if scheme == ALG_NULL:
        return ALG_NULL, 0
    if scheme not in (ALG_RSASSA, ALG_RSAPSS, ALG_ECDSA):
        _refuse("tpm.ak.scheme", "The TPM's key has an unknown scheme.", got=f"{scheme:04x}")
    return scheme, reader.number(2)


def _rsa_key(reader: _Reader) -> rsa.RSAPublicKey:
    bits, exponent = reader.number(2), reader.number(4) or 65537
    modulus = reader.sized(512)
    number = int.from_bytes(modulus, "big")
    if bits not in _RSA_BITS or len(modulus) * 8 != bits or number.bit_length() != bits:
        _refuse("tpm.ak.rsa", "The TPM's RSA key has another length than it says.")
    try:
        return rsa.RSAPublicNumbers(exponent, number).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise MalformedEvidence("The TPM's RSA key is not one.", step="tpm.ak.rsa") from error


def _ecc_key(reader: _Reader) -> ec.EllipticCurvePublicKey:
    curve = reader.number(2)
    if (kdf := reader.number(2)) != ALG_NULL:
        _refuse("tpm.ak.kdf", "The TPM's ECC key has a key derivation of its own.", got=f"{kdf:04x}")
    if curve not in _CURVES:
        _refuse("tpm.ak.curve", "The TPM's ECC key lies on an unknown curve.", got=f"{curve:04x}")
    kind, size = _CURVES[curve]
    x, y = reader.sized(size), reader.sized(size)
    if len(x) != size or len(y) != size:
        _refuse("tpm.ak.ecc", "The TPM's ECC point has coordinates of another length than its curve.")
    try:
        numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), kind())
        return numbers.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise MalformedEvidence("The TPM's ECC point is not on its curve.", step="tpm.ak.ecc") from error
