"""The firmware's boot log, where the kernel left it for us."""

import errno

from cloister.enclave.attest.device import Device, read_file, said_by_hardware
from cloister.evidence.document import MAX_LOG, Item

__all__ = ["CCEL", "TPM_LOG", "read_boot_log"]

CCEL = "/sys/firmware/acpi/tables/data/CCEL"
TPM_LOG = "/sys/kernel/security/tpm0/binary_bios_measurements"

_HINTS = {
    errno.EACCES: "The boot log is root's to read.",
    errno.EPERM: "The boot log is root's to read (or a kernel in lockdown refuses it).",
}


def read_boot_log(device: Device, path: str) -> Item | None:
    """None where there is none: registers can then be pinned, not explained.

    The CCEL table is as long as the firmware reserved: zeros, or bytes of 0xff, follow the log. They stay, since whoever
    replays the log finds its end. Raises: ConnectionFailed when it is there and cannot be read; MalformedEvidence over
    1 MiB.
    """
    if not device.exists(path):
        return None
    with said_by_hardware("Reading the boot log", hints=_HINTS):
        content = read_file(device, path, limit=MAX_LOG)
    return Item("application/octet-stream", content) if content else None
