"""/dev/tdx_guest: a TD's own report, its registers, and how they are extended.

A TDREPORT is not a quote: it is authenticated by a key of this very processor and believed on no other. Only the host's
quoting enclave makes a quote of it. Linux asks for that through configfs-tsm (6.7 and later); before, a guest could hand
its TDREPORT to the host's quote generation service (QGS) over vsock, which is done here as well.

Sources: the kernel's include/uapi/linux/tdx-guest.h and Documentation/ABI/testing/sysfs-devices-virtual-misc-tdx_guest;
Intel, "TDX Module ABI Specification", TDREPORT_STRUCT; Intel's DCAP library, qgs_msg_lib.h.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from cloister.enclave.attest.device import Device, iowr, opened, read_file, said_by_hardware, write_file
from cloister.enclave.attest.launch import check_question
from cloister.errors import ConnectionFailed, MalformedEvidence
from cloister.evidence.document import MAX_ITEM

__all__ = [
    "DEVICE",
    "MEASUREMENTS",
    "TDREPORT_SIZE",
    "Connection",
    "Registers",
    "extend_rtmr3",
    "parse_tdreport",
    "quote_by_vsock",
    "read_registers",
    "read_tdreport",
]

DEVICE = "/dev/tdx_guest"
MEASUREMENTS = "/sys/class/misc/tdx_guest/measurements"
RTMRS = "/sys/kernel/config/tsm/rtmrs"
"""Kernels of some clouds only; Linux itself has `MEASUREMENTS` (6.16 and later)."""

TDREPORT_SIZE = 1024
REGISTER_SIZE = 48

QGS_PORT = 4050
QGS_TIMEOUT = 30.0

_REPORT_DATA_SIZE = 64
_GET_REPORT0 = iowr(ord("T"), 1, _REPORT_DATA_SIZE + TDREPORT_SIZE)

_TDX_TYPE = 0x81
_REPORT_DATA = slice(128, 192)
_TD_INFO = 512
_MR_CONFIG_ID = slice(_TD_INFO + 64, _TD_INFO + 112)
_RTMR3 = slice(_TD_INFO + 352, _TD_INFO + 400)

_DEVICE_HINTS = {
    errno.ENOENT: "This is no TDX guest, or its kernel lacks the tdx_guest driver (Linux 6.2 and later).",
    errno.EACCES: "/dev/tdx_guest is root's, or belongs to whom it was given.",
    errno.EPERM: "/dev/tdx_guest is root's, or belongs to whom it was given.",
    errno.ENOTTY: "This driver does not know TDX_CMD_GET_REPORT0: Linux 6.2 or later is needed.",
    errno.EIO: "The TDX module refused to make a report.",
}
_EXTEND_HINT = (
    "Put the launch digest into MRCONFIGID when the TD is made, or use Linux 6.16 or later, which can extend RTMR3."
)

_QGS_HEADER = struct.Struct("<HHIII")
_QGS_PARTS = struct.Struct("<II")
_GET_QUOTE_REQ, _GET_QUOTE_RESP = 0, 1
_QGS_HINT = "The host's quote generation service (qgsd) listens on vsock port 4050 only where its operator said so."


@dataclass(frozen=True, slots=True)
class Registers:
    """The two fields that may hold the launch config: 48 bytes each."""

    mr_config_id: bytes
    rtmr3: bytes


class Connection(Protocol):
    """A stream to the quote generation service; a connected socket is one."""

    def sendall(self, data: bytes, /) -> None: ...

    def recv(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


def read_tdreport(device: Device, report_data: bytes, *, path: str = DEVICE) -> bytes:
    """TDX_CMD_GET_REPORT0: 1,024 bytes that name `report_data` (64 bytes).

    Raises: WrongUse for another size; ConnectionFailed; MalformedEvidence for an answer to another question.
    """
    check_question(report_data)
    argument = bytearray(report_data) + bytes(TDREPORT_SIZE)
    with said_by_hardware("Asking for a TDREPORT", hints=_DEVICE_HINTS), opened(device, path, "rw") as handle:
        device.ioctl(handle, _GET_REPORT0, argument)
    report = bytes(argument[_REPORT_DATA_SIZE:])
    if report[0] != _TDX_TYPE or report[_REPORT_DATA] != report_data:
        raise MalformedEvidence("The TDREPORT is of another kind, or answers another question.", step="attest")
    return report


def parse_tdreport(report: bytes) -> Registers:
    """MRCONFIGID and RTMR3 of a TDREPORT. Raises: MalformedEvidence."""
    if len(report) != TDREPORT_SIZE or report[0] != _TDX_TYPE:
        raise MalformedEvidence("This is not a TDREPORT.", step="attest", expected=f"{TDREPORT_SIZE} bytes, type 81")
    return Registers(report[_MR_CONFIG_ID], report[_RTMR3])


def read_registers(device: Device, *, path: str = DEVICE, measurements: str = MEASUREMENTS) -> Registers:
    """From a TDREPORT of this moment, or from sysfs where only that was given to us.

    Raises: ConnectionFailed where there is neither; MalformedEvidence.
    """
    if device.exists(path) or not device.exists(measurements):
        return parse_tdreport(read_tdreport(device, bytes(_REPORT_DATA_SIZE), path=path))
    return Registers(_register(device, f"{measurements}/mrconfigid"), _register(device, f"{measurements}/rtmr3:sha384"))


def extend_rtmr3(device: Device, extension: bytes, *, measurements: str = MEASUREMENTS, rtmrs: str = RTMRS) -> None:
    """One extend, for good: RTMR3 = SHA-384(RTMR3 || extension). `extension` has 48 bytes, a SHA-384 digest.

    Raises: ConnectionFailed where this kernel cannot.
    """
    if len(extension) != REGISTER_SIZE:
        raise MalformedEvidence("RTMR3 is extended by 48 bytes.", step="attest.launch", got=str(len(extension)))
    with said_by_hardware("Extending RTMR3", hint=_EXTEND_HINT):
        if device.exists(f"{measurements}/rtmr3:sha384"):
            write_file(device, f"{measurements}/rtmr3:sha384", extension)
        elif device.exists(rtmrs):
            write_file(device, f"{_rtmr_entry(device, rtmrs)}/digest", extension)
        else:
            raise ConnectionFailed("This kernel cannot extend RTMR3.", step="attest.launch", hint=_EXTEND_HINT)


def _rtmr_entry(device: Device, rtmrs: str) -> str:
    """Such kernels keep one folder per register, made once."""
    for name in device.listdir(rtmrs):
        if read_file(device, f"{rtmrs}/{name}/index", limit=16).strip() == b"3":
            return f"{rtmrs}/{name}"
    entry = f"{rtmrs}/rtmr3-cloister-{os.getpid()}"
    device.mkdir(entry)
    write_file(device, f"{entry}/index", b"3")
    return entry


def _register(device: Device, path: str) -> bytes:
    with said_by_hardware("Reading a TD's register"):
        value = read_file(device, path, limit=REGISTER_SIZE)
    if len(value) != REGISTER_SIZE:
        raise MalformedEvidence("A TD's register has 48 bytes.", step="attest", got=str(len(value)))
    return value


def connect_to_qgs() -> Connection:
    """The host's QGS. Raises: OSError."""
    if not hasattr(socket, "AF_VSOCK"):
        raise OSError(errno.EAFNOSUPPORT, "no vsock")
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        connection.settimeout(QGS_TIMEOUT)
        connection.connect((socket.VMADDR_CID_HOST, QGS_PORT))
    except OSError:
        connection.close()
        raise
    return connection


def quote_by_vsock(tdreport: bytes, *, connect: Callable[[], Connection] = connect_to_qgs) -> bytes:
    """The host's quote of a TDREPORT: GET_QUOTE_REQ, version 1.0, each message behind its length (u32, big-endian).

    Raises: ConnectionFailed where nobody listens, or the service refuses; MalformedEvidence for another answer.
    """
    size = _QGS_HEADER.size + _QGS_PARTS.size + len(tdreport)
    message = _QGS_HEADER.pack(1, 0, _GET_QUOTE_REQ, size, 0) + _QGS_PARTS.pack(len(tdreport), 0) + tdreport
    with said_by_hardware("Asking the host for a quote over vsock", hint=_QGS_HINT), closing(connect()) as connection:
        connection.sendall(size.to_bytes(4, "big") + message)
        answer = _receive(connection, _length(_receive(connection, 4)))
    major, _, kind, said, code = _QGS_HEADER.unpack_from(answer)
    if major != 1 or kind != _GET_QUOTE_RESP or said != len(answer):
        raise MalformedEvidence("The quote generation service answers in another language.", step="attest")
    if code:
        raise ConnectionFailed("The host made no quote.", step="attest", got=f"{code:#x}", hint="qgsd's log says why.")
    id_size, quote_size = _QGS_PARTS.unpack_from(answer, _QGS_HEADER.size)
    start = _QGS_HEADER.size + _QGS_PARTS.size + id_size
    if start + quote_size != len(answer) or not quote_size:
        raise MalformedEvidence("The quote generation service's lengths contradict each other.", step="attest")
    return answer[start:]


def _length(head: bytes) -> int:
    length = int.from_bytes(head, "big")
    if not _QGS_HEADER.size + _QGS_PARTS.size <= length <= MAX_ITEM:
        raise MalformedEvidence("The quote generation service's answer has a wrong length.", step="attest")
    return length


def _receive(connection: Connection, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        more = connection.recv(count - len(received))
        if not more:
            raise ConnectionResetError(errno.ECONNRESET, "closed in the middle of an answer")
        received += more
    return bytes(received)
