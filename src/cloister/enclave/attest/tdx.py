"""An Intel TDX guest as a source of evidence: its quote, its boot log, and the launch config in its registers."""

import errno
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cloister.enclave.attest.boot_log import CCEL, read_boot_log
from cloister.enclave.attest.device import Device
from cloister.enclave.attest.launch import (
    MR_CONFIG_ID_TAIL,
    check_question,
    extended,
    refuse_launch,
    register_holds,
)
from cloister.enclave.attest.tdx_guest import (
    Connection,
    connect_to_qgs,
    extend_rtmr3,
    quote_by_vsock,
    read_registers,
    read_tdreport,
)
from cloister.enclave.attest.tsm import TDX_GUEST, ConfigfsTsm
from cloister.errors import ConnectionFailed, MalformedEvidence, NotTrusted
from cloister.evidence.document import Item
from cloister.evidence.intel import TEE_TDX, parse_quote

__all__ = ["Tdx"]

_NO_QUOTE = (
    "A TDREPORT alone convinces no other machine. Use Linux 6.7 or later (configfs-tsm), or let the host's qgsd listen "
    "on vsock port 4050."
)


@dataclass(frozen=True, slots=True)
class Tdx:
    """An `EvidenceSource`. Blocking; safe to call from several threads."""

    device: Device
    tsm: ConfigfsTsm
    connect: Callable[[], Connection] = connect_to_qgs
    platform: str = field(default="tdx", init=False)

    def _holds_launch(self, launch: bytes) -> bool:
        """MRCONFIGID is SHA-256(launch) and zeros; or, where it is all zero, RTMR3 is exactly one extend from zero by
        SHA-384(launch)."""
        registers = read_registers(self.device)
        by_config = hashlib.sha256(launch).digest() + MR_CONFIG_ID_TAIL
        by_extend = extended("sha384", hashlib.sha384(launch).digest())
        if any(registers.mr_config_id):
            return register_holds(registers.mr_config_id, by_config)
        return register_holds(registers.rtmr3, by_extend)

    def fix_launch(self, launch: bytes) -> None:
        """Extends RTMR3, unless a register holds this launch config already.

        Raises: NotTrusted where they hold another; ConnectionFailed where this kernel cannot extend.
        """
        if self._holds_launch(launch):
            return
        registers = read_registers(self.device)
        if any(registers.mr_config_id):
            raise refuse_launch("MRCONFIGID", registers.mr_config_id, "Make the TD with this launch config's digest.")
        if any(registers.rtmr3):
            raise refuse_launch("RTMR3", registers.rtmr3)
        extend_rtmr3(self.device, hashlib.sha384(launch).digest())
        if not self._holds_launch(launch):
            raise NotTrusted("Somebody else extended RTMR3 in the same moment.", step="attest.launch")

    def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
        """`cpu`, a version 4 or 5 quote over exactly 64 bytes, cut where it ends; `eventlog` (CCEL) where the firmware
        left one. `nonce` is in `report_data` already; TDX has no field for it.

        Raises: WrongUse, ConnectionFailed, NotTrusted, MalformedEvidence.
        """
        check_question(report_data, nonce)
        encoded = self._quote(report_data)
        quote = parse_quote(encoded)
        if quote.header.tee_type != TEE_TDX or quote.report.report_data != report_data:
            raise MalformedEvidence("The kernel's quote answers another question.", step="attest")
        if quote.trailing:
            raise MalformedEvidence("The quote has bytes after its end.", step="attest")
        items = {"cpu": Item("application/octet-stream", encoded[: len(encoded) - quote.padding])}
        log = read_boot_log(self.device, CCEL)
        return items if log is None else {**items, "eventlog": log}

    def _quote(self, report_data: bytes) -> bytes:
        """Through configfs-tsm; where this kernel has none, by the host's QGS over vsock."""
        if self.device.exists(self.tsm.root):
            return self.tsm.report(report_data, provider=TDX_GUEST).outblob
        tdreport = read_tdreport(self.device, report_data)
        try:
            return quote_by_vsock(tdreport, connect=self.connect)
        except ConnectionFailed as error:
            name = error.got or errno.errorcode[errno.ENOTCONN]
            raise ConnectionFailed(
                "There is a TDREPORT, and nobody to make a quote of it.", step="attest", got=name, hint=_NO_QUOTE
            ) from error
