"""What every platform's verifier gives back: the same few values, whatever the hardware."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cloister.verify.factors import Factor

__all__ = ["ISSUED", "Appraisal", "Expiry", "TcbLevel"]

ISSUED = "-issued"
"""How the name of a counter ends that is a date of issue (Unix seconds), not a number."""


@dataclass(frozen=True, slots=True)
class TcbLevel:
    """How the vendor rates the platform's firmware: `status` in the vendor's word ("UpToDate", …), `advisories` its
    open security advisories, `date` (Unix seconds) of the firmware it was last in step with, None where not said."""

    status: str
    advisories: tuple[str, ...] = ()
    date: float | None = None


@dataclass(frozen=True, slots=True)
class Expiry:
    """Something that this verification rests on, and when (Unix seconds) it is over."""

    what: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Appraisal:
    """Values as the platform's report has them; to be believed only when no factor failed.

    `report_data` 64 bytes, 32 where the platform has room for no more; `launch_sha256` 32 bytes from the hardware's own
    field, b"" where that field holds something else, None where only the measurement covers the launch config;
    `measurement` component -> value, lower-case hexadecimal or a decimal number; `engine` the measured engine libraries
    as "sha256:…", None where the platform measures them only inside an image; `platform_id` names this very machine.
    `expiries`: what ends when. `counters`: numbers that only ever grow (collateral, revocation lists), by name.
    """

    platform: str
    simulated: bool
    report_data: bytes
    launch_sha256: bytes | None
    measurement: Mapping[str, str]
    engine: str | None
    platform_id: str
    factors: tuple[Factor, ...]
    tcb: TcbLevel | None = None
    expiries: tuple[Expiry, ...] = ()
    counters: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
