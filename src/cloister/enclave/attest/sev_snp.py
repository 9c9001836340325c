"""An AMD SEV-SNP guest as a source of evidence: its report, the host's certificates, and HOST_DATA."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from cloister.enclave.attest.device import Device
from cloister.enclave.attest.launch import check_question, refuse_launch, register_holds
from cloister.enclave.attest.sev_guest import DEVICE, read_extended_report
from cloister.enclave.attest.tsm import SEV_GUEST, ConfigfsTsm
from cloister.errors import MalformedEvidence
from cloister.evidence.binding import REPORT_DATA_SIZE
from cloister.evidence.document import Item
from cloister.evidence.endorsements import Endorsements
from cloister.evidence.sev_snp import Report, parse_certificate_table, parse_report

__all__ = ["SevSnp", "snp_endorsements"]


@dataclass(frozen=True, slots=True)
class SevSnp:
    """An `EvidenceSource`. Blocking; safe to call from several threads."""

    device: Device
    tsm: ConfigfsTsm
    path: str = DEVICE
    platform: str = field(default="sev-snp", init=False)

    def fix_launch(self, launch: bytes) -> None:
        """HOST_DATA is SHA-256(launch), set when the guest is made and never from inside. Raises: NotTrusted when it is
        another."""
        if not register_holds(held := self._host_data(), hashlib.sha256(launch).digest()):
            raise refuse_launch("HOST_DATA", held, "Start the guest with this launch config's SHA-256 as host-data.")

    def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
        """`cpu`, a report over exactly 64 bytes at VMPL 0; `endorsements` where the host's table holds any. `nonce` is in
        `report_data` already; SNP has no field for it.

        Raises: WrongUse, ConnectionFailed, NotTrusted, MalformedEvidence.
        """
        check_question(report_data, nonce)
        report, table = self._report(report_data)
        items = {"cpu": Item("application/octet-stream", report.encoded)}
        found = snp_endorsements(table, report.signing_key)
        return items if found == Endorsements() else {**items, "endorsements": found.item()}

    def _host_data(self) -> bytes:
        """From a report over 64 zero bytes, which binds nothing and so proves nothing to anybody else."""
        return self._report(bytes(REPORT_DATA_SIZE))[0].host_data

    def _report(self, report_data: bytes) -> tuple[Report, bytes]:
        if self.device.exists(self.tsm.root):
            answer = self.tsm.report(report_data, provider=SEV_GUEST, privilege_level=0)
            encoded, table = answer.outblob, answer.auxblob
        else:
            encoded, table = read_extended_report(self.device, report_data, path=self.path)
        report = parse_report(encoded)
        if report.report_data != report_data:
            raise MalformedEvidence("The firmware's report answers another question.", step="attest")
        return report, table


def snp_endorsements(table: bytes, signing_key: int) -> Endorsements:
    """The host's chain, as much of it as there is, and its revocation list.

    A host's table that cannot be read is no evidence of anything: it is passed over, as one that is absent.
    """
    try:
        found = parse_certificate_table(table)
    except MalformedEvidence:
        return Endorsements()
    return Endorsements(amd=found.chain(signing_key), amd_crl=found.crl)
