"""Linux's configfs-tsm: one folder per report, the same for TDX and SEV-SNP (kernel 6.7 and later).

Source: the kernel's Documentation/ABI/testing/configfs-tsm-report, drivers/virt/coco/guest/report.c.
"""

import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cloister.enclave.attest.device import Device, read_file, said_by_hardware, write_file
from cloister.enclave.attest.launch import check_question
from cloister.errors import MalformedEvidence, NotTrusted
from cloister.evidence.document import MAX_ITEM

__all__ = ["REPORTS", "SEV_GUEST", "TDX_GUEST", "ConfigfsTsm", "TsmReport"]

REPORTS = "/sys/kernel/config/tsm/report"
TDX_GUEST, SEV_GUEST = "tdx_guest", "sev_guest"

ATTEMPTS = 3
PAUSE = 1.0
"""Seconds before asking again: the quoting service is busy with somebody else's question."""

_MAX_TEXT = 4096
_HINTS = {
    errno.ENOENT: "configfs-tsm needs Linux 6.7, configfs mounted at /sys/kernel/config, and tdx_guest or sev_guest.",
    errno.ENXIO: "No attestation driver is loaded: modprobe tdx_guest, or sev-guest.",
    errno.EACCES: "Reports are made by root, or by whom the folder was given to.",
    errno.EPERM: "Reports are made by root, or by whom the folder was given to.",
    errno.EBUSY: "The quoting service still owes an earlier answer. Try again in a minute.",
    errno.ETIMEDOUT: "The host's quoting service does not answer: ask the operator to look at it.",
    errno.EFBIG: "The report is larger than this kernel allows.",
}


@dataclass(frozen=True, slots=True)
class TsmReport:
    """`outblob` the report or quote; `auxblob` what the provider adds (SEV-SNP: the certificate table), b"" for nothing."""

    provider: str
    outblob: bytes
    auxblob: bytes


@dataclass(frozen=True, slots=True)
class ConfigfsTsm:
    """Blocking, up to half a minute where a quoting service is slow. Safe to call from several threads and processes:
    each report has a folder of its own."""

    device: Device
    root: str = REPORTS
    pause: Callable[[float], None] = time.sleep

    def provider(self) -> str:
        """The driver's name. Makes no report. Raises: ConnectionFailed without configfs-tsm, or without a driver."""
        with said_by_hardware("Asking configfs-tsm", hints=_HINTS), self._entry() as entry:
            return self._text(f"{entry}/provider")

    def report(self, report_data: bytes, *, provider: str, privilege_level: int | None = None) -> TsmReport:
        """A report over exactly 64 bytes, by `provider` and nobody else.

        (1) a folder of our own; its provider is the expected one
        (2) the generation before
        (3) SEV-SNP: the privilege level, which may not lie below the driver's floor
        (4) the 64 bytes; they count once the file is closed
        (5) the report, and what comes with it
        (6) the generation has grown by our own writes and no other
        (7) the folder is removed, whatever happened

        Raises: WrongUse for another size; ConnectionFailed when the kernel or the quoting service fails, after three
        attempts when it is busy; NotTrusted for another provider, another writer or a guest that runs too low;
        MalformedEvidence for an empty report or one over 64 KiB.
        """
        check_question(report_data)
        with said_by_hardware("Making the report", hints=_HINTS):
            for _ in range(ATTEMPTS - 1):
                try:
                    return self._attempt(report_data, provider, privilege_level)
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                self.pause(PAUSE)
            return self._attempt(report_data, provider, privilege_level)

    def _attempt(self, report_data: bytes, provider: str, privilege_level: int | None) -> TsmReport:
        with self._entry() as entry:  # (1) (7)
            found = self._text(f"{entry}/provider")
            if found != provider:
                raise NotTrusted("Another driver makes the reports.", step="attest", expected=provider, got=found)
            before = self._number(f"{entry}/generation")  # (2)
            writes = 1
            if privilege_level is not None:  # (3)
                self._set_level(entry, privilege_level)
                writes += 1
            write_file(self.device, f"{entry}/inblob", report_data)  # (4)
            outblob = read_file(self.device, f"{entry}/outblob", limit=MAX_ITEM)  # (5)
            auxblob = self._auxiliary(entry)
            grown = self._number(f"{entry}/generation") - before  # (6)
            if grown != writes:
                raise NotTrusted(
                    "Another process wrote into this report's folder.",
                    step="attest",
                    expected=f"generation + {writes}",
                    got=f"generation + {grown}",
                    hint="Nothing but the enclave should make reports in this guest.",
                )
            if not outblob:
                raise MalformedEvidence("The kernel's report is empty.", step="attest")
            return TsmReport(found, outblob, auxblob)

    @contextmanager
    def _entry(self) -> Iterator[str]:
        entry = f"{self.root}/cloister-{os.getpid()}-{secrets.token_hex(8)}"
        self.device.mkdir(entry)
        try:
            yield entry
        except BaseException:
            self._remove_quietly(entry)
            raise
        self.device.rmdir(entry)

    def _remove_quietly(self, entry: str) -> None:
        """What went wrong before says more than that the folder could not be removed."""
        try:
            self.device.rmdir(entry)
        except OSError:
            return

    def _set_level(self, entry: str, level: int) -> None:
        floor = self._number(f"{entry}/privlevel_floor")
        if floor > level:
            raise NotTrusted(
                "This guest runs below something that may change it.",
                step="attest",
                expected=f"VMPL {level}",
                got=f"VMPL {floor}",
                hint="A paravisor or SVSM owns VMPL 0 here: its reports are for it to make.",
            )
        write_file(self.device, f"{entry}/privlevel", str(level).encode())

    def _auxiliary(self, entry: str) -> bytes:
        path = f"{entry}/auxblob"
        return read_file(self.device, path, limit=MAX_ITEM) if self.device.exists(path) else b""

    def _number(self, path: str) -> int:
        text = self._text(path)
        if not (text.isascii() and text.isdecimal()):
            raise MalformedEvidence(f"{path.rpartition('/')[2]} is not a number.", step="attest", got=ascii(text)[:32])
        return int(text)

    def _text(self, path: str) -> str:
        """An attribute ends with one line feed."""
        content = read_file(self.device, path, limit=_MAX_TEXT)
        return content.decode("ascii", "replace").removesuffix("\n")
