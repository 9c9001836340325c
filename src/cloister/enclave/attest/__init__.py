"""Collect evidence from the hardware: one driver per platform behind one seam."""

from collections.abc import Mapping
from typing import Protocol

from cloister.evidence.document import Item

__all__ = ["EvidenceSource", "GpuSource"]


class EvidenceSource(Protocol):
    """A platform's driver. Making evidence can take a second; callers rate-limit and never cache across nonces."""

    @property
    def platform(self) -> str:
        """One of `cloister.verify.policy.PLATFORMS`."""

    def fix_launch(self, launch: bytes) -> None:
        """Makes the hardware's own field hold this launch config (exact bytes), where that is done from inside, and
        compares it everywhere. Raises: NotTrusted when the field holds another, and cannot be changed."""

    def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
        """Evidence over exactly 64 bytes, as items of the attestation document (`cpu`, `endorsements`, …). `nonce`: the
        client's, which is in `report_data` already, for a platform with a field of its own for it."""


class GpuSource(Protocol):
    """The driver of the GPUs beside a platform."""

    def collect(self, nonce: bytes) -> Mapping[str, Item]:
        """`gpu-0`, `gpu-1`, … over PROTOCOL's gpu_nonce (32 bytes)."""
