"""A receipt: what an enclave signs about one answer, so that its asker can keep a proof of which model gave it.

A compact JWS (RFC 7515) with EdDSA (RFC 8037) by the statement's `receipt_key`. Contents stand in it as salted digests:
it tells nobody what was asked, and only who has both contents and the salt can show what it is about.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloister.errors import MalformedEvidence, NotTrusted
from cloister.evidence.strict_json import Fields, b64url, from_b64url, load_object

__all__ = [
    "COMMENT",
    "SALT_LENGTH",
    "Delivered",
    "Receipt",
    "find_comment",
    "open_receipt",
    "parse_delivered",
    "salted",
]

SALT_LENGTH = 32
MAX_RECEIPT = 8 * 1024
COMMENT = b": cloister-receipt "
"""How the last comment of an event stream begins that holds a receipt: then the JWS, a space, the salt in base64url."""

_HEADER = {"alg": "EdDSA", "typ": "cloister-receipt+jws"}
_LINE = re.compile(rb"^: cloister-receipt ([!-~]+ [!-~]+)\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Receipt:
    """`request_sha256` and `response_sha256`: hex SHA-256 of salt and content, the response's up to where the receipt
    begins. `models`: hex digests of those that the statement names. `iat`: Unix seconds by the host's clock, no proof of
    time."""

    request_sha256: str
    response_sha256: str
    models: tuple[str, ...]
    statement_sha256: str
    iat: int

    def sign(self, sign: Callable[[bytes], bytes]) -> str:
        """The compact JWS. `sign` gives Ed25519's signature (64 bytes) of its bytes."""
        members = {
            "v": 1,
            "request_sha256": self.request_sha256,
            "response_sha256": self.response_sha256,
            "models": list(self.models),
            "statement_sha256": self.statement_sha256,
            "iat": self.iat,
        }
        signed = ".".join(b64url(json.dumps(part, separators=(",", ":")).encode()) for part in (_HEADER, members))
        return f"{signed}.{b64url(sign(signed.encode()))}"


@dataclass(frozen=True, slots=True)
class Delivered:
    """A receipt and its salt (32 bytes), as they came with an answer. Nothing about them is checked yet."""

    jws: str
    salt: bytes


def salted(salt: bytes, content: bytes) -> str:
    return hashlib.sha256(salt + content).hexdigest()


def parse_delivered(text: str) -> Delivered:
    """JWS and salt with one space between them. Raises: MalformedEvidence."""
    jws, _, salt = text.partition(" ")
    raw = from_b64url(salt, what="salt")
    if len(raw) != SALT_LENGTH:
        raise _malformed("its salt has not 32 bytes")
    return Delivered(jws, raw)


def find_comment(content: bytes) -> tuple[bytes, Delivered]:
    """An event stream's content up to its receipt, and the receipt. Of several the last counts.

    Raises: MalformedEvidence for a stream without one.
    """
    found = list(_LINE.finditer(content))
    if not found:
        raise _malformed("there is none in this answer")
    return content[: found[-1].start()], parse_delivered(found[-1][1].decode("ascii"))


def open_receipt(jws: str, receipt_key: bytes) -> Receipt:
    """What `receipt_key` (32 bytes) signed. Not checked: whose key it is, and what the digests are of.

    Raises: MalformedEvidence; NotTrusted when the signature is not that key's.
    """
    parts = jws.split(".")
    if len(parts) != 3:
        raise _malformed("it is no compact JWS")
    header, payload, signature = (from_b64url(part, what="receipt") for part in parts)
    if load_object(header, max_bytes=256, what="receipt") != _HEADER:
        raise _malformed("it is of another kind")
    try:
        Ed25519PublicKey.from_public_bytes(receipt_key).verify(signature, jws.rpartition(".")[0].encode("ascii"))
    except (InvalidSignature, ValueError):
        raise NotTrusted(
            "The receipt is not signed by this enclave.",
            hint="Another enclave's, or changed. Each start of an enclave has a key of its own.",
            step="receipt.signature",
        ) from None
    return _parse(payload)


def _parse(payload: bytes) -> Receipt:
    fields = Fields(load_object(payload, max_bytes=MAX_RECEIPT, what="receipt"), what="receipt")
    fields.integer("v", low=1, high=1)
    receipt = Receipt(
        request_sha256=fields.sha256("request_sha256"),
        response_sha256=fields.sha256("response_sha256"),
        models=fields.sha256s("models"),
        statement_sha256=fields.sha256("statement_sha256"),
        iat=fields.integer("iat"),
    )
    fields.end()
    return receipt


def _malformed(what: str) -> MalformedEvidence:
    return MalformedEvidence(f"Not a receipt: {what}.", step="receipt")
