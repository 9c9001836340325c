"""What every platform's verifier gives back: the same few values, whatever the hardware."""

from collections.abc import Mapping
from dataclasses import dataclass

from cloister.verify.factors import Factor

__all__ = ["Appraisal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Appraisal:
    """Values as the platform's report has them; to be believed only when no factor failed.

    `report_data` 64 bytes; `launch_sha256` 32 bytes from the hardware's own field; `measurement` component -> value;
    `engine` the measured engine libraries as "sha256:…", None where the platform measures them only inside an image;
    `platform_id` names this very machine.
    """

    platform: str
    simulated: bool
    report_data: bytes
    launch_sha256: bytes
    measurement: Mapping[str, str]
    engine: str | None
    platform_id: str
    factors: tuple[Factor, ...]
