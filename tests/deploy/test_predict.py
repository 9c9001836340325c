import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from tests.deploy.efi import CMDLINE, INITRD, OSREL, disk, kernel, uki
from tests.vendors.tpm import extended

from cloister.deploy.gpt import read_table
from cloister.deploy.pe import parse_program
from cloister.deploy.predict import PHASES, SERVING, boot_events, predict_pcrs, predict_rtmrs
from cloister.deploy.uki import Image, parse_image
from cloister.errors import MalformedImage, WrongUse
from cloister.evidence.eventlog import Event, EventLog, parse_eventlog, replay_rtmrs
from cloister.evidence.tpm import ALG_SHA256, ALG_SHA384

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
real = pytest.mark.skipif(not VECTORS.is_dir(), reason="the real vectors are not beside this tree")

CALLING = b"Calling EFI Application from Boot Option"
LEAVING = [b"Exit Boot Services Invocation", b"Exit Boot Services Returned with Success"]
SEPARATOR = bytes(4)
IMAGE = parse_image(uki())
TABLE = read_table(io.BytesIO(disk([bytes([1]) * 128])))


def register(name: str, *digests: bytes) -> bytes:
    value = bytes(hashlib.new(name).digest_size)
    for digest in digests:
        value = hashlib.new(name, value + digest).digest()
    return value


def of(name: str, *measured: bytes) -> list[bytes]:
    return [hashlib.new(name, one).digest() for one in measured]


def test_pcr_4_is_the_firmwares_words_the_image_and_the_kernel() -> None:
    words = of("sha256", CALLING, SEPARATOR)
    programs = [parse_program(data).authenticode("sha256") for data in (uki(), kernel())]
    assert predict_pcrs(IMAGE)[4] == register("sha256", *words, *programs)
    assert predict_pcrs(IMAGE, started_by="qemu")[4] == register("sha256", programs[0], *words, programs[1])


def test_pcr_11_is_each_sections_name_and_content_then_the_phases() -> None:
    parts = [(b".linux", kernel()), (b".osrel", OSREL), (b".cmdline", CMDLINE), (b".initrd", INITRD)]
    parts += [(b".uname", b"6.12.9-cloister"), (b".sbat", b"sbat,1,SBAT Version\n")]
    measured = [one for name, content in parts for one in (name + b"\0", content)]
    assert predict_pcrs(IMAGE, phases=())[11] == extended(*measured)
    assert predict_pcrs(IMAGE)[11] == extended(*measured, b"enter-initrd", b"leave-initrd", b"sysinit", b"ready")
    assert [predict_pcrs(IMAGE, phases=phases)[11] for phases in SERVING] == [
        predict_pcrs(IMAGE, phases=PHASES[:count])[11] for count in (3, 4)
    ]


def test_pcr_9_is_what_the_kernel_was_handed() -> None:
    assert predict_pcrs(IMAGE)[9] == extended(IMAGE.load_options, IMAGE.initrd)
    bare = parse_image(uki("252.1", cmdline=None, initrd=None))
    assert predict_pcrs(bare)[9] == bytes(32)


def test_pcr_12_stays_as_it_was() -> None:
    assert predict_pcrs(IMAGE)[12] == bytes(32)


@pytest.mark.parametrize("phases", [("ready",), ("leave-initrd", "enter-initrd"), ("enter-initrd", "")])
def test_refuses_phases_of_no_boot(phases: tuple[str, ...]) -> None:
    with pytest.raises(WrongUse, match="phases"):
        predict_pcrs(IMAGE, phases=phases)


def test_one_changed_byte_of_the_command_line_changes_every_register_of_the_image() -> None:
    other = predict_pcrs(parse_image(uki(cmdline=CMDLINE[:-1] + b"e")))
    honest = predict_pcrs(IMAGE)
    assert [index for index in honest if honest[index] != other[index]] == [4, 9, 11]


def test_rtmr_1_is_the_firmware_and_the_programs_and_rtmr_2_what_they_start() -> None:
    rtmrs = predict_rtmrs(IMAGE, table=TABLE)
    programs = [parse_program(data).authenticode("sha384") for data in (uki(), kernel())]
    before = of("sha384", CALLING, SEPARATOR, TABLE)
    assert rtmrs[1] == register("sha384", *before, *programs, *of("sha384", *LEAVING))
    sections = [one for name, content in IMAGE.sections for one in (name.encode() + b"\0", content)]
    assert rtmrs[2] == register("sha384", *of("sha384", *sections, IMAGE.load_options, IMAGE.initrd))


def test_qemu_starts_an_image_from_no_disk() -> None:
    by_qemu = predict_rtmrs(IMAGE, started_by="qemu")
    assert by_qemu == predict_rtmrs(IMAGE, started_by="qemu", table=TABLE)
    assert by_qemu[1] != predict_rtmrs(IMAGE, table=TABLE)[1]
    assert by_qemu[2] == predict_rtmrs(IMAGE, table=TABLE)[2]


def test_another_disk_is_another_rtmr_1() -> None:
    with pytest.raises(WrongUse, match="partition table"):
        predict_rtmrs(IMAGE)
    assert predict_rtmrs(IMAGE, table=TABLE + b"x")[1] != predict_rtmrs(IMAGE, table=TABLE)[1]


def test_a_trust_domain_needs_a_kernel_that_measures_what_it_is_handed() -> None:
    with pytest.raises(MalformedImage, match="nothing in a trust domain"):
        predict_rtmrs(parse_image(uki(linux=kernel("6.8.0"))), table=TABLE)
    assert predict_rtmrs(parse_image(uki(linux=kernel("6.9.0"))), table=TABLE)


def test_an_event_names_the_hash_it_was_asked_for() -> None:
    for algorithm, size in ((ALG_SHA256, 32), (ALG_SHA384, 48)):
        events = boot_events(IMAGE, started_by="disk", algorithm=algorithm)
        assert {(*event.digests,) for event in events} == {(algorithm,)}
        assert {len(event.digests[algorithm]) for event in events} == {size}


# Against what real machines recorded


def recorded(folder: str) -> tuple[list[Event], Mapping[int, bytes]]:
    """Its events as a CCEL has them, and the RTMRs that the hardware signed."""
    case = VECTORS / "tdx" / folder
    rtmrs = json.loads((case / "case.json").read_text())["claims"]["rtmr"]
    signed = {index: bytes.fromhex(value) for index, value in enumerate(rtmrs)}
    if (case / "ccel.bin").exists():
        return [*parse_eventlog((case / "ccel.bin").read_bytes()).events], signed
    entries = json.loads((case / "quote-report.json").read_text())["event_log"]
    entries = json.loads(entries) if isinstance(entries, str) else entries
    return [
        Event(
            entry["imr"] + 1,
            entry["event_type"],
            MappingProxyType({ALG_SHA384: bytes.fromhex(entry["digest"])}),
            bytes.fromhex(entry["event_payload"]) if entry["imr"] < 3 else b"",
        )
        for entry in entries
    ], signed


def with_digests_of(events: tuple[Event, ...], log: list[Event]) -> tuple[Event, ...]:
    """Predicted events, with the recorded digests in the place of those of programs, options and initrd."""
    program, tagged = 0x80000003, 6
    programs = iter([event for event in log if event.type == program and event.index == 2])
    handed = {event.data: event for event in log if event.type == tagged}
    return tuple(
        replace(event, digests=next(programs).digests)
        if event.type == program
        else replace(event, digests=handed[event.data].digests)
        if event.type == tagged
        else event
        for event in events
    )


def as_ccel(events: tuple[Event, ...]) -> EventLog:
    moved = tuple(replace(event, index={4: 2, 5: 2, 9: 3, 11: 3}[event.index]) for event in events)
    return EventLog(MappingProxyType({ALG_SHA384: 48}), moved)


@real
def test_a_real_trust_domain_started_by_qemu_recorded_the_predicted_events() -> None:
    """A bare kernel: what the stub would measure is left out, and the one program that it would start."""
    log, signed = recorded("dstack/quote_with_event_log")
    image: Image = replace(IMAGE, sections=())
    programs, events = 0, []
    for event in boot_events(image, started_by="qemu", algorithm=ALG_SHA384, confidential=True):
        programs += event.type == 0x80000003
        if event.type != 0x80000003 or programs == 1:
            events.append(event)
    replayed = replay_rtmrs(as_ccel(with_digests_of(tuple(events), log)))
    assert (replayed[1], replayed[2]) == (signed[1], signed[2])


@real
def test_a_real_trust_domain_started_from_a_disk_recorded_the_predicted_events() -> None:
    """shim and GRUB in the place of image and kernel: two programs, from a disk with a partition table."""
    log, signed = recorded("go-tdx-guest/gce_cos113_with_ccel")
    (table,) = [event.data for event in log if event.type == 0x80000006]
    image: Image = replace(IMAGE, sections=(), load_options=b"", initrd=b"")
    events = boot_events(image, started_by="disk", algorithm=ALG_SHA384, table=table, confidential=True)
    assert replay_rtmrs(as_ccel(with_digests_of(events, log)))[1] == signed[1]


@real
def test_a_real_virtual_tpm_recorded_the_predicted_events_of_pcr_4() -> None:
    log = parse_eventlog((VECTORS / "vtpm/go-tpm-tools/event_log_ubuntu2404_snp/eventlog.bin").read_bytes())
    kinds = [(event.type, event.data if event.proves_data else b"") for event in log.events if event.index == 4]
    predicted = boot_events(IMAGE, started_by="disk", algorithm=ALG_SHA256)
    assert kinds == [(event.type, event.data) for event in predicted if event.index == 4]
