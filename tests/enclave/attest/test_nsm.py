import errno
import hashlib
from collections.abc import Callable

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.enclave.attest.fakes.kernel import FakeKernel
from tests.enclave.attest.fakes.nsm import FakeModule, machine
from tests.vendors import aws
from tests.vendors.p384 import NOW

from cloister.enclave.attest import EvidenceSource
from cloister.enclave.attest.nsm import DEVICE, Nitro, Nsm
from cloister.errors import CloisterError, ConnectionFailed, MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.nitro import launch_pcr, parse_document
from cloister.verify.nitro import judge
from cloister.verify.policy import Policy

DATA = bytes(range(64))
NONCE = bytes(range(100, 132))
LAUNCH = b'{"v":1}'


def enclave(module: FakeModule) -> Nitro:
    return Nitro(Nsm(machine(module)))


def test_collects_a_document_that_the_verifier_accepts() -> None:
    source = enclave(FakeModule())
    seam: EvidenceSource = source
    source.fix_launch(LAUNCH)
    items = source.collect(DATA, nonce=NONCE)
    assert seam.platform == "nitro"
    assert items.keys() == {"cpu"}
    assert items["cpu"].media_type == "application/cose"
    judged = judge(
        items["cpu"].content,
        policy=Policy(),
        now=NOW,
        launch=LAUNCH,
        nonce=NONCE,
        root_sha256=aws.nitro().root_sha256,
    )
    assert judged.report_data == DATA
    assert judged.launch_sha256 == hashlib.sha256(LAUNCH).digest()
    assert not [factor for factor in judged.factors if factor.verdict == "fail"]


def test_without_a_nonce_the_document_has_none() -> None:
    assert parse_document(enclave(FakeModule()).collect(DATA)["cpu"].content).nonce is None


@pytest.mark.parametrize(("size", "nonce"), [(63, 0), (65, 0), (64, 31), (64, 64)])
def test_refuses_other_sizes_before_it_asks(size: int, nonce: int) -> None:
    module = FakeModule()
    with pytest.raises(WrongUse):
        enclave(module).collect(bytes(size), nonce=bytes(nonce))
    assert not module.questions


def test_a_document_over_another_question_is_refused() -> None:
    for changes in ({"user_data": bytes(64), "nonce": NONCE}, {"user_data": DATA, "nonce": None}):
        answer = cbor2.dumps({"Attestation": {"document": aws.document(**changes)}})
        with pytest.raises(MalformedEvidence, match="another question"):
            enclave(FakeModule(answer=answer)).collect(DATA, nonce=NONCE)


def test_the_launch_config_is_extended_into_pcr16_once_and_locked() -> None:
    module = FakeModule()
    source = enclave(module)
    for _ in range(2):
        source.fix_launch(LAUNCH)
        assert module.pcrs[16] == launch_pcr(LAUNCH)
        assert 16 in module.locked
    assert module.questions.count("ExtendPCR") == 1
    assert module.questions.count("LockPCR") == 1


def test_one_that_was_extended_and_not_locked_is_locked() -> None:
    module = FakeModule()
    module.pcrs[16] = launch_pcr(LAUNCH)
    enclave(module).fix_launch(LAUNCH)
    assert 16 in module.locked
    assert module.pcrs[16] == launch_pcr(LAUNCH)


@pytest.mark.parametrize(
    ("value", "locked"),
    [
        (launch_pcr(b"other"), True),
        (launch_pcr(b"other"), False),
        (bytes(48), True),
        (hashlib.sha384(launch_pcr(LAUNCH) + hashlib.sha384(LAUNCH).digest()).digest(), False),
    ],
)
def test_anything_else_in_pcr16_is_refused(value: bytes, locked: bool) -> None:
    module = FakeModule()
    module.pcrs[16] = value
    module.locked |= {16} if locked else set()
    with pytest.raises(NotTrusted):
        enclave(module).fix_launch(LAUNCH)
    assert "LockPCR" not in module.questions


def test_an_extend_by_another_process_in_the_same_moment_is_noticed() -> None:
    def race(module: FakeModule, name: str) -> None:
        if name == "ExtendPCR":
            module.pcrs[16] = hashlib.sha384(module.pcrs[16] + b"x" * 48).digest()

    module = FakeModule(race=race)
    with pytest.raises(NotTrusted):
        enclave(module).fix_launch(LAUNCH)
    assert 16 not in module.locked


def test_the_modules_refusals_are_told_by_its_own_word() -> None:
    nsm = Nsm(machine(FakeModule()))
    for ask, code in (
        (lambda: nsm.describe_pcr(99), "InvalidIndex"),
        (lambda: nsm.extend_pcr(0, bytes(48)), "ReadOnlyIndex"),
        (lambda: nsm.lock_pcr(3), "ReadOnlyIndex"),
        (lambda: nsm.extend_pcr(20, b""), "InvalidArgument"),
    ):
        with pytest.raises(ConnectionFailed) as caught:
            ask()
        assert caught.value.got == code


def test_control_characters_in_the_modules_word_do_not_reach_a_terminal() -> None:
    with pytest.raises(ConnectionFailed) as caught:
        Nsm(machine(FakeModule(answer=cbor2.dumps({"Error": "\x1b[2J"})))).lock_pcr(16)
    assert "\x1b" not in (caught.value.got or "")


def test_too_long_a_question_is_refused_by_the_kernel() -> None:
    with pytest.raises(ConnectionFailed) as caught:
        Nsm(machine(FakeModule())).extend_pcr(20, bytes(5000))
    assert caught.value.got == "EMSGSIZE"


def test_an_answer_that_was_cut_to_the_buffer_is_refused() -> None:
    answer = cbor2.dumps({"Attestation": {"document": bytes(20_000)}})
    with pytest.raises(MalformedEvidence):
        enclave(FakeModule(answer=answer)).collect(DATA)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        "Attestation",
        {"Attestation": {}},
        {"Attestation": {"document": "text"}},
        {"Attestation": []},
        {"GetRandom": {"random": b""}},
        {"Attestation": {"document": b""}, "Error": "x"},
    ],
)
def test_answers_of_another_form_are_refused(answer: object) -> None:
    with pytest.raises(MalformedEvidence):
        enclave(FakeModule(answer=cbor2.dumps(answer))).collect(DATA)


@pytest.mark.parametrize("content", [{"lock": 1, "data": bytes(48)}, {"lock": True, "data": bytes(32)}, {"lock": True}])
def test_a_pcr_of_another_form_is_refused(content: object) -> None:
    with pytest.raises(MalformedEvidence):
        Nsm(machine(FakeModule(answer=cbor2.dumps({"DescribePCR": content})))).describe_pcr(16)


@given(st.binary(max_size=200))
def test_whatever_the_module_answers_only_our_errors_escape(answer: bytes) -> None:
    calls: list[Callable[[Nitro], object]] = [
        lambda source: source.collect(DATA),
        lambda source: source.fix_launch(LAUNCH),
    ]
    for call in calls:
        with pytest.raises(CloisterError):
            call(enclave(FakeModule(answer=answer)))


def test_outside_an_enclave_the_missing_device_is_told() -> None:
    with pytest.raises(ConnectionFailed) as caught:
        Nitro(Nsm(FakeKernel())).collect(DATA)
    assert "Nitro" in caught.value.hint
    kernel = machine(FakeModule())
    kernel.refused[DEVICE] = errno.EACCES
    with pytest.raises(ConnectionFailed):
        Nitro(Nsm(kernel)).collect(DATA)
    assert not kernel.leaked
