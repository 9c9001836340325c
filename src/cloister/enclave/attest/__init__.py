"""Collect evidence from the hardware: one driver per platform behind one seam."""

from collections.abc import Mapping
from typing import Protocol

from cloister.evidence.document import Item

__all__ = ["EvidenceSource"]


class EvidenceSource(Protocol):
    """A platform's driver. Making evidence can take a second; callers rate-limit and never cache across nonces."""

    @property
    def platform(self) -> str:
        """ "sim", and later "sgx", "tdx", "sev-snp", "nitro", "azure-…", "vtpm"."""

    def launch_sha256(self) -> bytes:
        """The 32-byte launch digest that stands in the hardware's own field, for the enclave's self-check."""

    def collect(self, report_data: bytes) -> Mapping[str, Item]:
        """Evidence over exactly 64 bytes, as items of the attestation document (`cpu`, `endorsements`, …)."""
