"""The app's own view of the machine: every file read-only, no device but those that lead nowhere, `/dev/shm` and the
temporary folders in memory and its own, `/run` with the sockets of the machine's services among them, no process but those
that it starts, which end with it, no network but a loopback of its own, no privileges, no core file. Where it may connect to
stands there under its own name, each host at an address of that loopback (`egress`, on the front's side).

Needs Linux and namespaces: as root, or where users may make their own. `confine` does all of it or raises.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from cloister.enclave.pyapp.filter import forbid_other_sockets

__all__ = ["MEMORY", "confine", "die_with_parent", "drop_privileges", "open_ways"]

MEMORY = Path("/dev/shm")  # noqa: S108 (its own, in memory)

_TEMPORARY = (Path("/tmp"), Path("/var/tmp"), Path("/run"))  # noqa: S108 (its own, in memory)
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 0x1000, 0x4000, 1 << 18
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_RDONLY, _NOSUID, _NODEV = 1, 2, 4
_DEVICES = tuple(Path("/dev", name) for name in ("null", "zero", "full", "random", "urandom"))
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_CAPABILITY_VERSION = 0x20080522
_CAPABILITIES = 64
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR, _IFF_UP = 0x8913, 0x8914, 0x8916, 1
_HOSTS = Path("/etc/hosts")
_LOOPBACK = "127."


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def die_with_parent() -> None:
    """The kernel ends this process when the one that started it is gone."""
    _check(_libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def confine(*, memory: int | None) -> None:
    """Before any thread is started. `memory`: MiB that the files in memory may take, all together; None for half of the
    machine's.

    It returns in another process than it was called in. The one that called stands by, and ends when that one does, as it did;
    when it is killed, all of them end.

    Raises: OSError where the kernel does not allow it; nothing may run then.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "no namespaces here")
    _unshare(_NEWNS | _NEWIPC | _NEWNET | _NEWPID)
    _go_on_in_a_child()  # the first process of its own view: when it ends, the kernel ends all others
    die_with_parent()
    libc = _libc()
    _check(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "mount")
    _read_only(libc)
    with contextlib.suppress(OSError):  # containers may forbid it: then it is the machine's own that is read
        flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
        _check(libc.mount(b"proc", b"/proc", b"proc", flags, None), "mount")
    _in_memory(libc, memory)
    _raise_loopback()
    _go_on_in_a_child()  # the first one takes in whatever the app's programs leave behind


def _go_on_in_a_child() -> None:
    """Here, nothing more happens than that its end is waited for."""
    if child := os.fork():
        _stand_by(child)


def _stand_by(child: int) -> NoReturn:
    code = 1
    try:
        drop_privileges()
        os.closerange(0, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        ended = 0
        while ended != child:
            ended, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
    finally:
        os._exit(code if code >= 0 else 1)


def _in_memory(libc: ctypes.CDLL, memory: int | None) -> None:
    """One file system at each place where files may be written, so that there is one limit."""
    size = f"mode=0700,size={memory}m" if memory else "mode=0700"
    flags = _MS_NOSUID | _MS_NODEV
    _check(libc.mount(b"tmpfs", str(MEMORY).encode(), b"tmpfs", flags, size.encode()), "mount")
    interpreter = [Path(path).resolve() for path in (sys.executable, sys.base_prefix)]
    for place in _TEMPORARY:
        hides = any(path.is_relative_to(place) for path in interpreter)
        if place.is_dir() and not hides:
            folder = MEMORY / ("at" + str(place).replace("/", "-"))
            folder.mkdir(mode=0o700)
            _check(libc.mount(str(folder).encode(), str(place).encode(), None, _MS_BIND, None), "mount")


def open_ways(ways: Sequence[tuple[str, int, str]]) -> list[socket.socket]:
    """A listener for each address (IPv4), port and name, which then leads there by that name. After `confine`, and before the
    privileges are dropped. Raises: OSError, also where the machine has no file /etc/hosts that names could be put into.
    """
    beyond = dict.fromkeys(address for address, _, _ in ways if not address.startswith(_LOOPBACK))
    for number, address in enumerate(beyond, 1):
        _add_address(number, address)
    if names := {name: address for address, _, name in ways if name != address}:
        _put_names(names)
    return [socket.create_server((address, port), backlog=128) for address, port, _ in ways]


def _add_address(number: int, address: str) -> None:
    """To this view's loopback: what connects there comes no further than here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sHH4s16x", f"lo:{number}".encode(), socket.AF_INET, 0, socket.inet_aton(address))
        fcntl.ioctl(sock, _SIOCSIFADDR, request)


def _put_names(names: Mapping[str, str]) -> None:
    """Over the machine's /etc/hosts, in this view alone."""
    draft = MEMORY / "hosts"
    lines = ("127.0.0.1 localhost", "::1 localhost", *(f"{address} {name}" for name, address in names.items()))
    draft.write_text("\n".join(lines) + "\n")
    draft.chmod(0o444)
    libc = _libc()
    target = str(_HOSTS).encode()
    _check(libc.mount(str(draft).encode(), target, None, _MS_BIND, None), "mount /etc/hosts")
    _set_attributes(libc, target, 0, _RDONLY | _NOSUID | _NODEV, 0)
    draft.unlink()


def _unshare(flags: int) -> None:
    """As root, or in a user namespace where this user keeps its own number."""
    libc = _libc()
    if libc.unshare(flags) == 0:
        return
    user, group = os.getuid(), os.getgid()
    _check(libc.unshare(_NEWUSER | flags), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _read_only(libc: ctypes.CDLL) -> None:
    """Every mount there is, in this process's view alone; and of the devices those alone that lead nowhere: a read-only
    mount does not keep a disk from being opened, nor what makes the enclave's evidence."""
    devices = [str(device).encode() for device in _DEVICES if device.exists()]
    for device in devices:
        _check(libc.mount(device, device, None, _MS_BIND, None), "mount")
    _set_attributes(libc, b"/", _AT_RECURSIVE, _RDONLY | _NOSUID | _NODEV, 0)
    for device in devices:
        _set_attributes(libc, device, 0, 0, _NODEV)


def _set_attributes(libc: ctypes.CDLL, path: bytes, flags: int, given: int, taken: int) -> None:
    attributes = struct.pack("4Q", given, taken, 0, 0)
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, path, flags, attributes, len(attributes))
    _check(result, "mount_setattr")


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def drop_privileges() -> None:
    """No capability, now or by any program that is started; no core file; no look into it by others of the same user; no
    sockets but those that a namespace holds.

    Raises: OSError.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = _libc()
    for capability in range(_CAPABILITIES):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 and ctypes.get_errno() == errno.EINVAL:
            break  # beyond the last that this kernel knows
    head = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    _check(libc.capset(head, bytes(24)), "capset")
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _check(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    forbid_other_sockets()
