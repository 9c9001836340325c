import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.enclave.attest.fakes.gramine import FakeGramine, machine, sgx_quote
from tests.enclave.attest.fakes.kernel import FakeKernel
from tests.vendors.intel import NOW, sgx, tdx

from cloister.enclave.attest import EvidenceSource
from cloister.enclave.attest.gramine import ATTESTATION, GramineSgx
from cloister.errors import CloisterError, ConnectionFailed, MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.intel import parse_quote
from cloister.verify.intel import judge_sgx
from cloister.verify.policy import Policy

DATA = bytes(range(64))
LAUNCH = b'{"v":1}'


def test_collects_a_quote_that_the_verifier_accepts() -> None:
    kernel = machine()
    source: EvidenceSource = GramineSgx(kernel)
    items = source.collect(DATA)
    assert source.platform == "sgx"
    assert items.keys() == {"cpu"}
    vendor = sgx()
    appraisal = judge_sgx(items["cpu"].content, vendor.collateral, policy=Policy(), now=NOW, root=vendor.root)
    assert appraisal.report_data == DATA
    assert not [factor for factor in appraisal.factors if factor.verdict == "fail"]
    assert not kernel.leaked


@pytest.mark.parametrize("max_read", [1, 1000])
def test_short_reads_give_a_whole_quote(max_read: int) -> None:
    kernel = machine()
    kernel.max_read = max_read
    assert parse_quote(GramineSgx(kernel).collect(DATA)["cpu"].content).report.report_data == DATA


@pytest.mark.parametrize("kind", ["none", "epid", "", "dcap2", "DCAP"])
def test_refuses_another_attestation_type(kind: str) -> None:
    with pytest.raises(NotTrusted) as caught:
        GramineSgx(machine(FakeGramine(kind=kind)))
    assert (caught.value.expected, caught.value.got) == ("dcap", kind)


def test_refuses_to_start_outside_gramine() -> None:
    with pytest.raises(ConnectionFailed) as caught:
        GramineSgx(FakeKernel())
    assert "gramine-sgx" in caught.value.hint


@pytest.mark.parametrize("size", [0, 63, 65])
def test_refuses_another_size_that_gramine_would_fill_up_or_cut(size: int) -> None:
    kernel = machine()
    source = GramineSgx(kernel)
    kernel.opened.clear()
    with pytest.raises(WrongUse):
        source.collect(bytes(size))
    assert not kernel.opened


def test_a_question_that_was_cut_makes_no_quote() -> None:
    kernel = machine()
    source = GramineSgx(kernel)
    kernel.max_write = 32
    with pytest.raises(ConnectionFailed):
        source.collect(DATA)
    assert f"{ATTESTATION}/quote" not in kernel.opened


def test_a_quote_over_an_older_question_is_refused() -> None:
    with pytest.raises(MalformedEvidence, match="another question"):
        GramineSgx(machine(FakeGramine(make=lambda _: sgx_quote(bytes(64))))).collect(DATA)


def test_a_tdx_quote_is_refused() -> None:
    fake = FakeGramine(make=lambda data: tdx(report={"report_data": data}).quote)
    with pytest.raises(MalformedEvidence, match="another question"):
        GramineSgx(machine(fake)).collect(DATA)


def test_no_quote_is_told_with_where_to_look() -> None:
    with pytest.raises(ConnectionFailed) as caught:
        GramineSgx(machine(FakeGramine(no_quote=True))).collect(DATA)
    assert "AESM" in caught.value.hint


def test_threads_of_one_process_never_get_each_others_quote() -> None:
    fake = FakeGramine(slow=0.002)
    sources = [GramineSgx(machine(fake)) for _ in range(2)]
    failures: list[BaseException] = []

    def ask(index: int) -> None:
        data = bytes([index]) * 64
        try:
            content = sources[index % 2].collect(data)["cpu"].content
            assert parse_quote(content).report.report_data == data
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@given(st.binary(max_size=600))
def test_whatever_the_quote_file_holds_only_our_errors_escape(content: bytes) -> None:
    source = GramineSgx(machine(FakeGramine(make=lambda _: content)))
    with pytest.raises(CloisterError):
        source.collect(DATA)


def test_the_launch_config_is_the_trusted_file() -> None:
    source = GramineSgx(machine())
    source.fix_launch(LAUNCH)
    for other in (LAUNCH + b" ", b'{"v":2}'):
        with pytest.raises(NotTrusted):
            source.fix_launch(other)


def test_a_manifest_without_a_launch_config_is_told() -> None:
    with pytest.raises(ConnectionFailed) as caught:
        GramineSgx(machine(FakeGramine(launch=None))).fix_launch(LAUNCH)
    assert "manifest" in caught.value.hint


def test_sets_and_reads_keys() -> None:
    source = GramineSgx(machine())
    source.set_key("default", bytes(range(16)))
    assert source.read_key("default") == bytes(range(16))
    assert source.read_key("_sgx_mrenclave") == b"\x5e" * 16


@pytest.mark.parametrize("name", ["", "_sgx_mrenclave", "../quote", "a/b", "a" * 65, "a\0", "é"])
def test_refuses_names_that_are_no_keys(name: str) -> None:
    with pytest.raises(WrongUse):
        GramineSgx(machine()).set_key(name, bytes(16))


@pytest.mark.parametrize("size", [0, 15, 17, 32])
def test_refuses_keys_of_another_size(size: int) -> None:
    fake = FakeGramine()
    with pytest.raises(WrongUse):
        GramineSgx(machine(fake)).set_key("default", bytes(size))
    assert fake.keys["default"] is None


def test_a_key_of_another_length_is_refused() -> None:
    fake = FakeGramine()
    fake.keys["default"] = bytes(15)
    with pytest.raises(MalformedEvidence):
        GramineSgx(machine(fake)).read_key("default")


def test_a_key_that_was_not_set_or_does_not_exist_is_told() -> None:
    source = GramineSgx(machine(replace(FakeGramine())))
    for name in ("default", "absent"):
        with pytest.raises(ConnectionFailed):
            source.read_key(name)
    with pytest.raises(ConnectionFailed):
        source.set_key("absent", bytes(16))
