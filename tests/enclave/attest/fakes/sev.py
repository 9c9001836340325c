"""An SEV-SNP guest: its firmware, and /dev/sev-guest with the host's certificates behind it."""

import ctypes
import errno
import struct
from dataclasses import dataclass, field
from functools import cache

from tests.enclave.attest.fakes.kernel import FakeKernel, OpenFile, failure
from tests.enclave.attest.fakes.tsm import FakeTsm
from tests.vendors import amd

from cloister.enclave.attest.sev_guest import DEVICE
from cloister.enclave.attest.tsm import REPORTS

GET_REPORT, GET_EXT_REPORT = 0xC0205300, 0xC0205302  # as the C compiler has them
PAGE = 4096
INVALID_LEN = 1 << 32


@dataclass
class Firmware:
    """`table` is what the host gives beside the report; `room` how much of it the kernel passes on.

    `stale`: every report is over zeros. `grows`: the host always wants a page more.
    """

    host_data: bytes = bytes(32)
    table: bytes = b""
    room: int = 16 * PAGE
    status: int = 0
    error: int = 0
    grows: bool = False
    stale: bool = False
    requests: list[int] = field(default_factory=list)

    def report(self, report_data: bytes, vmpl: int = 0) -> bytes:
        report_data = bytes(64) if self.stale else report_data
        return amd.make(report_data=report_data, vmpl=vmpl, host_data=self.host_data).report


@cache
def genuine() -> amd.Evidence:
    """Made once: AMD's signatures are salted, so that no two are alike."""
    return amd.make()


def whole_table() -> bytes:
    leaf, ask, ark = genuine().chain
    return amd.certificate_table({"ark": ark, "ask": ask, "vcek": leaf})


class _Device(OpenFile):
    def __init__(self, firmware: Firmware) -> None:
        self._firmware = firmware

    def ioctl(self, request: int, argument: bytearray) -> int:
        """The pointers are real: the buffers lie in this process."""
        firmware = self._firmware
        if request not in (GET_REPORT, GET_EXT_REPORT):
            raise failure(errno.ENOTTY)
        if len(argument) != 32:
            raise failure(errno.EFAULT)
        version, asked, answered, _ = struct.unpack("<B7xQQQ", argument)
        if version != 1 or not asked or not answered:
            raise failure(errno.EINVAL)
        report_data, vmpl = struct.unpack("<64sI28x", ctypes.string_at(asked, 96))
        address, length = 0, 0
        if request == GET_EXT_REPORT:
            address, length = struct.unpack("<QI4x", ctypes.string_at(asked + 96, 16))
            if length > firmware.room or length % PAGE:
                raise failure(errno.EINVAL)
        firmware.requests.append(length)
        if firmware.error:
            raise failure(firmware.error)
        if request == GET_EXT_REPORT:
            self._certificates(argument, asked, address, length)
        report = firmware.report(report_data, vmpl)
        answer = struct.pack("<II24x", firmware.status, len(report)) + report
        ctypes.memmove(answered, answer, len(answer))
        return 0

    def _certificates(self, argument: bytearray, asked: int, address: int, length: int) -> None:
        table = self._firmware.table
        needed = -(-len(table) // PAGE) * PAGE
        if self._firmware.grows:
            needed = length + PAGE
        if needed > length:
            ctypes.memmove(asked + 104, struct.pack("<I", needed), 4)
            argument[24:] = struct.pack("<Q", INVALID_LEN)
            raise failure(errno.EIO)
        ctypes.memmove(address, table.ljust(length, b"\0"), length)


def machine(firmware: Firmware, *, tsm: FakeTsm | None = None) -> FakeKernel:
    kernel = FakeKernel(nodes={DEVICE: lambda _: _Device(firmware)})
    if tsm is not None:
        kernel.folders[REPORTS] = tsm
    return kernel


def tsm_of(firmware: Firmware) -> FakeTsm:
    return FakeTsm("sev_guest", lambda data, level: (firmware.report(data, level), firmware.table))
