"""The firmware's boot log: what was measured into which register, in order, so that the registers can be recomputed.

Crypto-agile format of the TCG's "PC Client Platform Firmware Profile", section 10 (little-endian); a TDX guest's CCEL
table has the same format, its registers numbered from the build-time one (0) through RTMR0 (1) to RTMR3 (4). A log proves
nothing by itself: it is believed where its replay gives the registers that the hardware signed, and then only digests
are proved, and those data that a digest is of (`Event.proves_data`).
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from cloister.errors import MalformedEvidence
from cloister.evidence.document import MAX_LOG
from cloister.evidence.tpm import ALG_SHA256, ALG_SHA384, HASH_SIZES, PCR_COUNT, hash_name

__all__ = ["Event", "EventLog", "Tagged", "Text", "Variable", "parse_eventlog", "replay_pcrs", "replay_rtmrs"]

EV_NO_ACTION, EV_SEPARATOR, EV_ACTION, EV_EVENT_TAG, EV_S_CRTM_VERSION, EV_IPL = 0x03, 0x04, 0x05, 0x06, 0x08, 0x0D
EV_EFI_VARIABLES = frozenset({0x80000001, 0x80000002, 0x8000000C, 0x800000E0})
EV_EFI_ACTION = 0x80000007

_SPEC_ID = b"Spec ID Event03\0"
_LOCALITY = b"StartupLocality\0"
_MAX_ALGORITHMS = 8
_MAX_EVENTS = 8192
_MAX_DIGEST = 64


@dataclass(frozen=True, slots=True)
class Text:
    """A string that was measured, or that describes what was (a boot loader's command, a version, an action)."""

    text: str


@dataclass(frozen=True, slots=True)
class Variable:
    """UEFI_VARIABLE_DATA: a firmware variable, its vendor's GUID, its name and content."""

    guid: str
    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Tagged:
    """TCG_PCClientTaggedEvent: a number that says whose event it is, and its data."""

    tag: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Event:
    """`index` is the register's number as the log has it; `digests` algorithm -> digest."""

    index: int
    type: int
    digests: Mapping[int, bytes]
    data: bytes

    @property
    def value(self) -> Text | Variable | Tagged | None:
        """`data` in its type's form; None for a type, or a form, that is not read here."""
        if self.type in EV_EFI_VARIABLES:
            return _variable(self.data)
        if self.type == EV_EVENT_TAG:
            return _tagged(self.data)
        if self.type in (EV_ACTION, EV_EFI_ACTION, EV_IPL):
            return _text(self.data, "utf-8")
        return _text(self.data, "utf-16-le") if self.type == EV_S_CRTM_VERSION else None

    @property
    def proves_data(self) -> bool:
        """The digests are those of `data` itself (of a boot loader's string: without its description and final zero);
        otherwise `data` is only what the firmware says beside them."""
        return any(self._digested(measured) for measured in _measured(self.type, self.data))

    def _digested(self, measured: bytes) -> bool:
        return bool(self.digests) and all(
            algorithm in HASH_SIZES and hashlib.new(hash_name(algorithm), measured).digest() == digest
            for algorithm, digest in self.digests.items()
        )


@dataclass(frozen=True, slots=True)
class EventLog:
    """`algorithms` id -> digest size, the same for each event; `events` without the header, no-action ones included."""

    algorithms: Mapping[int, int]
    events: tuple[Event, ...]


def parse_eventlog(data: bytes) -> EventLog:
    """Total and bounded. After the last event only 0xFF or only zero bytes may follow, as in a CCEL table.

    Refused: more than 1 MiB or 8192 events; another specification's header; events without exactly the digests that the
    header announces.

    Raises: MalformedEvidence.
    """
    if len(data) > MAX_LOG:
        _refuse("eventlog", "The event log is over 1 MiB.", got=str(len(data)))
    algorithms, at = _header(data)
    padding = _padding_from(data)
    events: list[Event] = []
    while at < padding:
        if len(events) == _MAX_EVENTS:
            _refuse("eventlog", "The event log has more than 8192 events.")
        event, at = _event(data, at, algorithms)
        events.append(event)
    return EventLog(algorithms, tuple(events))


def replay_pcrs(log: EventLog, algorithm: int = ALG_SHA256) -> Mapping[int, bytes]:
    """PCR -> value after all its events, for each PCR that the log touches.

    PCR 0 starts at the locality that a StartupLocality event names (Firmware Profile, section 10.4.5.3), all others at
    zero.

    Raises: MalformedEvidence when the log lacks this algorithm or names a PCR that no TPM has.
    """
    registers: dict[int, bytes] = {}
    size = _digest_size(log, algorithm)
    for event in log.events:
        if event.type == EV_NO_ACTION:
            if event.data.startswith(_LOCALITY):
                registers.setdefault(0, _locality(event, size))
            continue
        if event.index >= PCR_COUNT:
            _refuse("eventlog.pcr", "The event log extends a PCR that no TPM has.", got=str(event.index))
        _extend(registers, event.index, event, algorithm)
    return MappingProxyType(registers)


def replay_rtmrs(log: EventLog) -> Mapping[int, bytes]:
    """RTMR (0 to 3) -> SHA-384 value after all its events, for each RTMR that the CCEL touches.

    Register 0 of a CCEL is MRTD, fixed when the domain was built: an event that extends it is refused.

    Raises: MalformedEvidence.
    """
    registers: dict[int, bytes] = {}
    _digest_size(log, ALG_SHA384)
    for event in log.events:
        if event.type == EV_NO_ACTION:
            continue
        if not 1 <= event.index <= 4:
            _refuse("eventlog.rtmr", "The event log extends a register that no trust domain has.", got=str(event.index))
        _extend(registers, event.index - 1, event, ALG_SHA384)
    return MappingProxyType(registers)


def _refuse(step: str, message: str, got: str | None = None) -> NoReturn:
    raise MalformedEvidence(message, step=step, got=got)


def _padding_from(data: bytes) -> int:
    """Where the run of equal 0xFF or zero bytes at the end begins. It may begin inside the last event's data."""
    last = data[-1:]
    return len(data.rstrip(last)) if last in (b"\xff", b"\0") else len(data)


def _numbers(layout: str, data: bytes, at: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, data, at)
    except struct.error as error:
        raise MalformedEvidence("The event log is cut short.", step="eventlog") from error


def _slice(data: bytes, at: int, size: int) -> bytes:
    if size > len(data) - at:
        _refuse("eventlog", "The event log is cut short.")
    return data[at : at + size]


def _header(data: bytes) -> tuple[Mapping[int, int], int]:
    """The first event, in the old SHA-1 format, with the specification's name and the algorithms in use."""
    _, kind = _numbers("<II", data, 0)
    (size,) = _numbers("<I", data, 28)
    body = _slice(data, 32, size)
    if kind != EV_NO_ACTION or data[8:28] != bytes(20) or not body.startswith(_SPEC_ID):
        _refuse("eventlog.header", "The event log is not one in the crypto-agile format.")
    major, (count,) = body[21:22], _numbers("<I", body, 24)
    if major != b"\x02" or not 0 < count <= _MAX_ALGORITHMS:
        _refuse("eventlog.header", "The event log has an unknown version.")
    pairs = [_numbers("<HH", body, 28 + 4 * i) for i in range(count)]
    algorithms = {algorithm: length for algorithm, length in pairs}  # noqa: C416 - typed pairs
    for algorithm, length in algorithms.items():
        if HASH_SIZES.get(algorithm, length) != length or not 0 < length <= _MAX_DIGEST:
            _refuse("eventlog.header", "The event log has digests of a wrong length.", got=f"{algorithm:04x}")
    (vendor,) = _slice(body, 28 + 4 * count, 1)
    if len(algorithms) != count or len(body) != 29 + 4 * count + vendor:
        _refuse("eventlog.header", "The event log's header has another length than it says.")
    return MappingProxyType(algorithms), 32 + size


def _event(data: bytes, at: int, algorithms: Mapping[int, int]) -> tuple[Event, int]:
    index, kind, count = _numbers("<III", data, at)
    if count != len(algorithms):
        _refuse("eventlog.digests", "An event has not exactly the digests that the log announces.", got=str(count))
    at += 12
    digests: dict[int, bytes] = {}
    for _ in range(count):
        (algorithm,) = _numbers("<H", data, at)
        if algorithm not in algorithms or algorithm in digests:
            _refuse("eventlog.digests", "An event has not exactly the digests that the log announces.")
        digests[algorithm] = _slice(data, at + 2, algorithms[algorithm])
        at += 2 + algorithms[algorithm]
    (size,) = _numbers("<I", data, at)
    return Event(index, kind, MappingProxyType(digests), _slice(data, at + 4, size)), at + 4 + size


def _digest_size(log: EventLog, algorithm: int) -> int:
    if algorithm not in log.algorithms:
        _refuse("eventlog.algorithm", "The event log lacks the digests that are needed.", got=f"{algorithm:04x}")
    return log.algorithms[algorithm]


def _locality(event: Event, size: int) -> bytes:
    value = event.data[len(_LOCALITY) :]
    if value not in (b"\0", b"\3", b"\4"):
        _refuse("eventlog.locality", "The event log names a locality that no startup has.")
    return bytes(size - 1) + value


def _extend(registers: dict[int, bytes], index: int, event: Event, algorithm: int) -> None:
    before = registers.get(index, bytes(HASH_SIZES[algorithm]))
    registers[index] = hashlib.new(hash_name(algorithm), before + event.digests[algorithm]).digest()


def _measured(kind: int, data: bytes) -> tuple[bytes, ...]:
    """What the digests of an event may be of. GRUB logs "kernel_cmdline: …", and measures what comes after that."""
    if kind != EV_IPL:
        return (data,)
    text = data.rstrip(b"\0")
    return data, text, text.partition(b": ")[2]


def _text(data: bytes, encoding: str) -> Text | None:
    try:
        return Text(data.decode(encoding).rstrip("\0"))
    except UnicodeDecodeError:
        return None


def _variable(data: bytes) -> Variable | None:
    """UEFI_VARIABLE_DATA: GUID, two lengths of eight bytes (the name's in characters), the name, the content."""
    if len(data) < 32:
        return None
    characters, size = struct.unpack_from("<QQ", data, 16)
    name, content = data[32 : 32 + 2 * characters], data[32 + 2 * characters :]
    if len(name) != 2 * characters or len(content) != size:
        return None
    text = _text(name, "utf-16-le")
    return None if text is None else Variable(_guid(data[:16]), text.text, content)


def _guid(data: bytes) -> str:
    first, second, third = struct.unpack_from("<IHH", data)
    return f"{first:08x}-{second:04x}-{third:04x}-{data[8:10].hex()}-{data[10:16].hex()}"


def _tagged(data: bytes) -> Tagged | None:
    if len(data) < 8:
        return None
    tag, size = struct.unpack_from("<II", data)
    return Tagged(tag, data[8:]) if size == len(data) - 8 else None
