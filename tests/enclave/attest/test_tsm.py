import errno
from dataclasses import replace

import pytest
from tests.enclave.attest.fakes.kernel import FakeKernel
from tests.enclave.attest.fakes.tsm import Entry, FakeTsm

from cloister.enclave.attest.tsm import PAUSE, REPORTS, ConfigfsTsm
from cloister.errors import ConnectionFailed, MalformedEvidence, NotTrusted, WrongUse

DATA = bytes(range(64))


def echo(data: bytes, level: int) -> tuple[bytes, bytes]:
    return b"report over " + data + bytes([level]), b"certificates"


def fake(**changes: object) -> FakeTsm:
    return replace(FakeTsm("sev_guest", echo), **changes)  # type: ignore[arg-type]


class Clock:
    def __init__(self) -> None:
        self.slept: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)


def over(
    tsm: FakeTsm, *, pause: Clock | None = None, max_read: int = 4096, max_write: int = 4096
) -> tuple[ConfigfsTsm, FakeKernel]:
    machine = FakeKernel(folders={REPORTS: tsm}, max_read=max_read, max_write=max_write)
    return ConfigfsTsm(machine, pause=pause or Clock()), machine


def test_reports_over_the_question_at_the_level() -> None:
    tsm = fake()
    source, kernel = over(tsm)
    report = source.report(DATA, provider="sev_guest", privilege_level=0)
    assert report.outblob == b"report over " + DATA + b"\0"
    assert report.auxblob == b"certificates"
    assert report.provider == "sev_guest"
    assert not tsm.entries
    assert not kernel.leaked


def test_tdx_has_neither_level_nor_certificates() -> None:
    source, kernel = over(fake(provider="tdx_guest"))
    report = source.report(DATA, provider="tdx_guest")
    assert report.auxblob == b""
    assert not [path for path in kernel.opened if "privlevel" in path or "auxblob" in path]


def test_every_report_has_a_folder_of_its_own() -> None:
    tsm = fake()
    source, _ = over(tsm)
    for _ in range(5):
        source.report(DATA, provider="sev_guest")
    assert len(set(tsm.removed)) == 5


@pytest.mark.parametrize("max_read", [1, 7])
def test_short_reads_give_the_same_report(max_read: int) -> None:
    source, _ = over(fake(), max_read=max_read)
    report = source.report(DATA, provider="sev_guest")
    assert report.outblob == b"report over " + DATA + b"\0"
    assert report.auxblob == b"certificates"


@pytest.mark.parametrize("size", [0, 32, 63, 65, 128])
def test_refuses_another_size_before_it_asks(size: int) -> None:
    tsm = fake()
    source, _ = over(tsm)
    with pytest.raises(WrongUse):
        source.report(bytes(size), provider="sev_guest")
    assert not tsm.removed


def test_refuses_another_provider() -> None:
    tsm = fake(provider="arm_cca_guest")
    source, _ = over(tsm)
    with pytest.raises(NotTrusted) as caught:
        source.report(DATA, provider="tdx_guest")
    assert (caught.value.expected, caught.value.got) == ("tdx_guest", "arm_cca_guest")
    assert tsm.made == 0
    assert not tsm.entries


def another_question(tsm: FakeTsm, entry: Entry) -> None:
    tsm.advance(entry)
    entry.inblob = b"\xee" * 64


def another_level(tsm: FakeTsm, entry: Entry) -> None:
    tsm.advance(entry)
    entry.privilege_level = 3


def same_question(tsm: FakeTsm, entry: Entry) -> None:
    tsm.advance(entry)


@pytest.mark.parametrize("interfere", [another_question, another_level, same_question])
def test_a_concurrent_writer_is_noticed_by_the_generation(interfere: object) -> None:
    tsm = fake(interfere=interfere)
    source, kernel = over(tsm)
    with pytest.raises(NotTrusted, match="Another process") as caught:
        source.report(DATA, provider="sev_guest", privilege_level=0)
    assert caught.value.got == "generation + 3"
    assert not tsm.entries
    assert not kernel.leaked


def test_the_generation_counts_from_where_it_stands() -> None:
    source, _ = over(fake(first_generation=41))
    assert source.report(DATA, provider="sev_guest", privilege_level=0)


@pytest.mark.parametrize("text", ["", "-1", "0x1", "1 2", "١"])
def test_a_generation_that_is_no_number_is_refused(text: str) -> None:
    tsm = fake(say=lambda _: text)
    source, _ = over(tsm)
    with pytest.raises(MalformedEvidence, match="not a number"):
        source.report(DATA, provider="sev_guest")
    assert not tsm.entries


def test_asks_again_while_the_quoting_service_is_busy() -> None:
    clock, tsm = Clock(), fake(busy=2)
    source, _ = over(tsm, pause=clock)
    assert source.report(DATA, provider="sev_guest").outblob
    assert clock.slept == [PAUSE, PAUSE]
    assert len(tsm.removed) == 3


def test_gives_up_after_three_attempts() -> None:
    tsm = fake(busy=3)
    source, _ = over(tsm)
    with pytest.raises(ConnectionFailed) as caught:
        source.report(DATA, provider="sev_guest")
    assert caught.value.got == "EBUSY"
    assert caught.value.hint
    assert not tsm.entries


@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.EINTR, errno.EIO, errno.ENXIO, errno.EFBIG, errno.EINVAL])
def test_another_failure_is_told_at_once_and_the_folder_removed(number: int) -> None:
    clock, tsm = Clock(), fake(error=number)
    source, kernel = over(tsm, pause=clock)
    with pytest.raises(ConnectionFailed) as caught:
        source.report(DATA, provider="sev_guest")
    assert caught.value.got == errno.errorcode[number]
    assert not clock.slept
    assert not tsm.entries
    assert not kernel.leaked


def test_a_guest_below_a_paravisor_is_refused() -> None:
    tsm = fake(floor=2)
    source, _ = over(tsm)
    with pytest.raises(NotTrusted) as caught:
        source.report(DATA, provider="sev_guest", privilege_level=0)
    assert (caught.value.expected, caught.value.got) == ("VMPL 0", "VMPL 2")
    assert tsm.made == 0


def test_a_question_cut_by_the_kernel_makes_no_report() -> None:
    tsm = fake()
    source, _ = over(tsm, max_write=63)
    with pytest.raises(ConnectionFailed):
        source.report(DATA, provider="sev_guest")
    assert tsm.made == 0


def test_an_empty_report_is_refused() -> None:
    source, _ = over(fake(make=lambda *_: (b"", b"")))
    with pytest.raises(MalformedEvidence, match="empty"):
        source.report(DATA, provider="sev_guest")


def test_a_report_over_64_kib_is_refused() -> None:
    source, _ = over(fake(make=lambda *_: (bytes(65537), b"")))
    with pytest.raises(MalformedEvidence, match="too long"):
        source.report(DATA, provider="sev_guest")


def test_says_what_is_missing_without_configfs() -> None:
    with pytest.raises(ConnectionFailed) as caught:
        ConfigfsTsm(FakeKernel()).report(DATA, provider="tdx_guest")
    assert caught.value.got == "ENOENT"
    assert "6.7" in caught.value.hint


def test_says_what_is_missing_without_a_driver() -> None:
    source, _ = over(fake(provider=None))
    with pytest.raises(ConnectionFailed) as caught:
        source.provider()
    assert caught.value.got == "ENXIO"
    assert "modprobe" in caught.value.hint


def test_tells_the_provider_without_making_a_report() -> None:
    tsm = fake()
    source, _ = over(tsm)
    assert source.provider() == "sev_guest"
    assert tsm.made == 0
    assert not tsm.entries
