import base64
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from tests.enclave.attest.fakes.tpm import FakeTpm

from cloister.enclave import machine
from cloister.enclave.attest.tpm import Tpm
from cloister.enclave.boot import Boot, EnclaveConfig, KeyHash, parse_boot
from cloister.enclave.llm.llama.weights import seal_weights
from cloister.enclave.machine import MAX_LINE, Disks, parse_line, prepare, seal_model
from cloister.errors import CloisterError, MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.launch import App, LaunchConfig, launch_digest
from cloister.host.qemu import BootLine

CONFIG = EnclaveConfig(platform="vtpm").encode()
LAUNCH = LaunchConfig(
    owner_key="ed25519:" + "A" * 43,
    deployment="acme-chat",
    release=1,
    app=App("llm", "11" * 32),
    models=("22" * 32,),
    config_sha256=hashlib.sha256(CONFIG).hexdigest(),
).encode()
MODEL = b"GGUF" + bytes(range(256)) * 5
BUNDLE = b"cloister-bundle\0" + bytes(100)
EK = FakeTpm().ek
OTHERS = {"sda": b"\x55\xaa" * 256, "loop0": b'{"v":1}\n', "dm-0": MODEL, "vda1": b'{"v":1}\n'}


def line(**changes: Any) -> bytes:
    raw = {"v": 1, "launch": base64.b64encode(LAUNCH).decode(), "config": base64.b64encode(CONFIG).decode(), **changes}
    return json.dumps({name: value for name, value in raw.items() if value is not None}).encode() + b"\n"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def disks(folder: Path, **content: bytes) -> Disks:
    """A machine's block devices; a disk's content ends on a whole sector. No waiting: two looks, then it gives up."""
    (folder / "class").mkdir(exist_ok=True)
    for name, data in {**OTHERS, **content}.items():
        (folder / "class" / name.replace("_", "-")).mkdir(exist_ok=True)
        (folder / name.replace("_", "-")).write_bytes(data + bytes(-len(data) % 512))
    times = iter([0.0, 1.0, 61.0, 62.0, 63.0])
    return Disks(folder / "class", folder, sleep=lambda _: None, clock=lambda: next(times))


def prepared(found: Disks, fake: FakeTpm) -> Boot:
    return parse_boot(prepare(found, Tpm(fake), engine_dir="/engine").encode())


def close(boot: Boot) -> None:
    os.close(boot.listen_fd)
    if boot.model_path:
        os.close(int(Path(boot.model_path).name))


def test_the_hosts_line_is_read_as_it_was_meant() -> None:
    sent = BootLine(launch=LAUNCH, config=CONFIG, data="model", data_bytes=7, model_name="tiny").encode()
    got = parse_line(sent + b"whatever follows")
    assert (got.launch, got.config, got.data, got.data_bytes, got.model_name) == (LAUNCH, CONFIG, "model", 7, "tiny")
    assert (got.port, got.api_keys, got.endorsements) == (8484, (), b"")


def test_a_line_may_name_a_port_keys_and_endorsements() -> None:
    keys = [{"name": "alice", "sha256": "ab" * 32}]
    got = parse_line(line(port=9, api_keys=keys, endorsements=base64.b64encode(b"collateral").decode()))
    assert (got.port, got.api_keys, got.endorsements) == (9, (KeyHash("alice", "ab" * 32),), b"collateral")
    assert (got.data, got.model_name) == (None, "model")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"{}\n",
        b"[]\n",
        line()[:-1],
        b'{"v":1,"v":1}\n',
        line(v=2),
        line(launch=None),
        line(config="§"),
        line(config=7),
        line(data="disk"),
        line(data=7),
        line(data_bytes=-1),
        line(data_bytes=1 << 43),
        line(model_name="a\x1b[2J"),
        line(model_name=None, surprise=1),
        line(port=0),
        line(port=65536),
        line(api_keys={}),
        line(api_keys=[{"name": "a"}]),
        line(api_keys=[{"name": "a b", "sha256": "ab" * 32}]),
        line(api_keys=[{"name": "a", "sha256": "ab" * 32, "more": 1}]),
        line(endorsements="?"),
        b'{"a":"' + bytes([97]) * MAX_LINE,
    ],
    ids=range(24),
)
def test_another_line_is_refused(content: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_line(content)


def test_disks_are_told_apart_by_what_they_begin_with(tmp_path: Path) -> None:
    found = disks(tmp_path, vdb=line(), nvme0n1=MODEL, xvda=BUNDLE)
    assert found.find(b'{"', "boot") == tmp_path / "vdb"
    assert found.find(b"GGUF", "model") == tmp_path / "nvme0n1"
    assert found.find(b"cloister-bundle\0", "bundle") == tmp_path / "xvda"


def test_a_disk_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    found = disks(tmp_path)

    def attach(_: float) -> None:
        disks(tmp_path, vdc=line())

    late = Disks(found.devices, found.nodes, sleep=attach, clock=lambda: 0.0)
    assert late.find(b'{"', "boot") == tmp_path / "vdc"


def test_a_missing_disk_and_two_of_a_kind_are_told(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="no boot disk"):
        disks(tmp_path).find(b'{"', "boot")
    with pytest.raises(WrongUse, match="several boot disks") as caught:
        disks(tmp_path, vdb=line(), vdc=line()).find(b'{"', "boot")
    assert caught.value.got == "vdb vdc"


def test_a_model_is_copied_up_to_its_end_into_memory_that_the_engine_takes_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(MODEL + bytes(300))
    fd = seal_model(tmp_path / "disk", len(MODEL))
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    with seal_weights(Path(f"/proc/self/fd/{fd}")) as weights:
        assert (weights.sha256, weights.size) == (hashlib.sha256(MODEL).hexdigest(), len(MODEL))
        assert os.fstat(weights.fd).st_ino == os.fstat(fd).st_ino
    os.close(fd)


def test_a_disk_shorter_than_was_said_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(MODEL)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path, size in ((tmp_path / "disk", len(MODEL) + 1), (tmp_path / "none", 1)):
        with pytest.raises(WrongUse):
            seal_model(path, size)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_launch_config_is_in_hardware_before_anything_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, port = FakeTpm(ek=EK), free_port()
    listen, seen = machine._listen, []

    def listening(number: int) -> int:
        seen.append(fake.pcrs[14])
        return listen(number)

    monkeypatch.setattr(machine, "_listen", listening)
    given = line(data="model", data_bytes=len(MODEL), model_name="tiny", port=port, endorsements="YWI=")
    boot = prepared(disks(tmp_path, vdb=given, vdc=MODEL), fake)
    assert seen == [hashlib.sha256(bytes(32) + launch_digest(LAUNCH)).digest()]
    assert (boot.launch, boot.config, boot.model_name, boot.engine_dir) == (LAUNCH, CONFIG, "tiny", "/engine")
    assert (boot.bundle_path, boot.device_fd) == ("", None)
    assert Path(boot.model_path).read_bytes() == MODEL
    assert Path(boot.endorsements_path).read_bytes() == b"ab"
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    close(boot)


def test_a_bundle_is_read_where_it_lies(tmp_path: Path) -> None:
    boot = prepared(disks(tmp_path, vdb=line(data="bundle", port=free_port()), nvme1n1=BUNDLE), FakeTpm(ek=EK))
    assert (boot.bundle_path, boot.model_path) == (str(tmp_path / "nvme1n1"), "")
    close(boot)


def test_a_launch_config_that_the_cpu_holds_is_left_to_it(tmp_path: Path) -> None:
    config = base64.b64encode(EnclaveConfig(platform="tdx").encode()).decode()
    fake = FakeTpm(ek=EK)
    boot = prepared(disks(tmp_path, vdb=line(config=config, port=free_port())), fake)
    assert fake.commands == []
    close(boot)


@pytest.mark.parametrize("changes", [{"launch": "e30="}, {"config": "e30="}])
def test_nothing_is_extended_for_what_is_no_launch_config_and_no_config(
    tmp_path: Path, changes: dict[str, str]
) -> None:
    fake = FakeTpm(ek=EK)
    with pytest.raises(CloisterError):
        prepared(disks(tmp_path, vdb=line(**changes)), fake)
    assert fake.commands == []


def test_a_machine_that_was_launched_otherwise_does_not_start(tmp_path: Path) -> None:
    fake, port = FakeTpm(ek=EK), free_port()
    fake.extend(14, hashlib.sha256(b"another launch config").digest())
    with pytest.raises(NotTrusted):
        prepared(disks(tmp_path, vdb=line(port=port)), fake)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with (
        socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken,
        pytest.raises(WrongUse, match="Cannot listen"),
    ):
        prepared(disks(tmp_path, vdb=line(port=taken.getsockname()[1])), FakeTpm(ek=EK))


def test_a_second_listener_is_opened_where_the_host_names_its_port(tmp_path: Path) -> None:
    port = free_port()
    given = line(port=free_port(), tls_port=port, tls_origins=["https://a.example:8485"], founds_group=True)
    boot = prepared(disks(tmp_path, vdb=given), FakeTpm(ek=EK))
    assert boot.tls_fd is not None
    assert (boot.tls_origins, boot.founds_group) == (("https://a.example:8485",), True)
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    os.close(boot.tls_fd)
    close(boot)
