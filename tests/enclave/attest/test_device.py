import errno
import os
import struct
import termios
from pathlib import Path

import pytest
from tests.enclave.attest.fakes.kernel import Buffered, FakeKernel, content

from cloister.enclave.attest.device import (
    Device,
    LinuxDevice,
    iowr,
    opened,
    read_file,
    said_by_hardware,
    write_file,
)
from cloister.errors import ConnectionFailed, MalformedEvidence


def test_the_real_machine_reads_writes_and_lists(tmp_path: Path) -> None:
    device: Device = LinuxDevice()
    folder = f"{tmp_path}/folder"
    device.mkdir(folder)
    assert device.exists(folder)
    assert device.listdir(f"{tmp_path}") == ("folder",)
    Path(f"{tmp_path}/file").write_bytes(b"before")
    write_file(device, f"{tmp_path}/file", b"after.")
    assert read_file(device, f"{tmp_path}/file", limit=6) == b"after."
    device.rmdir(folder)
    assert not device.exists(folder)


def test_the_real_machine_neither_creates_nor_truncates(tmp_path: Path) -> None:
    device = LinuxDevice()
    with pytest.raises(FileNotFoundError):
        write_file(device, f"{tmp_path}/absent", b"x")
    Path(f"{tmp_path}/file").write_bytes(b"longer")
    write_file(device, f"{tmp_path}/file", b"st")
    assert Path(f"{tmp_path}/file").read_bytes() == b"stnger"


def test_the_real_machine_gives_no_handle_to_children(tmp_path: Path) -> None:
    Path(f"{tmp_path}/file").write_bytes(b"")
    with opened(LinuxDevice(), f"{tmp_path}/file", "r") as handle:
        assert not os.get_inheritable(handle)


def test_a_real_ioctl_changes_its_argument() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"seven!!")
        argument = bytearray(4)
        assert LinuxDevice().ioctl(reader, termios.FIONREAD, argument) == 0
        assert struct.unpack("i", argument) == (7,)
        with pytest.raises(OSError) as caught:
            LinuxDevice().ioctl(reader, iowr(ord("T"), 1, 1088), bytearray(1088))
        assert caught.value.errno == errno.ENOTTY
    finally:
        os.close(reader)
        os.close(writer)


def test_request_numbers_are_those_of_the_kernels_headers() -> None:
    """As gcc computes them from <linux/sev-guest.h>, <linux/tdx-guest.h> and <linux/nsm.h> on x86-64."""
    assert iowr(ord("S"), 0, 32) == 0xC0205300
    assert iowr(ord("S"), 2, 32) == 0xC0205302
    assert iowr(ord("T"), 1, 1088) == 0xC4405401
    assert iowr(0x0A, 0, 32) == 0xC0200A00


@pytest.mark.parametrize("max_read", [1, 3, 100])
def test_short_reads_are_joined(max_read: int) -> None:
    kernel = FakeKernel(nodes={"/f": content(b"0123456789")}, max_read=max_read)
    assert read_file(kernel, "/f", limit=10) == b"0123456789"
    assert not kernel.leaked


def test_too_long_a_file_is_refused_and_closed() -> None:
    kernel = FakeKernel(nodes={"/f": content(b"0123456789")})
    with pytest.raises(MalformedEvidence):
        read_file(kernel, "/f", limit=9)
    assert not kernel.leaked


def test_a_short_write_is_an_error_not_a_second_write() -> None:
    committed: list[bytes] = []
    kernel = FakeKernel(nodes={"/f": lambda _: Buffered(committed.append)}, max_write=63)
    with pytest.raises(OSError, match="took 63 of 64"):
        write_file(kernel, "/f", bytes(64))
    assert committed == [bytes(63)]
    assert not kernel.leaked


def test_the_kernels_error_becomes_ours_with_its_name_and_a_hint() -> None:
    with pytest.raises(ConnectionFailed) as caught, said_by_hardware("This", hints={errno.EACCES: "be root"}):
        raise PermissionError(errno.EACCES, "no")
    assert (caught.value.got, caught.value.hint) == ("EACCES", "be root")
    assert isinstance(caught.value.__cause__, PermissionError)
    with pytest.raises(ConnectionFailed) as caught, said_by_hardware("This", hint="else"):
        raise OSError("without a number")
    assert caught.value.hint == "else"
