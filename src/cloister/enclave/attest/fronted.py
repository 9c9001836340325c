"""A confidential VM with a TPM in front: the CPU's evidence first, then the TPM's quote over it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cloister.enclave.attest.sev_snp import SevSnp
from cloister.enclave.attest.tdx import Tdx
from cloister.enclave.attest.tpm import Vtpm
from cloister.evidence.document import Item

__all__ = ["FrontedByTpm"]


@dataclass(frozen=True, slots=True)
class FrontedByTpm:
    """An `EvidenceSource`. The launch config stands in the CPU's own field; the TPM adds what booted."""

    cpu: Tdx | SevSnp
    tpm: Vtpm

    @property
    def platform(self) -> str:
        return self.cpu.platform

    def fix_launch(self, launch: bytes) -> None:
        self.cpu.fix_launch(launch)

    def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
        """The CPU's items, then `tpm` over SHA-256 of `cpu`'s exact bytes; `eventlog` is the TPM's, or
        none: verifiers replay it into PCRs."""
        items = self.cpu.collect(report_data, nonce=nonce)
        quoted = self.tpm.collect_over(hashlib.sha256(items["cpu"].content).digest())
        return {**{label: item for label, item in items.items() if label != "eventlog"}, **quoted}
