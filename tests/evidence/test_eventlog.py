import hashlib
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.vendors.tpm import event, event_log, extended

from cloister.errors import CloisterError, MalformedEvidence
from cloister.evidence.eventlog import Event, Tagged, Text, Variable, parse_eventlog, replay_pcrs, replay_rtmrs

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
real = pytest.mark.skipif(not VECTORS.is_dir(), reason="the real vectors are not beside this tree")

NO_ACTION, SEPARATOR, TAGGED, VERSION, IPL = 3, 4, 6, 8, 13
LOG = event_log(event(0, b"firmware"), event(4, b"loader"), event(4, b"kernel"))
VARIABLE = bytes(range(16)) + struct.pack("<QQ", 2, 3) + "db".encode("utf-16-le") + b"abc"


def one(data: bytes, kind: int, **more: bytes) -> Event:
    (parsed,) = parse_eventlog(event_log(event(0, data, kind=kind, **more))).events
    return parsed


def test_replays_into_pcrs() -> None:
    assert replay_pcrs(parse_eventlog(LOG)) == {0: extended(b"firmware"), 4: extended(b"loader", b"kernel")}


def test_replays_each_bank_by_itself() -> None:
    algorithms = (0x0004, 0x000B, 0x000C)
    log = parse_eventlog(event_log(event(1, b"x", algorithms=algorithms), algorithms=algorithms))
    for algorithm, name in zip(algorithms, ("sha1", "sha256", "sha384"), strict=True):
        assert replay_pcrs(log, algorithm) == {1: extended(b"x", name=name)}


def test_replays_a_ccel_into_rtmrs() -> None:
    events = [event(index, b"x%d" % index, algorithms=[0x000C]) for index in (1, 2, 4, 1)]
    log = parse_eventlog(event_log(*events, algorithms=[0x000C]))
    assert replay_rtmrs(log) == {
        0: extended(b"x1", b"x1", name="sha384"),
        1: extended(b"x2", name="sha384"),
        3: extended(b"x4", name="sha384"),
    }


@pytest.mark.parametrize("index", [0, 5, 0xFFFFFFFE])
def test_a_ccel_extends_nothing_but_rtmrs(index: int) -> None:
    log = parse_eventlog(event_log(event(index, b"x", algorithms=[0x000C]), algorithms=[0x000C]))
    with pytest.raises(MalformedEvidence, match="no trust domain"):
        replay_rtmrs(log)


def test_a_tpm_has_24_pcrs() -> None:
    with pytest.raises(MalformedEvidence, match="no TPM"):
        replay_pcrs(parse_eventlog(event_log(event(24, b"x"))))


def test_events_without_action_extend_nothing() -> None:
    log = parse_eventlog(event_log(event(0, b"note", kind=NO_ACTION), event(99, b"note", kind=NO_ACTION)))
    assert replay_pcrs(log) == {}
    sha384 = parse_eventlog(event_log(event(9, b"", kind=NO_ACTION, algorithms=[0x000C]), algorithms=[0x000C]))
    assert replay_rtmrs(sha384) == {}


@pytest.mark.parametrize("locality", [0, 3, 4])
def test_pcr_0_starts_at_the_startup_locality(locality: int) -> None:
    note = event(0, b"StartupLocality\0" + bytes([locality]), kind=NO_ACTION)
    log = parse_eventlog(event_log(note, event(0, b"x"), event(1, b"x")))
    assert replay_pcrs(log) == {0: extended(b"x", start=bytes(31) + bytes([locality])), 1: extended(b"x")}


@pytest.mark.parametrize("value", [b"", b"\1", b"\3\0"])
def test_refuses_localities_that_no_startup_has(value: bytes) -> None:
    note = event(0, b"StartupLocality\0" + value, kind=NO_ACTION)
    with pytest.raises(MalformedEvidence, match="locality"):
        replay_pcrs(parse_eventlog(event_log(note)))


def test_a_bank_that_the_log_lacks_cannot_be_replayed() -> None:
    with pytest.raises(MalformedEvidence, match="lacks"):
        replay_pcrs(parse_eventlog(event_log(event(0, b"x", algorithms=[4]), algorithms=[4])))
    with pytest.raises(MalformedEvidence, match="lacks"):
        replay_rtmrs(parse_eventlog(LOG))


@pytest.mark.parametrize("tail", [b"\xff" * 1000, bytes(1000), b"\xff", b"\0"])
def test_the_table_may_be_padded(tail: bytes) -> None:
    assert parse_eventlog(LOG + tail) == parse_eventlog(LOG)


@pytest.mark.parametrize("data", [b"\xff\xff", b"\0\0\0", b"", b"\xff" * 50])
def test_padding_is_not_confused_with_the_last_event_data(data: bytes) -> None:
    log = event_log(event(0, b"x"), event(1, data))
    for tail in (b"", b"\xff" * 20, bytes(20)):
        assert [one.data for one in parse_eventlog(log + tail).events] == [b"x", data]


@pytest.mark.parametrize("tail", [b"\1", b"\xff" * 20 + b"\0", bytes(40) + b"\1", b"\0" * 20 + b"\xff" * 20])
def test_refuses_anything_else_after_the_last_event(tail: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_eventlog(LOG + tail)


def header(**changes: bytes) -> bytes:
    parts = {"kind": b"\3\0\0\0", "digest": bytes(20), "name": b"Spec ID Event03\0", "version": b"\0\2\0\2"}
    parts |= {"count": b"\1\0\0\0", "algorithms": struct.pack("<HH", 0x000B, 32), "vendor": b"\0", **changes}
    body = parts["name"] + bytes(4) + parts["version"] + parts["count"] + parts["algorithms"] + parts["vendor"]
    return bytes(4) + parts["kind"] + parts["digest"] + struct.pack("<I", len(body)) + body


def test_a_header_alone_is_an_empty_log() -> None:
    log = parse_eventlog(header())
    assert (dict(log.algorithms), log.events) == ({0x000B: 32}, ())


@pytest.mark.parametrize(
    "data",
    [
        header(kind=b"\4\0\0\0"),
        header(digest=b"\1" * 20),
        header(name=b"Spec ID Event02\0"),
        header(version=b"\0\1\0\2"),
        header(count=bytes(4), algorithms=b""),
        header(count=b"\2\0\0\0"),
        header(count=b"\2\0\0\0", algorithms=struct.pack("<HHHH", 0x000B, 32, 0x000B, 32)),
        header(count=b"\x09\0\0\0", algorithms=b"".join(struct.pack("<HH", i + 100, 32) for i in range(9))),
        header(algorithms=struct.pack("<HH", 0x000B, 20)),
        header(algorithms=struct.pack("<HH", 0x0055, 65)),
        header(algorithms=struct.pack("<HH", 0x0055, 0)),
        header(vendor=b"\5"),
        header(vendor=b"\0\0"),
        b"",
        bytes(1024 * 1024 + 1),
    ],
)
def test_refuses_headers_of_another_shape(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_eventlog(data)


@pytest.mark.parametrize(
    "log",
    [
        event_log(event(0, b"x", algorithms=[4])),
        event_log(event(0, b"x", algorithms=[4, 11])),
        event_log(event(0, b"x", algorithms=[11, 11]), algorithms=[11, 4]),
        event_log(event(0, b"x", algorithms=[])),
        event_log(*[event(0, b"x")] * 8193),
    ],
    ids=["other bank", "more banks", "the same bank twice", "no bank", "too many"],
)
def test_refuses_events_of_another_shape(log: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_eventlog(log)


def test_reads_values() -> None:
    assert one(b"grub_cmd: boot\0", IPL).value == Text("grub_cmd: boot")
    assert one("1.2\0".encode("utf-16-le"), VERSION).value == Text("1.2")
    assert one(b"Exit Boot Services", 0x80000007).value == Text("Exit Boot Services")
    guid = "03020100-0504-0706-0809-0a0b0c0d0e0f"
    assert one(VARIABLE, 0x80000001).value == Variable(guid, "db", b"abc")
    assert one(struct.pack("<II", 7, 2) + b"ab", TAGGED).value == Tagged(7, b"ab")
    assert one(bytes(4), SEPARATOR).value is None


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (VARIABLE[:-1], 0x80000001),
        (VARIABLE[:31], 0x80000001),
        (bytes(16) + struct.pack("<QQ", 2**63, 0), 0x80000001),
        (VARIABLE[:32] + b"\x00\xd8\x00\x20abc", 0x80000001),
        (b"\xff", IPL),
        (b"\0", VERSION),
        (struct.pack("<II", 7, 3) + b"ab", TAGGED),
        (b"short", TAGGED),
    ],
)
def test_values_of_another_form_are_not_read(data: bytes, kind: int) -> None:
    assert one(data, kind).value is None


def test_a_digest_proves_the_data_that_it_is_of() -> None:
    assert one(b"data", SEPARATOR).proves_data
    assert not one(b"data", SEPARATOR, digest=bytes(32)).proves_data
    measured = hashlib.sha256(b"root=/dev/sda").digest()
    assert one(b"kernel_cmdline: root=/dev/sda\0", IPL, digest=measured).proves_data
    assert one(b"root=/dev/sda\0", IPL, digest=measured).proves_data
    assert not one(b"kernel_cmdline: root=/dev/sdb\0", IPL, digest=measured).proves_data
    assert not one(b"kernel_cmdline: root=/dev/sda\0", SEPARATOR, digest=measured).proves_data


def test_every_event_counts_in_the_replay() -> None:
    """No event, digest or register number can be changed without another result: only what stands beside a digest can."""
    honest = replay_pcrs(parse_eventlog(LOG))
    start = len(event_log())
    quiet = []
    for at in range(start, len(LOG)):
        try:
            replayed = replay_pcrs(parse_eventlog(LOG[:at] + bytes([LOG[at] ^ 1]) + LOG[at + 1 :]))
        except MalformedEvidence:
            continue
        if replayed == honest:
            quiet.append(at)
    # The event's type (but into "no action") and its data are not part of the digest that is extended.
    beside = {
        start + offset
        for first, size in ((0, 8), (58, 6), (114, 6))
        for offset in (*range(first + 4, first + 8), *range(first + 50, first + 50 + size))
    }
    assert set(quiet) <= beside


def test_refuses_truncation_inside_an_event() -> None:
    """But where what is left of the event is zeros, which might as well be padding."""
    starts = [len(event_log()), len(event_log(event(0, b"firmware")))]
    starts.append(len(event_log(event(0, b"firmware"), event(4, b"loader"))))
    for length in range(len(LOG)):
        rest = LOG[max((start for start in starts if start <= length), default=0) : length]
        if any(rest) or length < starts[0]:
            with pytest.raises(MalformedEvidence):
                parse_eventlog(LOG[:length])


@given(st.binary(max_size=200))
def test_is_total_over_bytes(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_eventlog(data)


@given(data=st.data())
def test_is_total_over_mangled_logs(data: st.DataObject) -> None:
    whole = event_log(event(0, VARIABLE, kind=0x80000001), event(0, b"x", kind=TAGGED), event(1, b"y", kind=VERSION))
    at = data.draw(st.integers(0, len(whole)))
    mangled = whole[:at] + data.draw(st.binary(max_size=6)) + whole[at + data.draw(st.integers(0, 6)) :]
    try:
        log = parse_eventlog(mangled)
        _ = [(event.value, event.proves_data) for event in log.events]
        replay_pcrs(log)
    except CloisterError:
        return


@real
def test_a_real_ccel_reproduces_the_rtmrs() -> None:
    folder = VECTORS / "tdx" / "go-tdx-guest" / "gce_cos113_with_ccel"
    rtmrs = json.loads((folder / "case.json").read_text())["claims"]["rtmr"]
    replayed = replay_rtmrs(parse_eventlog((folder / "ccel.bin").read_bytes()))
    assert {index: value.hex() for index, value in replayed.items()} == dict(enumerate(rtmrs[:3]))


@real
def test_a_ccel_of_another_boot_does_not() -> None:
    folder = VECTORS / "tdx" / "trustee" / "debug_td"
    rtmrs = json.loads((folder / "case.json").read_text())["claims"]["rtmr"]
    replayed = replay_rtmrs(parse_eventlog((folder / "ccel_of_another_boot.bin").read_bytes()))
    assert sorted(replayed) == [0, 1]
    assert all(replayed[index].hex() != rtmrs[index] for index in replayed)


@real
def test_a_real_log_in_json_reproduces_the_rtmrs_once_it_is_encoded() -> None:
    folder = VECTORS / "tdx" / "dstack" / "quote_with_event_log"
    report = json.loads((folder / "quote-report.json").read_text())
    entries = json.loads(report["event_log"]) if isinstance(report["event_log"], str) else report["event_log"]
    events = [
        event(entry["imr"] + 1, b"", kind=entry["event_type"], algorithms=[12], digest=bytes.fromhex(entry["digest"]))
        for entry in entries
    ]
    rtmrs = json.loads((folder / "case.json").read_text())["claims"]["rtmr"]
    replayed = replay_rtmrs(parse_eventlog(event_log(*events, algorithms=[12])))
    assert {index: value.hex() for index, value in replayed.items()} == dict(enumerate(rtmrs))


@real
def test_a_real_pcr_log_is_read_whole() -> None:
    folder = VECTORS / "vtpm" / "go-tpm-tools" / "event_log_ubuntu2404_snp"
    expected = json.loads((folder / "case.json").read_text())["expected"]
    log = parse_eventlog((folder / "eventlog.bin").read_bytes())
    replayed = replay_pcrs(log)
    assert replayed[0].hex().startswith(expected["pcr0_prefix"])
    assert replayed[8].hex().startswith(expected["pcr8_prefix"])
    assert log.events[0].value == Text("GCE Virtual Firmware v2")
    lines = [one.value.text for one in log.events if isinstance(one.value, Text) and one.index == 8 and one.proves_data]
    assert any("kernel_cmdline" in line for line in lines)
