"""What a network namespace does not hold back is forbidden by a filter in front of the kernel (seccomp, classic BPF): sockets
of other families than a namespace has, vsock above all, by which a virtual machine reaches its host; and io_uring, which
makes sockets without a call that could be looked at.
"""

import ctypes
import errno
import os
import platform
import socket
import struct

__all__ = ["forbid_other_sockets"]

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF: LD|W|ABS, JMP|JEQ|K, JMP|JGE|K, RET|K
_NUMBER, _ARCHITECTURE, _FIRST = 0, 4, 16  # offsets in struct seccomp_data; of the first argument the low half
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_MACHINES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""AUDIT_ARCH and the number of socket(2)."""
_IO_URING_SETUP = 425
_OTHER_ABI = 0x40000000  # x32's calls, under other numbers
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def forbid_other_sockets() -> None:
    """For this thread and what it starts, for good; what is forbidden fails with EACCES. Wants `no_new_privs`.

    Raises: OSError, also on a machine whose calls are not known here.
    """
    known = _MACHINES.get(platform.machine())
    if known is None:
        raise OSError(errno.ENOSYS, "no filter for this machine")
    code = _filter(*known)
    program = _Program(len(code) // 8, code)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def _filter(architecture: int, socket_call: int) -> bytes:
    families = [(_EQUAL, len(_FAMILIES) - at, 0, int(family)) for at, family in enumerate(_FAMILIES)]
    steps = (
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _OTHER_ABI),
        (_RETURN, 0, 0, _KILL),
        (_EQUAL, len(families) + 2, 0, _IO_URING_SETUP),
        (_EQUAL, 0, len(families) + 2, socket_call),
        (_LOAD, 0, 0, _FIRST),
        *families,
        (_RETURN, 0, 0, _ERRNO | errno.EACCES),
        (_RETURN, 0, 0, _ALLOW),
    )
    return b"".join(struct.pack("HBBI", *step) for step in steps)
