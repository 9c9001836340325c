"""What the operator sees of an enclave's evidence. Nobody else should believe it: clients verify for themselves."""

import base64
import http.client
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cloister.errors import CloisterError, VerificationFailed
from cloister.evidence.document import MAX_DOCUMENT, parse_document
from cloister.verify import Factor, Policy, verify

__all__ = ["Seen", "look"]

_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Seen:
    """`verdict` at `at` (Unix seconds). `failed`: the names of the steps that failed. `detail`: a line for people."""

    verdict: Literal["trusted", "simulated", "refused", "unseen"]
    at: float
    detail: str = ""
    platform: str = ""
    failed: tuple[str, ...] = ()


def look(port: int, policy: Policy, *, clock: Callable[[], float]) -> Seen:
    """Asks the enclave on this machine's `port` for a document over a fresh nonce, and judges it."""
    nonce = os.urandom(32)
    try:
        document = parse_document(_fetch(port, nonce))
        verified = verify(document, policy=policy, nonce=nonce, now=clock())
    except VerificationFailed as error:
        failed = tuple(
            factor.step for factor in error.factors if isinstance(factor, Factor) and factor.verdict == "fail"
        )
        return Seen("refused", clock(), error.message, failed=failed)
    except CloisterError as error:
        return Seen("refused", clock(), error.message)
    except (OSError, http.client.HTTPException) as error:
        return Seen("unseen", clock(), f"It gave no evidence ({type(error).__name__}).")
    return Seen("simulated" if verified.simulated else "trusted", clock(), platform=verified.platform)


def _fetch(port: int, nonce: bytes) -> bytes:
    text = base64.urlsafe_b64encode(nonce).rstrip(b"=").decode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
    try:
        connection.request("GET", f"/.well-known/cloister-attestation?nonce={text}")
        response = connection.getresponse()
        if response.status != 200:
            raise http.client.HTTPException(f"status {response.status}")
        return response.read(MAX_DOCUMENT + 1)
    finally:
        connection.close()
