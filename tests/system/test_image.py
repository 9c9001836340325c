"""The measured image, from its sources to a chat: built, predicted, booted, verified, released to, talked to; and refused
when a byte of it is another one. Minutes: run by `make test-image`, not in CI."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.system.image_stage import Guest, SoftwareTpm, booted, in_sectors, make_tpm
from tests.system.shell import ROOT, Shell

from cloister.cli.sealed import config_for
from cloister.client import http_client
from cloister.deploy.predict import predict_pcrs
from cloister.deploy.uki import parse_image
from cloister.enclave.boot import EnclaveConfig
from cloister.errors import VerificationFailed
from cloister.evidence.launch import App, LaunchConfig, launch_digest
from cloister.host.qemu import BootLine
from cloister.models.download import resolve
from cloister.models.reference import parse_reference
from cloister.models.store import LocalModel
from cloister.owner.appfile import AppFile, read_appfile
from cloister.owner.deployment import launch_bytes, owner_name
from cloister.owner.package import Package, package
from cloister.owner.provision import contents, provision
from cloister.verify import Policy, parse_policy
from cloister.verify.factors import Factor

pytestmark = [pytest.mark.system, pytest.mark.image]

CONFIG = EnclaveConfig(platform="vtpm", api_keys=False, slots=2)
OWNER = Ed25519PrivateKey.generate()
PROMPT = "canary-prompt-7741-zanzibar"
SEALED_TOML = 'name = "sealed"\napp = "llm"\nmodel = "tiny"\n'


@dataclass(frozen=True)
class Built:
    kernel: Path
    disk: Path


@pytest.fixture(scope="module")
def built() -> Built:
    """From the cache, where nothing changed."""
    subprocess.run([sys.executable, ROOT / "packaging" / "image" / "build.py"], check=True)
    folder = ROOT / "build" / "image"
    return Built(folder / "cloister.efi", folder / "cloister.raw")


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


def policy_file(kernel: Path, pin: str, model: str, app: str) -> str:
    """What an auditor writes who has the image, and enrolled the TPM: nothing of it came from the machine."""
    pcrs = predict_pcrs(parse_image(kernel.read_bytes()), started_by="qemu")
    entry = ", ".join(f'pcr{index} = "{value.hex()}"' for index, value in sorted(pcrs.items()))
    return "\n".join(
        (
            'version = 1\ndeployment = "acme"',
            f'owner_key = "{owner_name(OWNER)}"\nmodels = ["sha256:{model}"]\napp = "sha256:{app}"',
            'platforms = ["vtpm"]\ndangerously_tolerate_insecure = ["api-keys-off"]',
            f"[measurements]\nvtpm = [{{ {entry} }}]",
            f'[limits]\nplatform_ids = ["{pin}"]\n',
        )
    )


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
    (shell.home / "policy.toml").write_text(policy_file(built.kernel, tpm.pin, model, CONFIG.digest().hex()))
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
    assert failing(json.loads(ran.stdout)["factors"]) == {"deployment"}


def failing(factors: list[dict[str, str]]) -> set[str]:
    return {factor["step"] for factor in factors if factor["verdict"] == "fail"}


# A sealed app


@dataclass(frozen=True)
class Sealed:
    app: AppFile
    made: Package
    launch: bytes
    boot: bytes


@pytest.fixture(scope="module")
def sealed(tiny: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    folder = tmp_path_factory.mktemp("sealed")
    (folder / "cloister.toml").write_text(SEALED_TOML)
    app = read_appfile(folder)
    made = package(app, folder / "app.cloister", state=folder / "state", model=tiny)
    config = config_for(made.head, "vtpm", slots=2).encode()
    launch = launch_bytes(made.head, owner_key=owner_name(OWNER), deployment="acme", release=1, config=config)
    line = BootLine(launch=launch, config=config, data="bundle", data_bytes=made.path.stat().st_size)
    in_sectors(made.path.read_bytes(), made.path)
    return Sealed(app, made, launch, line.encode())


def release(url: str, sealed: Sealed, policy: Policy) -> None:
    given = contents(sealed.app, sealed.made.keys, secrets={}, now=time.time())
    provision(url, policy=policy, owner=OWNER, release=given)


def test_a_sealed_app_is_released_to_the_image_and_answers(
    built: Built, tpm: SoftwareTpm, tiny: LocalModel, sealed: Sealed
) -> None:
    model = hashlib.sha256(tiny.path.read_bytes()).hexdigest()
    policy = parse_policy(policy_file(built.kernel, tpm.pin, model, sealed.made.head.sha256), read=lambda _: b"")
    with booted(
        tpm,
        kernel=built.kernel,
        boot=sealed.boot,
        launch_sha256=launch_digest(sealed.launch),
        root=built.disk,
        data=sealed.made.path,
    ) as machine:
        assert machine.until("waiting")["event"] == "waiting", machine.events
        release(machine.url, sealed, policy)
        assert machine.until("ready")["event"] == "ready", machine.events
        with http_client(machine.url, policy=policy) as client:
            asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
            answer = client.post("/v1/chat/completions", json=asked, timeout=120).json()
    assert answer["usage"]["completion_tokens"] > 0


def test_one_changed_byte_of_the_command_line_gets_no_key(
    built: Built, tpm: SoftwareTpm, tiny: LocalModel, sealed: Sealed, tmp_path: Path
) -> None:
    """It boots as well as the other one, and would do the same."""
    content = built.kernel.read_bytes()
    assert content.count(b" quiet ") == 1
    changed = tmp_path / "changed.efi"
    changed.write_bytes(content.replace(b" quiet ", b" quieT "))
    model = hashlib.sha256(tiny.path.read_bytes()).hexdigest()
    policy = parse_policy(policy_file(built.kernel, tpm.pin, model, sealed.made.head.sha256), read=lambda _: b"")
    with booted(
        tpm,
        kernel=changed,
        boot=sealed.boot,
        launch_sha256=launch_digest(sealed.launch),
        root=built.disk,
        data=sealed.made.path,
    ) as machine:
        assert machine.until("waiting")["event"] == "waiting", machine.events
        with pytest.raises(VerificationFailed) as caught:
            release(machine.url, sealed, policy)
        judged = [factor for factor in caught.value.factors if isinstance(factor, Factor)]
        failed = {factor.step for factor in judged if factor.verdict == "fail"}
        assert failed == {"measurement.pcr4", "measurement.pcr9", "measurement.pcr11"}
        assert "opening" not in {event["event"] for event in machine.events}
