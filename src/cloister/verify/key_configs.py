"""The frame of `application/ohttp-keys` (RFC 9458, section 3): u16 length, config, again. Not what stands in them."""

from collections.abc import Iterator

from cloister.errors import MalformedEvidence

__all__ = ["config_lengths"]

MIN_CONFIG = 41
"""key id, KEM, the shortest public key (X25519), the length of the suites, one suite."""


def config_lengths(ohttp_keys: bytes) -> tuple[int, ...]:
    """The lengths of the key configs, which fill `ohttp_keys` exactly; at least one. Raises: MalformedEvidence."""
    lengths = tuple(_lengths(ohttp_keys))
    if not lengths:
        raise MalformedEvidence("The statement holds no key config.", step="keys")
    return lengths


def _lengths(ohttp_keys: bytes) -> Iterator[int]:
    position = 0
    while position < len(ohttp_keys):
        length = int.from_bytes(ohttp_keys[position : position + 2], "big")
        position += 2 + length
        if length < MIN_CONFIG or position > len(ohttp_keys):
            raise MalformedEvidence("The key configs do not fill their frame.", step="keys")
        yield length
