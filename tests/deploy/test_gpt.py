import io
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.deploy.efi import disk

from cloister.deploy.gpt import read_table
from cloister.errors import MalformedImage
from cloister.evidence.eventlog import parse_eventlog

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
real = pytest.mark.skipif(not VECTORS.is_dir(), reason="the real vectors are not beside this tree")

ENTRIES = [bytes([number]) * 128 for number in (1, 2, 3)]
DISK = disk(ENTRIES)
GPT_EVENT = 0x80000006


def read(data: bytes) -> bytes:
    return read_table(io.BytesIO(data))


def test_is_the_header_the_number_of_partitions_and_their_entries() -> None:
    assert read(DISK) == DISK[512 : 512 + 92] + struct.pack("<Q", 3) + b"".join(ENTRIES)


def test_places_without_a_partition_do_not_count() -> None:
    gap = disk([ENTRIES[0], bytes(16) + bytes([9]) * 112, ENTRIES[1]])
    assert read(gap)[92:] == struct.pack("<Q", 2) + ENTRIES[0] + ENTRIES[1]


@pytest.mark.parametrize(
    "data",
    [b"", bytes(4096), DISK[:600], DISK[:-1], DISK[:513] + b"X" + DISK[514:], DISK[:600] + b"X" + DISK[601:]],
)
def test_refuses_other_disks(data: bytes) -> None:
    with pytest.raises(MalformedImage):
        read(data)


def test_every_byte_of_the_table_counts() -> None:
    honest, start = read(DISK), 512
    for at in [*range(start, start + 92), *range(1024, 1024 + 3 * 128)]:
        with pytest.raises(MalformedImage):
            read(DISK[:at] + bytes([DISK[at] ^ 1]) + DISK[at + 1 :])
    assert honest


@given(st.binary(max_size=700))
def test_is_total_over_bytes(data: bytes) -> None:
    with pytest.raises(MalformedImage):
        read(bytes(512) + b"EFI PART" + data)


@real
def test_a_real_machine_recorded_its_table_so() -> None:
    log = parse_eventlog((VECTORS / "tdx" / "go-tdx-guest" / "gce_cos113_with_ccel" / "ccel.bin").read_bytes())
    (recorded,) = [event for event in log.events if event.type == GPT_EVENT]
    assert recorded.proves_data
    header, entries = recorded.data[:92], recorded.data[100:]
    at, count = struct.unpack_from("<QI", header, 72)
    original = bytearray(512 * at + 128 * count)
    original[512 : 512 + 92] = header
    original[512 * at : 512 * at + len(entries)] = entries
    assert read(bytes(original)) == recorded.data
