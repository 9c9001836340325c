import errno
import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.enclave.attest.fakes.kernel import FakeKernel, failure
from tests.enclave.attest.fakes.tdx import FakeQgs, TdModule, machine, tsm_of
from tests.enclave.attest.fakes.tsm import FakeTsm
from tests.vendors import intel
from tests.vendors.tpm import event, event_log

from cloister.enclave.attest import EvidenceSource
from cloister.enclave.attest.boot_log import CCEL
from cloister.enclave.attest.tdx import Tdx
from cloister.enclave.attest.tdx_guest import (
    DEVICE,
    MEASUREMENTS,
    RTMRS,
    Connection,
    extend_rtmr3,
    parse_tdreport,
    quote_by_vsock,
    read_registers,
    read_tdreport,
)
from cloister.enclave.attest.tsm import ConfigfsTsm
from cloister.errors import CloisterError, ConnectionFailed, MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.eventlog import parse_eventlog
from cloister.evidence.intel import parse_quote
from cloister.verify.intel import judge_tdx
from cloister.verify.policy import Policy

DATA = bytes(range(64))
LAUNCH = b'{"v":1}'
BY_CONFIG = hashlib.sha256(LAUNCH).digest() + bytes(16)
BY_EXTEND = hashlib.sha384(bytes(48) + hashlib.sha384(LAUNCH).digest()).digest()


def nobody() -> Connection:
    raise failure(errno.ECONNREFUSED)


def source_on(kernel: FakeKernel, connect: Callable[[], Connection] = nobody) -> Tdx:
    return Tdx(kernel, ConfigfsTsm(kernel, pause=lambda _: None), connect)


def guest(module: TdModule | None = None, **options: object) -> tuple[Tdx, FakeKernel]:
    module = module or TdModule()
    options.setdefault("tsm", tsm_of(module))
    kernel = machine(module, **options)  # type: ignore[arg-type]
    return source_on(kernel), kernel


def test_collects_a_quote_that_the_verifier_accepts() -> None:
    module = TdModule()
    source: EvidenceSource
    source, kernel = guest(module)
    items = source.collect(DATA)
    assert source.platform == "tdx"
    assert items.keys() == {"cpu"}
    vendor = intel.tdx()
    appraisal = judge_tdx(items["cpu"].content, vendor.collateral, policy=Policy(), now=intel.NOW, root=vendor.root)
    assert appraisal.report_data == DATA
    assert not [factor for factor in appraisal.factors if factor.verdict == "fail"]
    assert not kernel.leaked


def test_the_launch_config_that_it_fixed_is_what_the_verifier_finds() -> None:
    source, _ = guest()
    source.fix_launch(LAUNCH)
    vendor = intel.tdx()
    content = source.collect(DATA)["cpu"].content
    judged = judge_tdx(content, vendor.collateral, policy=Policy(), now=intel.NOW, launch=LAUNCH, root=vendor.root)
    assert judged.launch_sha256 == hashlib.sha256(LAUNCH).digest()


def test_brings_the_boot_log_whole_with_its_padding() -> None:
    log = event_log(event(1, b"kernel", algorithms=(0x000C,)), algorithms=(0x000C,), tail=b"\xff" * 500)
    source, kernel = guest(log=log)
    kernel.max_read = 100
    item = source.collect(DATA)["eventlog"]
    assert item.content == log
    assert len(parse_eventlog(item.content).events) == 1


def test_a_boot_log_that_may_not_be_read_is_no_absent_one() -> None:
    source, kernel = guest(log=b"log")
    kernel.refused[CCEL] = errno.EACCES
    with pytest.raises(ConnectionFailed) as caught:
        source.collect(DATA)
    assert "root" in caught.value.hint


def quoting(change: Callable[[bytes], bytes]) -> Tdx:
    module = TdModule()
    return guest(module, tsm=FakeTsm("tdx_guest", lambda data, _: (change(module.quote(data)), b"")))[0]


def test_zeros_after_the_quote_are_cut_off() -> None:
    plain = quoting(lambda quote: quote).collect(DATA)["cpu"].content
    padded = quoting(lambda quote: quote.ljust(8192, b"\0")).collect(DATA)["cpu"].content
    assert len(padded) == len(plain)
    assert parse_quote(padded).padding == 0


def test_anything_else_after_the_quote_is_refused() -> None:
    with pytest.raises(MalformedEvidence):
        quoting(lambda quote: quote + b"\1").collect(DATA)


def test_a_quote_over_another_question_is_refused() -> None:
    with pytest.raises(MalformedEvidence, match="another question"):
        quoting(lambda _: TdModule().quote(bytes(64))).collect(DATA)


def test_an_sgx_quote_is_refused() -> None:
    with pytest.raises(MalformedEvidence, match="another question"):
        quoting(lambda _: intel.sgx(report={"report_data": DATA}).quote).collect(DATA)


@given(st.binary(max_size=700))
def test_whatever_outblob_holds_only_our_errors_escape(content: bytes) -> None:
    with pytest.raises(CloisterError):
        quoting(lambda _: content).collect(DATA)


def test_a_tdreport_alone_is_refused_and_says_what_would_help() -> None:
    source, _ = guest(tsm=None)
    with pytest.raises(ConnectionFailed, match="nobody to make a quote") as caught:
        source.collect(DATA)
    assert caught.value.got == "ECONNREFUSED"
    assert "6.7" in caught.value.hint
    assert "4050" in caught.value.hint


@pytest.mark.parametrize("piece", [1, 24, 100_000])
def test_an_older_kernel_gets_its_quote_over_vsock(piece: int) -> None:
    module = TdModule()
    service = FakeQgs(module, piece=piece)
    kernel = machine(module, tsm=None)
    content = source_on(kernel, lambda: service).collect(DATA)["cpu"].content
    assert parse_quote(content).report.report_data == DATA
    assert service.closed


def test_a_quote_generation_service_that_refuses_is_told() -> None:
    module = TdModule()
    with pytest.raises(ConnectionFailed) as caught:
        quote_by_vsock(module.tdreport(DATA), connect=lambda: FakeQgs(module, code=0x12001))
    assert caught.value.got == "0x12001"


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: answer[:10],
        lambda answer: answer[:20],
        lambda answer: answer[:8] + bytes(4) + answer[12:],
        lambda answer: answer[:-1],
        lambda answer: answer + b"\0",
        lambda answer: b"\2" + answer[1:],
        lambda answer: answer[:4] + b"\0" + answer[5:],
        lambda answer: answer[:16] + b"\1" + answer[17:],
        lambda answer: answer[:20] + bytes(4) + answer[24:],
        lambda answer: answer + bytes(70_000),
    ],
)
def test_answers_of_another_form_are_refused(change: Callable[[bytes], bytes]) -> None:
    module = TdModule()
    service = FakeQgs(module, answer=change)
    with pytest.raises(MalformedEvidence):
        quote_by_vsock(module.tdreport(DATA), connect=lambda: service)
    assert service.closed


def test_a_service_that_hangs_up_is_told() -> None:
    class Silent(FakeQgs):
        def recv(self, size: int, /) -> bytes:
            return b""

    with pytest.raises(ConnectionFailed):
        quote_by_vsock(TdModule().tdreport(DATA), connect=lambda: Silent(TdModule()))


def test_reads_a_tdreport_and_its_registers() -> None:
    module = TdModule(mr_config_id=b"\xc0" * 48)
    kernel = machine(module)
    report = read_tdreport(kernel, DATA)
    assert report[128:192] == DATA
    registers = parse_tdreport(report)
    assert registers.mr_config_id == b"\xc0" * 48
    assert registers.rtmr3 == module.rtmr[3]
    assert registers == read_registers(machine(module, device=False))
    assert not kernel.leaked


@pytest.mark.parametrize("size", [0, 63, 65])
def test_a_tdreport_is_over_64_bytes(size: int) -> None:
    with pytest.raises(WrongUse):
        read_tdreport(machine(TdModule()), bytes(size))


@pytest.mark.parametrize(
    "broken",
    [lambda report: b"\0" + report[1:], lambda report: report[:128] + bytes(64) + report[192:]],
)
def test_a_tdreport_of_another_kind_or_question_is_refused(broken: Callable[[bytes], bytes]) -> None:
    with pytest.raises(MalformedEvidence):
        read_tdreport(machine(TdModule(), broken=broken), DATA)


@pytest.mark.parametrize("size", [0, 1, 1023, 1025])
def test_a_tdreport_has_1024_bytes(size: int) -> None:
    with pytest.raises(MalformedEvidence):
        parse_tdreport(b"\x81" * size)


def test_outside_a_td_the_missing_device_is_told() -> None:
    with pytest.raises(ConnectionFailed) as caught:
        read_registers(FakeKernel())
    assert caught.value.got == "ENOENT"
    assert "TDX" in caught.value.hint


def test_the_launch_config_in_mrconfigid_needs_no_extend() -> None:
    module = TdModule(mr_config_id=BY_CONFIG)
    source, _ = guest(module)
    source.fix_launch(LAUNCH)
    with pytest.raises(NotTrusted):
        source.fix_launch(LAUNCH + b"\n")
    assert module.rtmr[3] == bytes(48)


@pytest.mark.parametrize("options", [{}, {"sysfs": False, "configfs_rtmrs": True}, {"device": False}])
def test_the_launch_config_is_extended_into_rtmr3_once(options: dict[str, bool]) -> None:
    module = TdModule()
    source, kernel = guest(module, **options)
    for _ in range(2):
        source.fix_launch(LAUNCH)
        assert module.rtmr[3] == BY_EXTEND
    assert not kernel.leaked


def test_a_folder_for_rtmr3_that_exists_is_used() -> None:
    module = TdModule()
    kernel = machine(module, sysfs=False, configfs_rtmrs=True)
    kernel.mkdir(f"{RTMRS}/rtmr2-x")
    handle = kernel.open(f"{RTMRS}/rtmr2-x/index", "w")
    kernel.write(handle, b"2")
    kernel.close(handle)
    for _ in range(2):
        extend_rtmr3(kernel, bytes(48))
    assert len(kernel.listdir(RTMRS)) == 2


@pytest.mark.parametrize(
    "module",
    [
        TdModule(mr_config_id=hashlib.sha256(b"other").digest() + bytes(16)),
        TdModule(mr_config_id=hashlib.sha256(LAUNCH).digest() + b"\1" * 16),
        TdModule(rtmr=[bytes(48)] * 3 + [hashlib.sha384(b"other").digest()]),
        TdModule(rtmr=[bytes(48)] * 3 + [hashlib.sha384(LAUNCH).digest()]),
    ],
)
def test_another_launch_config_in_hardware_is_refused_and_nothing_extended(module: TdModule) -> None:
    before = module.rtmr[3]
    source, _ = guest(module)
    with pytest.raises(NotTrusted):
        source.fix_launch(LAUNCH)
    assert module.rtmr[3] == before


def test_a_second_extend_in_the_same_moment_is_noticed() -> None:
    module = TdModule()
    source, _ = guest(module)
    extend = module.extend
    module.extend = lambda index, data: (extend(index, data), extend(index, b"x" * 48))[0]  # type: ignore[method-assign]
    with pytest.raises(NotTrusted, match="Somebody else"):
        source.fix_launch(LAUNCH)


def test_a_kernel_that_cannot_extend_is_told() -> None:
    source, _ = guest(sysfs=False)
    with pytest.raises(ConnectionFailed) as caught:
        source.fix_launch(LAUNCH)
    assert "MRCONFIGID" in caught.value.hint


@pytest.mark.parametrize("size", [0, 47, 49])
def test_rtmr3_is_extended_by_48_bytes(size: int) -> None:
    module = TdModule()
    with pytest.raises(MalformedEvidence):
        extend_rtmr3(machine(module), bytes(size))
    assert module.rtmr[3] == bytes(48)


def test_a_register_of_another_length_is_refused() -> None:
    kernel = machine(TdModule(mr_config_id=bytes(47)), device=False)
    with pytest.raises(MalformedEvidence, match="48"):
        read_registers(kernel)


def test_the_device_may_be_closed_to_us() -> None:
    kernel = machine(TdModule())
    kernel.refused[DEVICE] = errno.EACCES
    with pytest.raises(ConnectionFailed) as caught:
        read_registers(kernel)
    assert caught.value.got == "EACCES"
    assert kernel.exists(MEASUREMENTS)


@pytest.mark.parametrize("nonce", [b"", bytes(32)])
def test_takes_a_nonce_that_is_in_the_question_already(nonce: bytes) -> None:
    assert guest()[0].collect(DATA, nonce=nonce)


def test_refuses_a_nonce_of_another_size() -> None:
    with pytest.raises(WrongUse):
        guest()[0].collect(DATA, nonce=bytes(31))
