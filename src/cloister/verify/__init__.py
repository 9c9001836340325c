"""Whether we believe it: pure judgement over evidence, a policy and a time. Returns a frozen `Verified` or raises."""

from cloister.verify.document import verify
from cloister.verify.factors import Factor
from cloister.verify.policy import Limits, Policy, Tcb, parse_policy
from cloister.verify.verified import Verified, VerifiedPeer, VerifiedProvision

__all__ = [
    "Factor",
    "Limits",
    "Policy",
    "Tcb",
    "Verified",
    "VerifiedPeer",
    "VerifiedProvision",
    "parse_policy",
    "verify",
]
