import errno
import hashlib
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.enclave.attest.fakes.kernel import FakeKernel
from tests.enclave.attest.fakes.sev import PAGE, Firmware, genuine, machine, tsm_of, whole_table
from tests.enclave.attest.fakes.tsm import FakeTsm
from tests.vendors import amd

from cloister.enclave.attest import EvidenceSource
from cloister.enclave.attest.sev_guest import DEVICE, read_extended_report
from cloister.enclave.attest.sev_snp import SevSnp, snp_endorsements
from cloister.enclave.attest.tsm import ConfigfsTsm
from cloister.errors import CloisterError, ConnectionFailed, MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.endorsements import Endorsements, parse_endorsements
from cloister.evidence.sev_snp import VCEK, parse_report
from cloister.verify.policy import Policy, Tcb
from cloister.verify.sev_snp import judge

DATA = bytes(range(64))
LAUNCH = b'{"v":1}'
VECTOR = Path(__file__).resolve().parents[4] / "shared/vectors/sev-snp/veraison/genoa_v3_tsm/auxblob.bin"


def source_on(kernel: FakeKernel) -> SevSnp:
    return SevSnp(kernel, ConfigfsTsm(kernel, pause=lambda _: None))


def by_tsm(firmware: Firmware) -> SevSnp:
    return source_on(machine(firmware, tsm=tsm_of(firmware)))


def by_ioctl(firmware: Firmware) -> SevSnp:
    return source_on(machine(firmware))


@pytest.mark.parametrize("made", [by_tsm, by_ioctl])
def test_collects_what_the_verifier_accepts(made: object) -> None:
    source: EvidenceSource = made(Firmware(table=whole_table()))  # type: ignore[operator]
    items = source.collect(DATA)
    assert source.platform == "sev-snp"
    assert items.keys() == {"cpu", "endorsements"}
    vendor = genuine()
    given = parse_endorsements(items["endorsements"].content)
    judged = judge(
        items["cpu"].content,
        given.amd,
        vendor.crl,
        policy=Policy(tcb=Tcb(min_sev_snp={"snp": 0})),
        now=amd.NOW,
        roots=vendor.roots,
    )
    assert judged.report_data == DATA
    assert not [factor for factor in judged.factors if factor.verdict == "fail"]


@pytest.mark.parametrize("made", [by_tsm, by_ioctl])
def test_a_host_without_certificates_gives_the_report_alone(made: object) -> None:
    items = made(Firmware()).collect(DATA)  # type: ignore[operator]
    assert items.keys() == {"cpu"}


@pytest.mark.parametrize("table", [whole_table()[:200], b"\xff" * 4000])
def test_a_table_that_is_broken_is_passed_over(table: bytes) -> None:
    assert by_tsm(Firmware(table=table)).collect(DATA).keys() == {"cpu"}


def test_of_a_hosts_table_what_is_there_is_handed_out() -> None:
    chain = genuine().chain
    assert snp_endorsements(whole_table(), VCEK) == Endorsements(amd=chain)
    assert snp_endorsements(amd.certificate_table({"vcek": chain[0]}), VCEK).amd == chain[:1]
    assert snp_endorsements(amd.certificate_table({"crl": genuine().crl or b""}), VCEK).amd_crl == genuine().crl


@pytest.mark.skipif(not VECTOR.exists(), reason="../shared/vectors is not here")
def test_a_real_certificate_table_becomes_a_chain_of_three() -> None:
    assert len(snp_endorsements(VECTOR.read_bytes(), VCEK).amd) == 3


@pytest.mark.parametrize("made", [by_tsm, by_ioctl])
def test_the_launch_config_is_host_data(made: object) -> None:
    source = made(Firmware(host_data=hashlib.sha256(LAUNCH).digest()))  # type: ignore[operator]
    source.fix_launch(LAUNCH)
    for other in (LAUNCH + b" ", b"other"):
        with pytest.raises(NotTrusted) as caught:
            source.fix_launch(other)
        assert "host-data" in caught.value.hint


def test_a_report_over_another_question_is_refused() -> None:
    firmware = Firmware()
    tsm = FakeTsm("sev_guest", lambda *_: (firmware.report(bytes(64)), b""))
    with pytest.raises(MalformedEvidence, match="another question"):
        source_on(machine(firmware, tsm=tsm)).collect(DATA)


@given(st.binary(max_size=1300))
def test_whatever_outblob_holds_only_our_errors_escape(content: bytes) -> None:
    tsm = FakeTsm("sev_guest", lambda *_: (content, content))
    with pytest.raises(CloisterError):
        source_on(machine(Firmware(), tsm=tsm)).collect(DATA)


def test_a_guest_below_a_paravisor_makes_no_reports() -> None:
    firmware = Firmware()
    tsm = tsm_of(firmware)
    tsm.floor = 1
    with pytest.raises(NotTrusted):
        source_on(machine(firmware, tsm=tsm)).collect(DATA)


# /dev/sev-guest ---------------------------------------------------------------------------------------------------------


def test_asks_once_where_the_certificates_fit() -> None:
    firmware = Firmware(table=whole_table())
    kernel = machine(firmware)
    report, table = read_extended_report(kernel, DATA)
    assert parse_report(report).report_data == DATA
    assert parse_report(report).vmpl == 0
    assert table == whole_table()
    assert firmware.requests == [4 * PAGE]
    assert not kernel.leaked


def test_gives_as_much_room_as_the_host_asks_for() -> None:
    table = amd.certificate_table({"vcek": genuine().chain[0], "00000000-0000-0000-0000-000000000001": bytes(20_000)})
    firmware = Firmware(table=table)
    assert read_extended_report(machine(firmware), DATA)[1] == table
    assert firmware.requests == [4 * PAGE, 6 * PAGE]


def test_a_kernel_that_does_not_allow_that_much_gives_the_report_alone() -> None:
    firmware = Firmware(
        table=amd.certificate_table({"00000000-0000-0000-0000-000000000001": bytes(20_000)}), room=4 * PAGE
    )
    report, table = read_extended_report(machine(firmware), DATA)
    assert parse_report(report).report_data == DATA
    assert table == b""
    assert firmware.requests == [4 * PAGE, 0]


def test_a_host_that_asks_for_more_each_time_gets_no_more_than_three_answers() -> None:
    firmware = Firmware(grows=True)
    report, table = read_extended_report(machine(firmware), DATA)
    assert parse_report(report).report_data == DATA
    assert table == b""
    assert firmware.requests == [4 * PAGE, 5 * PAGE, 6 * PAGE, 0]


def test_a_host_that_asks_for_far_too_much_gets_the_report_alone() -> None:
    firmware = Firmware(table=bytes([1]) * (17 * PAGE), room=64 * PAGE)
    assert read_extended_report(machine(firmware), DATA)[1] == b""
    assert firmware.requests == [4 * PAGE, 0]


def test_zeros_at_a_certificates_end_stay() -> None:
    table = amd.certificate_table({"vcek": b"\x30" + bytes(40)})
    assert read_extended_report(machine(Firmware(table=table)), DATA)[1] == table


@pytest.mark.parametrize("number", [errno.ENOTTY, errno.ETIMEDOUT, errno.EIO, errno.EINVAL, errno.EBADMSG])
def test_the_kernels_refusals_are_told(number: int) -> None:
    firmware = Firmware(error=number)
    kernel = machine(firmware)
    with pytest.raises(ConnectionFailed) as caught:
        read_extended_report(kernel, DATA)
    assert caught.value.got == errno.errorcode[number]
    assert firmware.requests == [4 * PAGE]
    assert not kernel.leaked


def test_the_firmwares_report_over_another_question_is_refused() -> None:
    with pytest.raises(MalformedEvidence, match="another question"):
        read_extended_report(machine(Firmware(stale=True)), DATA)


def test_the_firmwares_refusal_is_told() -> None:
    with pytest.raises(ConnectionFailed) as caught:
        read_extended_report(machine(Firmware(status=0x16)), DATA)
    assert caught.value.got == "status 0x16"


def test_outside_a_guest_the_missing_device_is_told() -> None:
    with pytest.raises(ConnectionFailed) as caught:
        read_extended_report(FakeKernel(), DATA)
    assert "SEV-SNP" in caught.value.hint


@pytest.mark.parametrize("size", [0, 63, 65])
def test_refuses_another_size_before_it_asks(size: int) -> None:
    firmware = Firmware()
    for source in (by_tsm(firmware), by_ioctl(firmware)):
        with pytest.raises(WrongUse):
            source.collect(bytes(size))
    assert not firmware.requests


def test_threads_get_their_own_reports() -> None:
    kernel = machine(Firmware())
    got: dict[int, bytes] = {}

    def ask(index: int) -> None:
        got[index] = parse_report(read_extended_report(kernel, bytes([index]) * 64)[0]).report_data

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {index: bytes([index]) * 64 for index in range(6)}
    assert kernel.opened.count(DEVICE) == 6
