import os
import socket
import stat
import threading
from pathlib import Path

import cbor2
import pytest
from cryptography import x509

from cloister.errors import WrongUse
from cloister.evidence.simulated import parse_report
from cloister.sim import Device, LaunchedEnclave, Measurement

NOW = 1_800_000_000.0
MEASUREMENT = Measurement(code="sha256:00", interpreter="cpython", engine="sha256:11")
LAUNCH = bytes(range(32))


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    return Device.open(tmp_path_factory.mktemp("device") / "sim", now=NOW)


def ask(enclave: LaunchedEnclave, request: bytes) -> bytes:
    """Over a duplicate of the enclave's descriptor, so that closing it is not the enclave's end."""
    with socket.socket(fileno=os.dup(enclave.fd)) as end:
        end.settimeout(60)
        end.sendall(request)
        length = int.from_bytes(end.recv(4, socket.MSG_WAITALL), "big")
        return end.recv(length, socket.MSG_WAITALL)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_answers_64_bytes_with_evidence_over_them(device: Device) -> None:
    with device.launch(MEASUREMENT, LAUNCH) as enclave:
        for data in (bytes(64), bytes(range(64))):
            items = cbor2.loads(ask(enclave, data))
            assert [media_type for media_type, _ in items.values()] == [
                "application/vnd.cloister.sim-report+cbor",
                "application/cbor",
            ]
            body = parse_report(items["cpu"][1]).body
            assert (body.report_data, body.launch_sha256) == (data, LAUNCH)
            assert dict(body.components) == dict(MEASUREMENT.components())


def test_a_question_may_arrive_in_pieces(device: Device) -> None:
    with device.launch(MEASUREMENT, LAUNCH) as enclave, socket.socket(fileno=os.dup(enclave.fd)) as end:
        end.sendall(b"\x01" * 10)
        assert cbor2.loads(ask(enclave, b"\x01" * 54))["cpu"]


def test_ends_when_the_enclave_does(device: Device) -> None:
    enclave = device.launch(MEASUREMENT, LAUNCH)
    child = os.dup(enclave.fd)
    enclave.handed_over()
    os.close(child)
    enclave._thread.join(60)
    assert not enclave._thread.is_alive()
    enclave.close()


def test_closing_ends_it_twice_over(device: Device) -> None:
    enclave = device.launch(MEASUREMENT, LAUNCH)
    child = os.dup(enclave.fd)
    enclave.close()
    enclave.close()
    with socket.socket(fileno=child) as end:
        assert end.recv(1) == b""
    assert not enclave._thread.is_alive()


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_launch_digest_of_another_size_is_refused(device: Device, size: int) -> None:
    with pytest.raises(WrongUse):
        device.launch(MEASUREMENT, bytes(size))


def test_keys_are_made_once_and_kept_private(tmp_path: Path) -> None:
    state = tmp_path / "state" / "sim"
    first = Device.open(state, now=NOW).root_pem
    assert Device.open(state, now=NOW + 5).root_pem == first
    assert [path.name for path in state.iterdir()] == ["device.pem"]
    assert (mode(state), mode(state / "device.pem")) == (0o700, 0o600)


def test_the_roots_key_is_forgotten(tmp_path: Path) -> None:
    Device.open(tmp_path / "sim", now=NOW)
    assert (tmp_path / "sim" / "device.pem").read_bytes().count(
        b"PRIVATE KEY-----\n"
    ) == 2  # begin and end of the chip's


def test_every_machine_has_another_root(tmp_path: Path) -> None:
    one, two = (x509.load_pem_x509_certificate(Device.open(tmp_path / n, now=NOW).root_pem) for n in ("a", "b"))
    assert one.subject != two.subject
    assert one.public_key() != two.public_key()


def test_two_that_start_at_once_end_with_the_same_keys(tmp_path: Path) -> None:
    roots: list[bytes] = []
    threads = [threading.Thread(target=lambda: roots.append(Device.open(tmp_path / "sim").root_pem)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(roots) == 6
    assert len(set(roots)) == 1
    assert [path.name for path in (tmp_path / "sim").iterdir()] == ["device.pem"]


@pytest.mark.parametrize("name", [".", "device.pem"])
def test_refuses_keys_that_others_can_reach(tmp_path: Path, name: str) -> None:
    Device.open(tmp_path / "sim", now=NOW)
    path = tmp_path / "sim" / name
    path.chmod(mode(path) | 0o040)
    with pytest.raises(WrongUse, match="Others"):
        Device.open(tmp_path / "sim", now=NOW)


def test_refuses_keys_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Device.open(tmp_path / "sim", now=NOW)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(WrongUse, match="Others"):
        Device.open(tmp_path / "sim", now=NOW)


@pytest.mark.parametrize("cut", [0, 100, 900])
def test_refuses_a_damaged_key_file(tmp_path: Path, cut: int) -> None:
    Device.open(tmp_path / "sim", now=NOW)
    path = tmp_path / "sim" / "device.pem"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WrongUse, match="damaged"):
        Device.open(tmp_path / "sim", now=NOW)


def test_refuses_a_chip_key_that_is_not_the_certified_one(tmp_path: Path) -> None:
    Device.open(tmp_path / "a", now=NOW)
    Device.open(tmp_path / "b", now=NOW)
    path = tmp_path / "a" / "device.pem"
    marker = b"-----END PRIVATE KEY-----\n"
    key, rest = (tmp_path / "b" / "device.pem").read_bytes().split(marker)[0], path.read_bytes().split(marker)[1]
    path.write_bytes(key + marker + rest)
    with pytest.raises(WrongUse, match="damaged"):
        Device.open(tmp_path / "a", now=NOW)
