"""An Azure of our own: runtime data, HCL reports, and hardware appraisals as their verifiers would give them."""

import base64
import hashlib
import json
import struct
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa

from cloister.evidence.azure import SNP
from cloister.verify.factors import Factor, passed
from cloister.verify.platform import Appraisal, Expiry, TcbLevel

USER_DATA = bytes(range(64))


def jwk(key: rsa.RSAPublicKey, kid: str = "HCLAkPub") -> dict[str, Any]:
    def number(value: int) -> str:
        data = value.to_bytes((value.bit_length() + 7) // 8, "big")
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    numbers = key.public_numbers()
    return {"kid": kid, "key_ops": ["sign"], "kty": "RSA", "e": number(numbers.e), "n": number(numbers.n)}


def runtime(key: rsa.RSAPublicKey, **changes: Any) -> bytes:
    members = {
        "keys": [jwk(key), jwk(key, "HCLEkPub")],
        "vm-configuration": {"console-enabled": False, "secure-boot": True, "tpm-enabled": True, "vmUniqueId": "A-1"},
        "user-data": USER_DATA.hex().upper(),
    }
    return json.dumps({**members, **changes}, separators=(",", ":")).encode()


def hcl(
    hardware: bytes, runtime_data: bytes, *, kind: int = SNP, version: int = 1, size: int = 2600, hash_id: int = 1
) -> bytes:
    total = 32 + 1184 + 20 + len(runtime_data)
    header = struct.pack("<4sIIII12x", b"HCLA", version, total, 2, 0)
    inner = struct.pack("<IIIII", 20 + len(runtime_data), 1, kind, hash_id, len(runtime_data))
    return (header + hardware.ljust(1184, b"\0") + inner + runtime_data).ljust(size, b"\0")


def hardware(runtime_data: bytes, *factors: Factor, platform: str = "sev-snp") -> Appraisal:
    """A genuine report over `runtime_data`, unless told otherwise."""
    return Appraisal(
        platform=platform,
        simulated=False,
        report_data=hashlib.sha256(runtime_data).digest() + bytes(32),
        launch_sha256=bytes(32),
        measurement=MappingProxyType({"measurement": "ab" * 48}),
        engine=None,
        platform_id="cd" * 64,
        factors=factors or (passed("evidence.signature", "ECDSA P-384"),),
        tcb=TcbLevel("UpToDate"),
        expiries=(Expiry("VCEK", 1.0),),
        counters=MappingProxyType({"amd-crl": 4}),
    )
