from dataclasses import replace
from pathlib import Path

import pytest

from cloister.cli.backend import ProcessBackend
from cloister.enclave.boot import EnclaveConfig
from cloister.errors import WrongUse
from cloister.evidence.launch import App, LaunchConfig
from cloister.host.backend import Spawn
from cloister.sim import Device

CONFIG = EnclaveConfig(platform="sim", api_keys=False)
LAUNCH = LaunchConfig(
    owner_key="ed25519:" + "A" * 43,
    deployment="one",
    release=1,
    app=App("llm", "ab" * 32),
    models=("cd" * 32,),
    config_sha256=CONFIG.digest().hex(),
)


@pytest.fixture
def backend(tmp_path: Path) -> ProcessBackend:
    return ProcessBackend(Device.open(tmp_path / "sim"))


def spawn_of(config: EnclaveConfig, model: str) -> Spawn:
    return Spawn(
        name="one",
        launch=LAUNCH.encode(),
        config=config.encode(),
        bundle=None,
        model=model,
        memory_bytes=1 << 30,
        cores=(0,),
    )


def test_the_hosts_own_servers_are_not_for_apps(backend: ProcessBackend) -> None:
    with pytest.raises(WrongUse, match="own servers"):
        backend.start(spawn_of(replace(CONFIG, upstream="http://127.0.0.1:8000"), "tiny"))


FILES = ["/etc/passwd", "/nowhere", "/etc", "secret.gguf", "../x.gguf", "./tiny", "~/m.gguf", "~nobody/x", "~x-y-z/x"]


@pytest.mark.parametrize("name", FILES)
def test_the_hosts_own_files_are_not_for_apps(
    backend: ProcessBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.gguf").write_bytes(b"GGUF")
    with pytest.raises(WrongUse, match="own files are not for apps"):  # one word for all: what is there is not told
        backend.start(spawn_of(CONFIG, name))


def test_the_operators_policy_pins_what_it_started(backend: ProcessBackend) -> None:
    policy = backend.policy(LAUNCH)
    assert (policy.owner_key, policy.deployment) == (LAUNCH.owner_key, "one")
    assert policy.models == frozenset(LAUNCH.models)
    assert policy.config == LAUNCH.config_sha256
    assert set(policy.measurements["sim"][0]) == {"code", "interpreter", "engine"}
