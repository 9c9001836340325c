"""The measured image with the engine in it, from its sources to a chat: built, predicted, booted, verified, released to,
talked to. Minutes: run by `make test-image`, not in CI (`test_app_image` is)."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.system.image_stage import (
    Built,
    Guest,
    SoftwareTpm,
    booted,
    build,
    in_sectors,
    make_tpm,
    policy_text,
    seal,
)
from tests.system.shell import Shell

from cloister.client import http_client
from cloister.enclave.boot import EnclaveConfig
from cloister.evidence.launch import App, LaunchConfig, launch_digest
from cloister.host.qemu import BootLine
from cloister.models.download import resolve
from cloister.models.reference import parse_reference
from cloister.models.store import LocalModel
from cloister.owner.appfile import read_appfile
from cloister.owner.deployment import owner_name
from cloister.verify import parse_policy

pytestmark = [pytest.mark.system, pytest.mark.image]

CONFIG = EnclaveConfig(platform="vtpm", api_keys=False, slots=2)
OWNER = Ed25519PrivateKey.generate()
PROMPT = "canary-prompt-7741-zanzibar"
SEALED_TOML = 'name = "sealed"\napp = "llm"\nmodel = "tiny"\n'


@pytest.fixture(scope="module")
def built() -> Built:
    return build()


@pytest.fixture(scope="module")
def tpm(tmp_path_factory: pytest.TempPathFactory) -> SoftwareTpm:
    return make_tpm(tmp_path_factory.mktemp("tpm"))


@pytest.fixture(scope="module")
def tiny() -> LocalModel:
    return resolve(parse_reference("tiny"))


@pytest.fixture(scope="module")
def launch(tiny: LocalModel) -> bytes:
    """Of the built-in app with a public model."""
    return LaunchConfig(
        owner_key=owner_name(OWNER),
        deployment="acme",
        release=1,
        app=App("llm", CONFIG.digest().hex()),
        models=(hashlib.sha256(tiny.path.read_bytes()).hexdigest(),),
        config_sha256=CONFIG.digest().hex(),
    ).encode()


@pytest.fixture(scope="module")
def guest(
    built: Built, tpm: SoftwareTpm, tiny: LocalModel, launch: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    """Ready: it has loaded the model."""
    model = tiny.path.read_bytes()
    line = BootLine(launch=launch, config=CONFIG.encode(), data="model", data_bytes=len(model), model_name="tiny")
    disk = in_sectors(model, tmp_path_factory.mktemp("disk") / "data")
    digest = launch_digest(launch)
    with booted(
        tpm, kernel=built.kernel, boot=line.encode(), launch_sha256=digest, root=built.disk, data=disk
    ) as machine:
        assert machine.until("ready")["event"] == "ready", machine.events
        yield machine


@pytest.fixture
def person(built: Built, tpm: SoftwareTpm, tiny: LocalModel, shell: Shell) -> Shell:
    """With a policy file in the own home."""
    model = hashlib.sha256(tiny.path.read_bytes()).hexdigest()
    lines = f'models = ["sha256:{model}"]', f'app = "sha256:{CONFIG.digest().hex()}"'
    (shell.home / "policy.toml").write_text(policy_text(built.kernel, tpm, OWNER, *lines))
    return shell


def test_a_booted_image_is_what_was_predicted_of_it(guest: Guest, person: Shell, launch: bytes) -> None:
    ran = person.run(f"cloister verify {guest.url} --policy policy.toml --json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = json.loads(ran.stdout)
    verdicts = {factor["step"]: factor["verdict"] for factor in told["factors"]}
    passing = {step for step, verdict in verdicts.items() if verdict == "pass"}
    assert {f"measurement.pcr{index}" for index in (4, 9, 11, 12)} <= passing
    assert {"evidence.ak", "evidence.signature", "evidence.extra-data", "evidence.eventlog"} <= passing
    assert told["launch_sha256"] == launch_digest(launch).hex()


def test_a_model_inside_answers_and_the_machine_tells_nobody(guest: Guest, person: Shell) -> None:
    ran = person.run(f"cloister ask {guest.url} '{PROMPT}' --policy policy.toml --max-tokens 8 --json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)
    assert PROMPT.encode() not in guest.console.read_bytes()
    assert PROMPT not in json.dumps(guest.events)


def test_another_launch_config_is_another_machine(guest: Guest, person: Shell) -> None:
    path = person.home / "policy.toml"
    path.write_text(path.read_text().replace("acme", "other"))
    ran = person.run(f"cloister verify {guest.url} --policy policy.toml --json")
    assert ran.returncode == 3
    factors = json.loads(ran.stdout)["factors"]
    assert {factor["step"] for factor in factors if factor["verdict"] == "fail"} == {"deployment"}


def test_a_sealed_model_is_released_to_the_image_and_answers(
    built: Built, tiny: LocalModel, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tpm = make_tpm(tmp_path_factory.mktemp("other"))  # the first machine still runs, on its own
    (tmp_path / "cloister.toml").write_text(SEALED_TOML)
    sealed = seal(tmp_path, read_appfile(tmp_path), model=tiny)
    model = hashlib.sha256(tiny.path.read_bytes()).hexdigest()
    lines = f'models = ["sha256:{model}"]', f'app = "sha256:{sealed.made.head.sha256}"'
    policy = parse_policy(policy_text(built.kernel, tpm, sealed.owner, *lines), read=lambda _: b"")
    with booted(
        tpm,
        kernel=built.kernel,
        boot=sealed.boot,
        launch_sha256=launch_digest(sealed.launch),
        root=built.disk,
        data=sealed.made.path,
    ) as machine:
        assert machine.until("waiting")["event"] == "waiting", machine.events
        sealed.release(machine.url, policy)
        assert machine.until("ready")["event"] == "ready", machine.events
        with http_client(machine.url, policy=policy) as client:
            asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
            answer = client.post("/v1/chat/completions", json=asked, timeout=120).json()
    assert answer["usage"]["completion_tokens"] > 0
