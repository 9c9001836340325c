"""Where the launch config's digest stands in hardware, and what a register reads that holds it (PROTOCOL, "Launch config")."""

import hashlib
import hmac

from cloister.errors import NotTrusted, WrongUse
from cloister.evidence.binding import NONCE_SIZES, REPORT_DATA_SIZE

__all__ = ["MR_CONFIG_ID_TAIL", "check_question", "extended", "refuse_launch", "register_holds"]

MR_CONFIG_ID_TAIL = bytes(16)
"""TDX: MRCONFIGID has 48 bytes, the launch digest 32."""


def check_question(report_data: bytes, nonce: bytes = b"") -> None:
    """Raises: WrongUse unless `report_data` has 64 bytes, and `nonce` 0 or 32."""
    if len(report_data) != REPORT_DATA_SIZE:
        raise WrongUse("Evidence is over 64 bytes.", step="attest", expected="64", got=str(len(report_data)))
    if len(nonce) not in NONCE_SIZES:
        raise WrongUse("A nonce has 0 or 32 bytes.", step="attest", expected="0 or 32", got=str(len(nonce)))


def extended(algorithm: str, extension: bytes) -> bytes:
    """What a register reads after exactly one extend from zero: H(zeros || extension). `algorithm`: hashlib's name."""
    return hashlib.new(algorithm, bytes(hashlib.new(algorithm).digest_size) + extension).digest()


def register_holds(register: bytes, expected: bytes) -> bool:
    """In constant time; False for another size."""
    return hmac.compare_digest(register, expected)


def refuse_launch(where: str, got: bytes, hint: str = "") -> NotTrusted:
    """The error for a field that is neither empty nor this launch config's. `got` is public: it stands in evidence."""
    return NotTrusted(
        f"{where} does not hold this launch config.",
        step="attest.launch",
        got=got.hex()[:64],
        hint=hint or "Start the machine anew: what was measured once cannot be taken back.",
    )
