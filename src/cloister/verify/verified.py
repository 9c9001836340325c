"""What may be sealed to: proof, in the type, that a verification ended well. A prompt goes to a `Verified`, an owner's
release to a `VerifiedProvision`, a group's secret to a `VerifiedPeer`, and none to another.
"""

import base64
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass
from typing import Any

from cloister.errors import WrongUse
from cloister.evidence.launch import LaunchConfig
from cloister.evidence.statement import Statement
from cloister.verify.factors import Factor
from cloister.verify.platform import Expiry, TcbLevel

__all__ = ["Proof", "Verified", "VerifiedPeer", "VerifiedProvision"]

_ONLY_VERIFY = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Made by `cloister.verify.verify` and by nothing else, as one of its three kinds.

    Digests are 64 lower-case hexadecimal digits, times Unix seconds. `measurement` maps a component's name to its
    value. `ohttp_keys` are the attested key configs, unparsed but for their lengths. `expires_at` is the end of the
    statement's validity, at most one hour after `verified_at`; callers hold it against a monotonic clock of their own.
    `platform_id` names this very machine ("" where nothing does). `tcb` is the vendor's rating of its firmware, None
    where there is none. `expiries`: what this rests on, soonest first. `counters`: numbers that a client should never
    see fall (collateral, revocation lists, "release"). `factors` holds what passed, and what was not checked at all:
    nothing in here failed.
    """

    platform: str
    simulated: bool
    statement: Statement
    statement_sha256: str
    launch: LaunchConfig
    launch_sha256: str
    measurement: Mapping[str, str]
    platform_id: str
    tcb: TcbLevel | None
    expiries: tuple[Expiry, ...]
    counters: Mapping[str, int]
    factors: tuple[Factor, ...]
    ohttp_keys: bytes
    verified_at: float
    expires_at: float
    made_by: InitVar[object]

    def __post_init__(self, made_by: object) -> None:
        if made_by is not _ONLY_VERIFY:
            raise WrongUse(f"Only cloister.verify.verify makes a {type(self).__name__}.", step="verified")

    @property
    def first_use(self) -> bool:
        """The policy was written from a running server, and nobody has compared it yet."""
        return any(factor.step == "trust" for factor in self.factors)

    def to_json(self) -> dict[str, Any]:
        """The verification document: plain data, for `json.dumps`."""
        return {
            "v": 1,
            "verdict": "simulated" if self.simulated else "trusted",
            "platform": self.platform,
            "simulated": self.simulated,
            "first_use": self.first_use,
            "deployment": self.launch.deployment,
            "owner_key": self.launch.owner_key,
            "release": self.launch.release,
            "statement_sha256": self.statement_sha256,
            "launch_sha256": self.launch_sha256,
            "config_sha256": self.launch.config_sha256,
            "measurement": dict(self.measurement),
            "platform_id": self.platform_id,
            "tcb": None if self.tcb is None else asdict(self.tcb),
            "forecast": [{"what": one.what, "at": one.at} for one in self.expiries],
            "counters": dict(self.counters),
            "engine": {"sha256": self.statement.engine.sha256, "variant": self.statement.engine.variant},
            "models": [
                {"name": model.name, "sha256": model.sha256, "quantization": model.quantization}
                for model in self.statement.models
            ],
            "insecure": list(self.statement.insecure),
            "ohttp_keys": base64.b64encode(self.ohttp_keys).decode(),
            "ehbp_key": self.statement.ehbp_key.hex() if self.statement.ehbp_key else None,
            "tls_spki": self.statement.tls_spki,
            "verified_at": self.verified_at,
            "expires_at": self.expires_at,
            "factors": [factor.to_json() for factor in self.factors],
        }


class Verified(Proof):
    """An enclave that serves: what clients seal to."""

    __slots__ = ()


class VerifiedProvision(Proof):
    """An enclave that waits for its owner's release: `ohttp_keys` is empty, and no client can seal to it."""

    __slots__ = ()

    @property
    def provision_key(self) -> bytes:
        """X-Wing, single use; the length was checked."""
        return self.statement.provision_key or b""


class VerifiedPeer(Proof):
    """A replica that speaks to its key group: one that asks to be let in, or a member. No client seals to what is only this."""

    __slots__ = ()

    @property
    def join_key(self) -> bytes | None:
        """Of one that asks to be let in: X-Wing, single use; the length was checked. None of a member."""
        return self.statement.provision_key
