"""The host's backend `gramine`, as far as a machine without SGX shows it; tests/deploy/test_gramine_start.py starts it."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tests.cli.test_image_gramine import CONFIG, GRAMINE, TINY, few_files, launch_of

import cloister
from cloister.cli import gramine_backend, image_gramine
from cloister.cli.gramine_backend import GramineBackend, epc_bytes
from cloister.cli.image_gramine import Image, measure
from cloister.deploy.gramine_sign import Signed
from cloister.enclave.boot import EnclaveConfig
from cloister.errors import MalformedEvidence, WrongUse
from cloister.evidence.launch import parse_launch
from cloister.host.backend import Spawn

SPAWN = Spawn(
    name="one",
    launch=launch_of(),
    config=CONFIG.encode(),
    bundle=None,
    model="tiny",
    memory_bytes=4 << 30,
    cores=(0,),
)


def signed(folder: Path, _key: Path) -> Signed:
    """As the real signer, by all that is in the manifest."""
    measured = hashlib.sha256((folder / "cloister.manifest").read_bytes()).hexdigest()
    return Signed(measured, "cd" * 32, 0, 0, debug=False)


def with_sgx(root: Path, *epc: str) -> Path:
    """A machine's /dev and /sys, with so much memory for enclaves on each node."""
    (root / "dev").mkdir(parents=True)
    (root / "dev" / "sgx_enclave").touch()
    for at, size in enumerate(epc):
        node = root / "sys" / "devices" / "system" / "node" / f"node{at}" / "x86"
        node.mkdir(parents=True)
        (node / "sgx_total_bytes").write_text(f"{size}\n")
    return root


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GramineBackend:
    """Where gramine-sgx ends at once."""
    program = tmp_path / "bin" / "gramine-sgx"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "state").mkdir()
    monkeypatch.setattr(image_gramine, "collect", few_files)
    monkeypatch.setattr(image_gramine, "code_files", lambda: {"cloister/__init__.py": Path(cloister.__file__)})
    for module in (gramine_backend, image_gramine):
        monkeypatch.setattr(module, "find_gramine", lambda: GRAMINE)
        monkeypatch.setattr(module, "sign", signed)
    return GramineBackend(tmp_path / "enclaves", root=with_sgx(tmp_path / "machine"))


def test_a_machine_without_sgx_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="no SGX") as caught:
        GramineBackend(tmp_path, root=tmp_path)
    assert "firmware" in caught.value.hint


def test_a_machine_without_gramine_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WrongUse, match="not installed") as caught:
        GramineBackend(tmp_path, root=with_sgx(tmp_path / "machine"))
    assert "gramine" in caught.value.hint


@pytest.mark.parametrize(
    "spawn",
    [
        replace(SPAWN, bundle=Path("bundle"), model=None),
        replace(SPAWN, model="/etc/passwd"),
        replace(SPAWN, config=EnclaveConfig(platform="sim").encode()),
        replace(SPAWN, memory_bytes=1 << 20),
    ],
    ids=["sealed", "a file of the host", "another config", "no memory"],
)
def test_what_does_not_run_under_gramine_is_refused(backend: GramineBackend, spawn: Spawn) -> None:
    with pytest.raises(WrongUse):
        backend.start(spawn)


def test_the_operators_policy_pins_what_was_signed(backend: GramineBackend, tmp_path: Path) -> None:
    launch = parse_launch(SPAWN.launch)
    assert backend.policy(launch).measurements == {}
    running = backend.start(SPAWN)
    assert list(running.events()) == []
    policy = backend.policy(launch)
    (folder,) = (tmp_path / "enclaves" / "one").iterdir()
    assert policy.measurements["sgx"][0]["mr_enclave"] == signed(folder, Path()).mr_enclave
    running.stop()
    running.stop()
    assert backend.policy(launch) == policy
    assert (policy.owner_key, policy.app, policy.platforms) == (launch.owner_key, launch.app.sha256, ("sgx",))
    assert backend.policy(replace(launch, release=2)).measurements == {}


def test_an_enclave_larger_than_the_machines_memory_for_enclaves_is_refused(
    backend: GramineBackend, tmp_path: Path
) -> None:
    small = GramineBackend(tmp_path / "small", root=with_sgx(tmp_path / "one", str(1 << 29), str(1 << 29), "nonsense"))
    with pytest.raises(WrongUse, match="less memory"):
        small.start(SPAWN)
    GramineBackend(tmp_path / "large", root=with_sgx(tmp_path / "two", str(1 << 31))).start(SPAWN).stop()


@pytest.mark.parametrize(("epc", "total"), [((), 0), (("1024", "2048"), 3072), (("x",), 0)])
def test_memory_for_enclaves_is_that_of_all_nodes(tmp_path: Path, epc: tuple[str, ...], total: int) -> None:
    assert epc_bytes(with_sgx(tmp_path, *epc)) == total


def test_an_owner_measures_what_the_host_will(backend: GramineBackend) -> None:
    backend.start(SPAWN).stop()
    host = backend.policy(parse_launch(SPAWN.launch)).measurements["sgx"][0]
    image = Image(launch=SPAWN.launch, config=SPAWN.config, model=TINY)
    assert measure(image) == host
    assert measure(replace(image, edmm=True)) != host


def test_a_start_that_ended_or_failed_leaves_nothing(backend: GramineBackend, tmp_path: Path) -> None:
    backend.start(SPAWN).stop()
    with pytest.raises(WrongUse, match="less memory"):
        backend.start(replace(SPAWN, memory_bytes=1 << 20))
    assert [*(tmp_path / "enclaves").iterdir()] == []


def test_what_a_host_that_was_killed_left_is_removed_by_the_next_start(backend: GramineBackend, tmp_path: Path) -> None:
    left = tmp_path / "enclaves" / "one" / "left"
    (left / "root").mkdir(parents=True)
    running = backend.start(SPAWN)
    (folder,) = left.parent.iterdir()
    assert folder != left
    running.stop()


def test_a_start_that_nobody_waits_for_any_more_does_not_touch_the_next_ones_files(
    backend: GramineBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large model may be copied, and hashed, for longer than a stop waits."""
    launch = replace(parse_launch(SPAWN.launch), release=2).encode()
    signing, going_on = threading.Event(), threading.Event()

    def slow(folder: Path, key: Path) -> Signed:
        signing.set()
        assert going_on.wait(60)
        return signed(folder, key)

    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:
        patch.setattr(gramine_backend, "sign", slow)
        first = pool.submit(backend.start, SPAWN)
        try:
            assert signing.wait(60)
            patch.setattr(gramine_backend, "sign", signed)
            late = set((tmp_path / "enclaves" / "one").iterdir())
            second = backend.start(replace(SPAWN, launch=launch))
            (folder,) = set((tmp_path / "enclaves" / "one").iterdir()) - late
            before = (folder / "cloister.manifest").read_text()
        finally:
            going_on.set()
        first.result(60).stop()
    assert not [one for one in late if one.exists()]
    assert (folder / "cloister.manifest").read_text() == before
    assert (folder / "root" / "launch.json").read_bytes() == launch
    second.stop()


def test_a_launch_config_that_is_none_is_malformed(backend: GramineBackend) -> None:
    with pytest.raises(MalformedEvidence):
        backend.start(replace(SPAWN, launch=b"{}"))
