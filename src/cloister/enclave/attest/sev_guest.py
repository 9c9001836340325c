"""/dev/sev-guest: an SEV-SNP report by ioctl, for kernels without configfs-tsm, with the host's certificates.

Source: the kernel's include/uapi/linux/sev-guest.h and Documentation/virt/coco/sev-guest.rst; AMD 56860, table
"MSG_REPORT_RSP"; AMD 56421, section 4.1.8.1 (why the first answer may be that the certificates need more room).
"""

import ctypes
import errno
import struct
import threading

from cloister.enclave.attest.device import Device, iowr, opened, said_by_hardware
from cloister.enclave.attest.launch import check_question
from cloister.errors import ConnectionFailed, MalformedEvidence
from cloister.evidence.sev_snp import REPORT_SIZE

__all__ = ["DEVICE", "read_extended_report"]

DEVICE = "/dev/sev-guest"

_MESSAGE_VERSION = 1
_VMPL = 0
_REQUEST = struct.Struct("<64sI28x")  # struct snp_report_req
_CERTIFICATES = struct.Struct("<QI4x")  # what struct snp_ext_report_req adds to it
_IOCTL = struct.Struct("<B7xQQQ")  # struct snp_guest_request_ioctl
_RESPONSE_SIZE = 4000  # struct snp_report_resp
_RESPONSE = struct.Struct("<II24x")  # status, report size; then the report

_GET_REPORT = iowr(ord("S"), 0, _IOCTL.size)
_GET_EXT_REPORT = iowr(ord("S"), 2, _IOCTL.size)

_ENTRY = struct.Struct("<16sII")  # of the certificate table: GUID, offset, length

_PAGE = 4096
_FIRST_ROOM = 4 * _PAGE
"""As much as Linux passes on (SEV_FW_BLOB_MAX_SIZE)."""
_MAX_ROOM = 16 * _PAGE
_ATTEMPTS = 3
_INVALID_LENGTH = 1
"""SNP_GUEST_VMM_ERR_INVALID_LEN, in the upper half of exitinfo2: `certs_len` then says how much is needed."""

_LOCK = threading.Lock()
"""The firmware takes one question at a time and numbers them; the kernel waits, and so do we, in front of it."""

_HINTS = {
    errno.ENOENT: "This is no SEV-SNP guest, or its kernel lacks the sev-guest driver (Linux 5.19 and later).",
    errno.EACCES: "/dev/sev-guest is root's, or belongs to whom it was given.",
    errno.EPERM: "/dev/sev-guest is root's, or belongs to whom it was given.",
    errno.ENOTTY: "The kernel gave up its key to the firmware after an error: only a new start of the VM helps.",
    errno.ETIMEDOUT: "The host throttles attestation: wait a minute.",
    errno.EIO: "The host or the firmware refused the request; the kernel's log has its number.",
}


class _NeedsRoom(Exception):  # noqa: N818 - an answer, no error
    def __init__(self, room: int) -> None:
        super().__init__(room)
        self.room = room


def read_extended_report(device: Device, report_data: bytes, *, path: str = DEVICE) -> tuple[bytes, bytes]:
    """The report over exactly 64 bytes at VMPL 0, and the host's certificate table (b"" where it gives none).

    (1) SNP_GET_EXT_REPORT with room for the certificates
    (2) where the host wants more, once more with what it asked for, as far as that is reasonable
    (3) where that cannot be, SNP_GET_REPORT: a report without certificates is worth as much, they are public

    Raises: WrongUse for another size; ConnectionFailed; MalformedEvidence for an answer to another question.
    """
    check_question(report_data)
    with _LOCK, said_by_hardware("Asking for a report", hints=_HINTS), opened(device, path, "rw") as handle:
        room = _FIRST_ROOM
        for _ in range(_ATTEMPTS):
            try:
                return _ask(device, handle, report_data, room)  # (1)
            except _NeedsRoom as needs:
                if not room < needs.room <= _MAX_ROOM or needs.room % _PAGE:
                    break
                room = needs.room  # (2)
            except OSError as error:
                if error.errno != errno.EINVAL or room == _FIRST_ROOM:
                    raise
                break
        return _ask(device, handle, report_data, 0)  # (3)


def _ask(device: Device, handle: int, report_data: bytes, room: int) -> tuple[bytes, bytes]:
    """One request; `room` 0 asks without certificates. The buffers live until the kernel has answered."""
    certificates = ctypes.create_string_buffer(room or 1)
    asked = _REQUEST.pack(report_data, _VMPL)
    if room:
        asked += _CERTIFICATES.pack(ctypes.addressof(certificates), room)
    request = ctypes.create_string_buffer(asked, len(asked))
    response = ctypes.create_string_buffer(_RESPONSE_SIZE)
    argument = bytearray(_IOCTL.pack(_MESSAGE_VERSION, ctypes.addressof(request), ctypes.addressof(response), 0))
    try:
        device.ioctl(handle, _GET_EXT_REPORT if room else _GET_REPORT, argument)
    except OSError as error:
        exit_info = _IOCTL.unpack(argument)[3]
        if room and error.errno == errno.EIO and exit_info >> 32 == _INVALID_LENGTH:
            raise _NeedsRoom(_CERTIFICATES.unpack_from(request.raw, _REQUEST.size)[1]) from error
        raise
    return _report(response.raw, report_data), _trimmed(certificates.raw) if room else b""


def _report(response: bytes, report_data: bytes) -> bytes:
    status, size = _RESPONSE.unpack_from(response)
    if status:
        raise ConnectionFailed("The firmware made no report.", step="attest", got=f"status {status:#x}")
    report = response[_RESPONSE.size : _RESPONSE.size + size]
    if size != REPORT_SIZE or report[0x50:0x90] != report_data:
        raise MalformedEvidence("The firmware's report has another length, or answers another question.", step="attest")
    return report


def _trimmed(table: bytes) -> bytes:
    """As far as its entries reach; b"" for a table without any. Entries that reach further are for its parser to refuse."""
    end = 0
    for at in range(0, len(table) - _ENTRY.size + 1, _ENTRY.size):
        guid, offset, length = _ENTRY.unpack_from(table, at)
        if not any(guid) and not offset and not length:
            return table[: max(end, at + _ENTRY.size)] if at else b""
        end = max(end, offset + length)
    return table
