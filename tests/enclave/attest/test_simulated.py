import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import cbor2
import pytest

from cloister.enclave.attest import EvidenceSource
from cloister.enclave.attest.simulated import SimulatedTee
from cloister.errors import ConnectionFailed, MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.launch import launch_digest
from cloister.evidence.simulated import parse_report
from cloister.sim import Device, LaunchedEnclave, Measurement

LAUNCH = b'{"deployment":"here"}'
DATA = bytes(range(64))


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    return Device.open(tmp_path_factory.mktemp("device") / "sim")


@pytest.fixture
def enclave(device: Device) -> Iterator[LaunchedEnclave]:
    with device.launch(Measurement("sha256:00", "cpython", "sha256:11"), launch_digest(LAUNCH)) as enclave:
        yield enclave


@pytest.fixture
def tee(enclave: LaunchedEnclave) -> Iterator[SimulatedTee]:
    source = SimulatedTee(os.dup(enclave.fd))
    enclave.handed_over()
    yield source
    source.close()


def framed(answer: bytes) -> bytes:
    return len(answer).to_bytes(4, "big") + answer


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[SimulatedTee]:
    """A driver in front of hardware that says `answer` to anything, and hangs up."""
    here, there = socket.socketpair()
    source = SimulatedTee(there.detach(), timeout=60.0)
    with here, contextlib.closing(source):
        here.sendall(answer)
        here.shutdown(socket.SHUT_WR)
        yield source


def test_collects_evidence(tee: SimulatedTee) -> None:
    source: EvidenceSource = tee
    items = source.collect(DATA)
    assert source.platform == "sim"
    assert items.keys() == {"cpu", "endorsements"}
    assert parse_report(items["cpu"].content).body.report_data == DATA


def test_compares_the_launch_config_with_its_own_report(tee: SimulatedTee) -> None:
    tee.fix_launch(LAUNCH)
    with pytest.raises(NotTrusted):
        tee.fix_launch(LAUNCH + b" ")


def test_threads_take_turns(tee: SimulatedTee) -> None:
    got: dict[bytes, bytes] = {}

    def collect(data: bytes) -> None:
        got[data] = parse_report(tee.collect(data)["cpu"].content).body.report_data

    threads = [threading.Thread(target=collect, args=(bytes([n]) * 64,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert all(asked == answered for asked, answered in got.items())


@pytest.mark.parametrize("size", [0, 32, 63, 65])
def test_refuses_report_data_of_another_size(tee: SimulatedTee, size: int) -> None:
    with pytest.raises(WrongUse):
        tee.collect(bytes(size))
    tee.fix_launch(LAUNCH)


def test_hardware_that_is_gone_is_unreachable(tee: SimulatedTee, enclave: LaunchedEnclave) -> None:
    enclave.close()
    for _ in range(2):
        with pytest.raises(ConnectionFailed):
            tee.collect(DATA)


def test_silent_hardware_is_unreachable_and_not_asked_again() -> None:
    here, there = socket.socketpair()
    source = SimulatedTee(there.detach(), timeout=0.05)
    with here:
        for _ in range(2):
            with pytest.raises(ConnectionFailed):
                source.collect(DATA)
        assert here.recv(200) == DATA


def test_an_answer_to_another_question_is_refused(enclave: LaunchedEnclave) -> None:
    items = {label: [item.media_type, item.content] for label, item in enclave.report(bytes(64)).items()}
    answer = cbor2.dumps(items)
    with answering(framed(answer)) as source, pytest.raises(MalformedEvidence, match="another question"):
        source.collect(DATA)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"cpu": ["a/b", b""]},
        {"cpu": ["a/b", b""], "endorsements": []},
        {"cpu": ["a/b", b""], "endorsements": ["a/b", "text"]},
        {"cpu": ["a/b", b""], "endorsements": [1, b""]},
        {"cpu": ["a/b", b""], "endorsements": ["a/b", b""]},
    ],
)
def test_refuses_answers_of_another_shape(value: object) -> None:
    with answering(framed(cbor2.dumps(value))) as source, pytest.raises(MalformedEvidence):
        source.collect(DATA)


def test_refuses_an_answer_too_long_to_be_one() -> None:
    with answering(b"\xff\xff\xff\xff") as source, pytest.raises(MalformedEvidence, match="too long"):
        source.collect(DATA)


def test_refuses_truncated_answers(enclave: LaunchedEnclave) -> None:
    items = {label: [item.media_type, item.content] for label, item in enclave.report(DATA).items()}
    whole = framed(cbor2.dumps(items))
    for length in range(0, len(whole), 37):
        with answering(whole[:length]) as source, pytest.raises(ConnectionFailed):
            source.collect(DATA)
    with answering(whole) as source:
        assert source.collect(DATA)
