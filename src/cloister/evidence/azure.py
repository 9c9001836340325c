"""What Azure's paravisor says in a confidential VM: its report (HCL), and the runtime data that the hardware vouches for.

```
HCL report   = header (32): "HCLA", version, length, request type, status, zeros      all numbers little-endian, 4 bytes
               | hardware report (1184): SNP's attestation report, or a TDREPORT padded with zeros
               | length, version 1, report type (2 SNP, 4 TDX), hash (1 SHA-256), size of the runtime data (20)
               | runtime data: JSON, whose SHA-256 is the first half of the hardware report's report_data
               | zeros up to the size of the TPM's NV index
runtime data = {"keys": [JWK "HCLAkPub", …], "vm-configuration": {…}, "user-data": 128 hexadecimal digits}
```
From Microsoft's "Confidential VM guest attestation: report and runtime data"; the layout was checked on real reports.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa

from cloister.errors import MalformedEvidence
from cloister.evidence.document import MAX_ITEM
from cloister.evidence.strict_json import from_b64url, load_object

__all__ = ["HARDWARE_SIZE", "SNP", "TDX", "HclReport", "RuntimeData", "parse_hcl", "parse_runtime"]

SNP, TDX = 2, 4
HARDWARE_SIZE = 1184

_HEADER = 32
_RUNTIME_HEADER = 20
_SHA256 = 1
_AK = "HCLAkPub"
_MAX_KEYS = 8
_USER_DATA = 64
_RSA_BITS = (2048, 3072, 4096)


@dataclass(frozen=True, slots=True)
class HclReport:
    """`kind` SNP or TDX; `hardware` the 1184 bytes of the hardware's own report; `runtime` the exact JSON bytes."""

    kind: int
    hardware: bytes
    runtime: bytes


@dataclass(frozen=True, slots=True)
class RuntimeData:
    """`ak` is the virtual TPM's attestation key; `user_data` 64 bytes that the guest wrote; `configuration` the VM's
    settings as text ("true", "false", a number, or what stands there), by Microsoft's names."""

    ak: rsa.RSAPublicKey
    user_data: bytes
    configuration: Mapping[str, str]


def parse_hcl(data: bytes) -> HclReport:
    """Header, hardware report and runtime data apart. Nothing of it is believed.

    Raises: MalformedEvidence for other versions, lengths that disagree, anything but zeros after the end.
    """
    if not _HEADER + HARDWARE_SIZE + _RUNTIME_HEADER <= len(data) <= MAX_ITEM:
        _refuse("azure.report", "The HCL report has a wrong length.", got=str(len(data)))
    magic, version, size, _, status, *reserved = struct.unpack_from("<4sIIIIIII", data)
    if magic != b"HCLA" or version not in (1, 2) or status != 0 or any(reserved):
        _refuse("azure.report.header", "This is not an HCL report of a known version.")
    start = _HEADER + HARDWARE_SIZE
    length, inner, kind, algorithm, runtime_size = struct.unpack_from("<IIIII", data, start)
    end = start + _RUNTIME_HEADER + runtime_size
    if inner != 1 or kind not in (SNP, TDX) or algorithm != _SHA256:
        _refuse("azure.report.runtime", "The HCL report's runtime data are of an unknown version or kind.")
    if length != _RUNTIME_HEADER + runtime_size or size != end:
        _refuse("azure.report.length", "The HCL report's lengths contradict each other.")
    if end > len(data) or any(data[end:]):
        _refuse("azure.report.length", "The HCL report is cut short, or has bytes after its end.")
    return HclReport(kind, data[_HEADER:start], data[start + _RUNTIME_HEADER : end])


def parse_runtime(data: bytes) -> RuntimeData:
    """Members that are not named above are passed over: the hardware vouches for the exact bytes, not for their schema.

    Raises: MalformedEvidence unless there is exactly one RSA key "HCLAkPub" of at least 2048 bits.
    """
    fields = load_object(data, max_bytes=MAX_ITEM, what="runtime")
    keys, settings = fields.get("keys"), fields.get("vm-configuration", {})
    if not isinstance(keys, list) or not 0 < len(keys) <= _MAX_KEYS or not isinstance(settings, dict):
        _refuse("runtime", "The runtime data hold no keys, or no settings.")
    found = [key for key in keys if isinstance(key, dict) and key.get("kid") == _AK]
    if len(found) != 1:
        _refuse("runtime.keys", "The runtime data hold not exactly one attestation key.", got=str(len(found)))
    configuration = MappingProxyType({ascii(name)[1:-1][:64]: _setting(value) for name, value in settings.items()})
    return RuntimeData(_rsa_key(found[0]), _user_data(fields.get("user-data")), configuration)


def _refuse(step: str, message: str, got: str | None = None) -> NoReturn:
    raise MalformedEvidence(message, step=step, got=got)


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ascii(value)[:128] if not isinstance(value, str) else ascii(value)[1:-1][:128]


def _user_data(value: object) -> bytes:
    try:
        data = bytes.fromhex(value) if isinstance(value, str) and len(value) == 2 * _USER_DATA else b""
    except ValueError as error:
        raise MalformedEvidence(
            "The runtime data's user data are not hexadecimal.", step="runtime.user-data"
        ) from error
    if len(data) != _USER_DATA:
        _refuse("runtime.user-data", "The runtime data's user data are not 64 bytes.")
    return data


def _rsa_key(jwk: Mapping[str, object]) -> rsa.RSAPublicKey:
    """RFC 7518, section 6.3.1."""
    e, n = jwk.get("e"), jwk.get("n")
    if jwk.get("kty") != "RSA" or not isinstance(e, str) or not isinstance(n, str):
        _refuse("runtime.keys", "The runtime data's attestation key is not an RSA key.")
    exponent, modulus = (int.from_bytes(from_b64url(text, what="runtime.keys"), "big") for text in (e, n))
    if modulus.bit_length() not in _RSA_BITS or exponent != 65537:
        _refuse("runtime.keys", "The runtime data's attestation key has an unusual size.", str(modulus.bit_length()))
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise MalformedEvidence("The runtime data's attestation key is not one.", step="runtime.keys") from error
