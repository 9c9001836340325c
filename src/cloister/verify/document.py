"""The verification itself. (The steps follow; until then nothing is trusted.)"""

from cloister.errors import VerificationFailed
from cloister.evidence.document import Document
from cloister.verify.policy import Policy
from cloister.verify.verified import Verified

__all__ = ["verify"]


def verify(document: Document, *, policy: Policy, nonce: bytes, now: float) -> Verified:
    raise VerificationFailed("Nothing is verified yet.", step="platform")
