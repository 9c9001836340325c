"""A TDX guest: its module's registers, /dev/tdx_guest, sysfs, the quotes of its host, a quote generation service."""

import errno
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.enclave.attest.fakes.kernel import FakeKernel, Node, OpenFile, Reading, failure
from tests.enclave.attest.fakes.tsm import FakeTsm
from tests.vendors.intel import tdx

from cloister.enclave.attest.boot_log import CCEL
from cloister.enclave.attest.device import Mode
from cloister.enclave.attest.tdx_guest import DEVICE, MEASUREMENTS, RTMRS
from cloister.enclave.attest.tsm import REPORTS

GET_REPORT0 = 0xC4405401  # _IOWR('T', 1, struct tdx_report_req), as the C compiler has it


@dataclass
class TdModule:
    mr_config_id: bytes = bytes(48)
    rtmr: list[bytes] = field(default_factory=lambda: [b"\xa0" * 48, b"\xa1" * 48, b"\xa2" * 48, bytes(48)])

    def extend(self, index: int, data: bytes) -> None:
        self.rtmr[index] = hashlib.sha384(self.rtmr[index] + data).digest()

    def tdreport(self, report_data: bytes) -> bytes:
        mac = bytes([0x81, 0, 0, 0]) + bytes(124) + report_data + bytes(64)
        info = bytes(16) + b"\xd2" * 48 + self.mr_config_id + bytes(96) + b"".join(self.rtmr)
        return (mac + bytes(256) + info).ljust(1024, b"\0")

    def quote(self, report_data: bytes) -> bytes:
        registers = {f"rtmr{at}": value for at, value in enumerate(self.rtmr)}
        return tdx(report={"report_data": report_data, "mr_config_id": self.mr_config_id, **registers}).quote


class _Device(OpenFile):
    def __init__(self, module: TdModule, broken: Callable[[bytes], bytes]) -> None:
        self._module = module
        self._broken = broken

    def ioctl(self, request: int, argument: bytearray) -> int:
        if request != GET_REPORT0:
            raise failure(errno.ENOTTY)
        if len(argument) != 1088:
            raise failure(errno.EFAULT)
        argument[64:] = self._broken(self._module.tdreport(bytes(argument[:64])))
        return 0


class _Register(OpenFile):
    """One write of exactly 48 bytes extends."""

    def __init__(self, module: TdModule, index: int) -> None:
        self._module = module
        self._index = index

    def write(self, data: bytes) -> int:
        if len(data) != 48:
            raise failure(errno.EINVAL)
        self._module.extend(self._index, data)
        return len(data)


@dataclass
class RtmrFolder:
    """The configfs way of some clouds' kernels: one folder per register, `index` set once."""

    module: TdModule
    entries: dict[str, int | None] = field(default_factory=dict)

    def mkdir(self, path: str) -> None:
        self.entries[path] = None

    def rmdir(self, path: str) -> None:
        raise failure(errno.EBUSY, path)

    def listdir(self, path: str) -> tuple[str, ...] | None:
        return tuple(self.entries) if not path else None

    def node(self, path: str) -> Node | None:
        name, _, attribute = path.partition("/")
        if name not in self.entries or attribute not in ("index", "digest"):
            return None
        return lambda mode: self._open(name, attribute, mode)

    def _open(self, name: str, attribute: str, mode: Mode) -> OpenFile:
        index = self.entries[name]
        if attribute == "index":
            return Reading(f"{index}\n".encode()) if mode == "r" else _Index(self, name)
        if index is None:
            raise failure(errno.EINVAL)
        return Reading(self.module.rtmr[index]) if mode == "r" else _Register(self.module, index)


class _Index(OpenFile):
    def __init__(self, folder: RtmrFolder, name: str) -> None:
        self._folder = folder
        self._name = name

    def write(self, data: bytes) -> int:
        if int(data) in self._folder.entries.values():
            raise failure(errno.EBUSY)
        self._folder.entries[self._name] = int(data)
        return len(data)


def measurements(module: TdModule) -> dict[str, Node]:
    """/sys/class/misc/tdx_guest/measurements of Linux 6.16."""

    def register(index: int) -> Node:
        return lambda mode: _Register(module, index) if mode == "w" else Reading(module.rtmr[index])

    nodes: dict[str, Node] = {f"{MEASUREMENTS}/rtmr{index}:sha384": register(index) for index in range(4)}
    nodes[f"{MEASUREMENTS}/mrconfigid"] = lambda _: Reading(module.mr_config_id)
    nodes[MEASUREMENTS] = lambda _: Reading(b"")
    return nodes


def machine(
    module: TdModule,
    *,
    tsm: FakeTsm | None = None,
    device: bool = True,
    sysfs: bool = True,
    configfs_rtmrs: bool = False,
    log: bytes | None = None,
    broken: Callable[[bytes], bytes] = lambda report: report,
) -> FakeKernel:
    """`tsm` None: a kernel before 6.7."""
    kernel = FakeKernel()
    if tsm is not None:
        kernel.folders[REPORTS] = tsm
    if device:
        kernel.nodes[DEVICE] = lambda _: _Device(module, broken)
    if sysfs:
        kernel.nodes |= measurements(module)
    if configfs_rtmrs:
        kernel.folders[RTMRS] = RtmrFolder(module)
    if log is not None:
        kernel.nodes[CCEL] = lambda _: Reading(log)
    return kernel


def tsm_of(module: TdModule) -> FakeTsm:
    return FakeTsm("tdx_guest", lambda data, _: (module.quote(data), b""))


@dataclass
class FakeQgs:
    """A connection to a quote generation service. `piece`: how much one recv gives."""

    module: TdModule
    answer: Callable[[bytes], bytes] | None = None
    piece: int = 1000
    code: int = 0
    closed: bool = False
    _out: bytes = b""

    def sendall(self, data: bytes, /) -> None:
        assert int.from_bytes(data[:4], "big") == len(data) - 4
        major, minor, kind, size, code, report_size, ids = struct.unpack_from("<HHIIIII", data, 4)
        assert (major, minor, kind, size, code, ids) == (1, 0, 0, len(data) - 4, 0, 0)
        report = data[28:]
        assert len(report) == report_size == 1024
        quote = b"" if self.code else self.module.quote(report[128:192])
        message = struct.pack("<HHIIIII", 1, 0, 1, 24 + len(quote), self.code, 0, len(quote)) + quote
        message = self.answer(message) if self.answer else message
        self._out = len(message).to_bytes(4, "big") + message

    def recv(self, size: int, /) -> bytes:
        taken, self._out = self._out[: min(size, self.piece)], self._out[min(size, self.piece) :]
        return taken

    def close(self) -> None:
        self.closed = True
