"""A synthetic AWS: Nitro attestation documents under a throw-away root, whole or wrong in one place."""

from functools import cache
from typing import Any

import cbor2
from cryptography.hazmat.primitives.asymmetric import ec
from tests.vendors.p384 import DAY, NOW, Issued, Link, issue, raw_signature

from cloister.evidence.nitro import launch_pcr

LAUNCH = b'{"v":1}'
NONCE = bytes(range(32))
USER_DATA = bytes(range(64, 128))

LINKS = (
    Link("aws.nitro-enclaves", valid=(1000 * DAY, 9000 * DAY)),
    Link("regional", path_length=2, valid=(10 * DAY, 10 * DAY)),
    Link("zonal", path_length=1, valid=(3 * DAY, 3 * DAY)),
    Link("i-0123456789abcdef0", path_length=0),
    Link("i-0123456789abcdef0-enc0123456789abcdef", ca=False, valid=(60.0, 10_800.0)),
)
ROOT, REGIONAL, ZONAL, INSTANCE, ENCLAVE = range(5)


@cache
def nitro() -> Issued:
    """The genuine one, made once."""
    return issue(LINKS)


def pcrs(**changed_pcrs: bytes) -> dict[int, bytes]:
    """As a production enclave has them: code, then zeros, then the locked launch register. `pcr0=…` replaces one."""
    values = {at: bytes([at + 1]) * 48 if at < 5 else bytes(48) for at in range(16)} | {16: launch_pcr(LAUNCH)}
    return values | {int(name.removeprefix("pcr")): value for name, value in changed_pcrs.items()}


def fields(issued: Issued, **changes: Any) -> dict[str, Any]:
    """The payload's map in AWS's order; `changes` replaces members, or adds them."""
    return {
        "module_id": "i-0123456789abcdef0-enc0123456789abcdef",
        "digest": "SHA384",
        "timestamp": int(NOW * 1000),
        "pcrs": pcrs(),
        "certificate": issued.ders[-1],
        "cabundle": list(issued.ders[:-1]),
        "public_key": None,
        "user_data": USER_DATA,
        "nonce": NONCE,
    } | changes


def sign(
    payload: bytes, key: ec.EllipticCurvePrivateKey, *, protected: bytes = b"\xa1\x01\x38\x22", unprotected: Any = None
) -> bytes:
    signature = raw_signature(key, cbor2.dumps(["Signature1", protected, b"", payload]))
    return cbor2.dumps([protected, {} if unprotected is None else unprotected, payload, signature])


def document(issued: Issued | None = None, *, key: ec.EllipticCurvePrivateKey | None = None, **changes: Any) -> bytes:
    """A whole attestation document, by the last of `issued`, or by another `key`."""
    issued = issued or nitro()
    return sign(cbor2.dumps(fields(issued, **changes)), key or issued.keys[-1])
