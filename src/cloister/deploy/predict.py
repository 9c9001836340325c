"""What a machine's registers will hold once it has booted an image, computed before it does.

One list of events is the prediction: those that the firmware, systemd's stub and the kernel will measure, in their order.
A TPM's PCRs and a trust domain's RTMRs are its replay (`evidence.eventlog`), each in its own hash.

Sources, by event:
- PCR 4, 5: TCG "PC Client Platform Firmware Profile", sections 3.3.4.5 and 10.4; EDK II, `Tcg2Dxe`, `TdTcg2Dxe` and
  `DxeTpm2MeasureBootLib`. Which register of a trust domain stands for which PCR: UEFI 2.10, section 38.4.1.
- PCR 11, 12: systemd-stub(7), systemd-pcrphase.service(8), systemd-measure(1).
- PCR 9: Linux, `drivers/firmware/efi/libstub` (`efi_measure_tagged_event`).

What is not predicted: registers of the firmware itself (PCR 0, 1, 7, MRTD, RTMR0), which depend on the machine.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, TypeAlias

from cloister.deploy.uki import Image
from cloister.errors import MalformedImage, WrongUse
from cloister.evidence.eventlog import (
    EV_EFI_ACTION,
    EV_EVENT_TAG,
    EV_IPL,
    EV_SEPARATOR,
    Event,
    EventLog,
    replay_pcrs,
    replay_rtmrs,
)
from cloister.evidence.tpm import ALG_SHA256, ALG_SHA384, HASH_SIZES, hash_name

__all__ = ["PHASES", "SERVING", "StartedBy", "boot_events", "predict_pcrs", "predict_rtmrs"]

StartedBy: TypeAlias = Literal["disk", "qemu"]
"""Who starts the image: the firmware, from a disk's boot partition; or the firmware as QEMU's `-kernel` tells it to."""

PHASES = ("enter-initrd", "leave-initrd", "sysinit", "ready", "shutdown", "final")
"""systemd's words for how far it came, each extended into PCR 11 when it is."""

SERVING: tuple[tuple[str, ...], ...] = (PHASES[:3], PHASES[:4])
"""When a service may be asked for evidence: the second word may come while it starts."""

EV_EFI_BOOT_SERVICES_APPLICATION, EV_EFI_GPT_EVENT = 0x80000003, 0x80000006
PROGRAM_PCR, TABLE_PCR, KERNEL_PCR, IMAGE_PCR, PARAMETERS_PCR = 4, 5, 9, 11, 12

_CALLING = b"Calling EFI Application from Boot Option"
_LEAVING = (b"Exit Boot Services Invocation", b"Exit Boot Services Returned with Success")
_LOAD_OPTIONS, _INITRD = b"LOADED_IMAGE::LoadOptions\0", b"Linux initrd\0"
_LOAD_OPTIONS_TAG, _INITRD_TAG = 0x8F3B22ED, 0x8F3B22EC

_CCEL_OF_PCR = MappingProxyType({1: 1, 7: 1, **dict.fromkeys(range(2, 7), 2), **dict.fromkeys(range(8, 16), 3)})
"""PCR -> the number that a trust domain's log has for its register: RTMR0 is 1."""

_CONFIDENTIAL_KERNEL = (6, 9)
"""Since then Linux measures into a trust domain's registers too, not only into a TPM's."""


def boot_events(
    image: Image, *, started_by: StartedBy, algorithm: int, table: bytes | None = None, confidential: bool = False
) -> tuple[Event, ...]:
    """From the firmware's hand-over to the image until the kernel runs, of the PCRs 4, 5, 9 and 11, in their order.

    Nothing external is assumed: no command line, credentials or extensions beside the image, no boot loader before it.

    `algorithm`: TPM_ALG_ID of the digests. `table`: the event data for the disk's partition table (`deploy.gpt`), None for
    no such event. `confidential`: in a trust domain, whose firmware closes each register once, not each PCR.
    """
    return tuple(
        Event(index, kind, MappingProxyType({algorithm: digest}), data)
        for index, kind, digest, data in _events(image, started_by, hash_name(algorithm), table, confidential)
    )


def predict_pcrs(
    image: Image, *, started_by: StartedBy = "disk", phases: Sequence[str] = PHASES[:4]
) -> Mapping[int, bytes]:
    """PCR 4, 9, 11 and 12 of the SHA-256 bank, 32 bytes each. `phases`: systemd's words so far; () without systemd.

    PCR 12 stays zero where nothing external was given to the image: that is what it has to be compared with.

    Raises: WrongUse for words that systemd does not measure, or not in this order.
    """
    if tuple(phases) != PHASES[: len(phases)]:
        expected = ":".join(PHASES)
        raise WrongUse("These are not the phases of a boot.", expected=expected, got=":".join(phases)[:100])
    events = boot_events(image, started_by=started_by, algorithm=ALG_SHA256)
    words = [_event(IMAGE_PCR, EV_IPL, word.encode(), ALG_SHA256) for word in phases]
    replayed = replay_pcrs(_log((*events, *words), ALG_SHA256))
    untouched = bytes(HASH_SIZES[ALG_SHA256])
    wanted = (PROGRAM_PCR, KERNEL_PCR, IMAGE_PCR, PARAMETERS_PCR)
    return MappingProxyType({index: replayed.get(index, untouched) for index in wanted})


def predict_rtmrs(image: Image, *, started_by: StartedBy = "disk", table: bytes | None = None) -> Mapping[int, bytes]:
    """RTMR1 and RTMR2 of a trust domain, 48 bytes each. systemd's phases are not measured there.

    Raises: WrongUse for an image on a disk whose partition table, which RTMR1 covers too, is not given; MalformedImage for a
    kernel before 6.9, which measures nothing there: what it is handed would not be covered.
    """
    if image.kernel_version < _CONFIDENTIAL_KERNEL:
        got = ".".join(map(str, image.kernel_version))
        raise MalformedImage("Its kernel measures nothing in a trust domain.", step="image", expected="6.9 on", got=got)
    if started_by == "disk" and table is None:
        hint = "--disk DISK: the disk that the image lies on; or --started-by qemu."
        raise WrongUse("RTMR1 depends on the disk's partition table.", hint=hint)
    events = boot_events(
        image,
        started_by=started_by,
        algorithm=ALG_SHA384,
        table=table if started_by == "disk" else None,
        confidential=True,
    )
    moved = tuple(replace(event, index=_CCEL_OF_PCR[event.index]) for event in events)
    replayed = replay_rtmrs(_log(moved, ALG_SHA384))
    return MappingProxyType({index: replayed[index] for index in (1, 2)})


def _log(events: Sequence[Event], algorithm: int) -> EventLog:
    return EventLog(MappingProxyType({algorithm: HASH_SIZES[algorithm]}), tuple(events))


def _event(index: int, kind: int, measured: bytes, algorithm: int) -> Event:
    digest = hashlib.new(hash_name(algorithm), measured).digest()
    return Event(index, kind, MappingProxyType({algorithm: digest}), measured)


_Step: TypeAlias = tuple[int, int, bytes, bytes]
"""PCR, event type, digest, event data."""


def _events(image: Image, started_by: StartedBy, name: str, table: bytes | None, confidential: bool) -> Iterator[_Step]:
    """QEMU's kernel is loaded before the firmware says that it calls something; a disk's after that."""
    program = (PROGRAM_PCR, EV_EFI_BOOT_SERVICES_APPLICATION, image.program.authenticode(name), b"")
    if started_by == "qemu":
        yield program
    yield _measured(PROGRAM_PCR, EV_EFI_ACTION, _CALLING, name)
    yield _measured(PROGRAM_PCR, EV_SEPARATOR, bytes(4), name)
    if not confidential:
        yield _measured(TABLE_PCR, EV_SEPARATOR, bytes(4), name)
    if table is not None:
        yield _measured(TABLE_PCR, EV_EFI_GPT_EVENT, table, name)
    if started_by == "disk":
        yield program
    for section, content in image.sections:
        label = section.encode() + b"\0"
        yield _measured(IMAGE_PCR, EV_IPL, label, name)
        yield (IMAGE_PCR, EV_IPL, hashlib.new(name, content).digest(), label)
    yield (PROGRAM_PCR, EV_EFI_BOOT_SERVICES_APPLICATION, image.kernel.authenticode(name), b"")
    yield from _kernel_events(image, name)
    for words in _LEAVING:
        yield _measured(TABLE_PCR, EV_EFI_ACTION, words, name)


def _kernel_events(image: Image, name: str) -> Iterator[_Step]:
    handed = ((_LOAD_OPTIONS_TAG, _LOAD_OPTIONS, image.load_options), (_INITRD_TAG, _INITRD, image.initrd))
    for tag, label, content in handed:
        if content:
            data = struct.pack("<II", tag, len(label)) + label
            yield (KERNEL_PCR, EV_EVENT_TAG, hashlib.new(name, content).digest(), data)


def _measured(index: int, kind: int, data: bytes, name: str) -> _Step:
    """An event whose data is what is measured."""
    return index, kind, hashlib.new(name, data).digest(), data
