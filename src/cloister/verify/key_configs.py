"""The frame of `application/ohttp-keys` (RFC 9458, section 3): u16 length, config, again. Of a config, its KEM alone."""

from collections.abc import Iterator

from cloister.errors import MalformedEvidence

__all__ = ["X_WING", "X_WING_PUBLIC", "config_kems"]

X_WING = 0x647A
"""X25519 and ML-KEM-768 together (draft-connolly-cfrg-xwing-kem)."""

X_WING_PUBLIC = 1216
"""Bytes of such a public key."""

MIN_CONFIG = 41
"""key id, KEM, the shortest public key (X25519), the length of the suites, one suite."""


def config_kems(ohttp_keys: bytes) -> tuple[int, ...]:
    """The KEM of each key config; the configs fill `ohttp_keys` exactly, at least one. Raises: MalformedEvidence."""
    kems = tuple(_kems(ohttp_keys))
    if not kems:
        raise MalformedEvidence("The statement holds no key config.", step="keys")
    return kems


def _kems(ohttp_keys: bytes) -> Iterator[int]:
    position = 0
    while position < len(ohttp_keys):
        length = int.from_bytes(ohttp_keys[position : position + 2], "big")
        config = ohttp_keys[position + 2 : position + 2 + length]
        position += 2 + length
        if length < MIN_CONFIG or position > len(ohttp_keys):
            raise MalformedEvidence("The key configs do not fill their frame.", step="keys")
        yield int.from_bytes(config[1:3], "big")
