"""What a client accepts: one frozen value, from a TOML file or made in code. Absent means strictest."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Limits", "Policy", "Tcb"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tcb:
    """Hardware TCB: statuses tolerated beyond UpToDate, and a floor for Intel's tcbEvaluationDataNumber."""

    tolerate: frozenset[str] = frozenset()
    min_tcb_evaluation_data_number: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`platform_ids` None: any machine. `max_crl_age_days` None: the collateral's own nextUpdate alone."""

    max_crl_age_days: int | None = None
    platform_ids: frozenset[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """`models` and `config` are SHA-256 digests (hex); `simulator_root` is PEM and makes a simulator trusted."""

    deployment: str | None = None
    owner_key: str | None = None
    models: frozenset[str] | None = None
    config: str | None = None
    platforms: tuple[str, ...] | None = None
    measurements: Mapping[str, tuple[Mapping[str, str | int], ...]] = field(default_factory=dict)
    tcb: Tcb = Tcb()
    limits: Limits = Limits()
    simulator_root: bytes | None = None
    tolerate_insecure: frozenset[str] = frozenset()
    trust: str | None = None
