"""What the 64 bytes inside a hardware report stand for (PROTOCOL, "Attestation document")."""

import hashlib
from collections.abc import Sequence

from cloister.errors import MalformedEvidence

__all__ = ["NONCE_SIZES", "REPORT_DATA_SIZE", "gpu_nonce", "report_data"]

NONCE_SIZES = (0, 32)
REPORT_DATA_SIZE = 64

_REPORT = b"cloister/attest/v1\0"
_GPU = b"cloister/gpu/v1\0"


def _nonce_and_statement(nonce: bytes, statement: bytes) -> bytes:
    if len(nonce) not in NONCE_SIZES:
        raise MalformedEvidence("A nonce has 0 or 32 bytes.", step="nonce", expected="0 or 32", got=str(len(nonce)))
    return bytes([len(nonce)]) + nonce + hashlib.sha256(statement).digest()


def gpu_nonce(nonce: bytes, statement: bytes) -> bytes:
    """32 bytes: the challenge given to every GPU. `statement` is its exact bytes. Raises: MalformedEvidence."""
    return hashlib.sha256(_GPU + _nonce_and_statement(nonce, statement)).digest()


def report_data(nonce: bytes, statement: bytes, gpu_evidence: Sequence[bytes] = ()) -> bytes:
    """64 bytes: SHA-512 over the nonce, the statement's digest and the digest of all GPU evidence.

    `statement` is its exact bytes; `gpu_evidence` the contents of `gpu-0`, `gpu-1`, … in that order, each prefixed with
    its length as u32 big-endian before it is hashed. Raises: MalformedEvidence for a nonce of another size.
    """
    gpus = hashlib.sha256(b"".join(len(item).to_bytes(4, "big") + item for item in gpu_evidence)).digest()
    return hashlib.sha512(_REPORT + _nonce_and_statement(nonce, statement) + gpus).digest()
