import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from tests.deploy.efi import disk, firmware, kernel, uki
from tests.deploy.gramine_programs import sigstruct
from typer.testing import Result

from cloister.cli.policy_file import fingerprint, key_name, load_policy, signature_file, signed_by
from cloister.deploy.entries import Start, predict_entries
from cloister.deploy.gramine_sign import make_signing_key
from cloister.enclave.boot import KeyHash
from cloister.enclave.machine import Received, parse_line
from cloister.evidence.launch import App, LaunchConfig
from cloister.host.qemu import GUEST_PORT, SECTOR, BootLine

Run = Callable[..., Result]

OWNER = "ed25519:" + "A" * 43


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "cloister.efi"
    path.write_bytes(uki())
    return path


@pytest.fixture
def owner(tmp_path: Path) -> tuple[Path, str]:
    key, path = Ed25519PrivateKey.generate(), tmp_path / "owner.pem"
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path, key_name(key)


def test_predict_shows_what_evidence_will_say(run: Run, image: Path) -> None:
    shown = run("image", "predict", image)
    first, second = predict_entries(uki(), Start(platform="vtpm"))
    assert shown.exit_code == 0
    assert shown.stdout.splitlines() == [
        "vtpm",
        *(f"  {name:<12} {value}" for name, value in first.items()),
        "vtpm (or 2)",
        *(f"  {name:<12} {value}" for name, value in second.items()),
    ]
    assert "systemd-stub 257, Linux 6.12, started by disk" in shown.stderr


def test_predict_says_the_same_as_json(run: Run, image: Path) -> None:
    options = (
        "--started-by",
        "qemu",
        "--phase",
        "enter-initrd:leave-initrd",
        "--phase",
        "",
        "--pin",
        f"pcr7={'ab' * 32}",
    )
    said = json.loads(run("image", "predict", image, "--json", *options).stdout)
    phases = (("enter-initrd", "leave-initrd"), ())
    start = Start(platform="vtpm", started_by="qemu", phases=phases, pins={"pcr7": "ab" * 32})
    assert said == {
        "v": 1,
        "platform": "vtpm",
        "stub": 257,
        "kernel": "6.12",
        "started_by": "qemu",
        "entries": [dict(entry) for entry in predict_entries(uki(), start)],
    }


def test_predicts_for_hardware(run: Run, image: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(disk([bytes([1]) * 128]))
    (tmp_path / "OVMF.fd").write_bytes(firmware())
    tdx = ("--platform", "tdx", "--pin", f"mr_td={'ab' * 48}", "--disk", tmp_path / "disk")
    (entry,) = json.loads(run("image", "predict", image, "--json", *tdx).stdout)["entries"]
    assert sorted(entry) == ["mr_td", "rtmr1", "rtmr2"]
    snp = ("--platform", "sev-snp", "--started-by", "qemu", "--firmware", tmp_path / "OVMF.fd", "--vcpus", "2")
    (entry,) = json.loads(run("image", "predict", image, "--json", *snp, "--cpu", "EPYC-Milan").stdout)["entries"]
    assert entry["vcpus"] == 2


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--platform", "nitro"], 2, "Nothing is predicted"),
        (["--platform", "tdx"], 2, "--pin mr_td=HEX"),
        (["--started-by", "hand"], 2, "disk or qemu"),
        (["--phase", "final"], 2, "not the phases"),
        (["--pin", "pcr7"], 2, "no measurement"),
        (["--disk", "nothing"], 2, "cannot be read"),
    ],
)
def test_says_what_is_wrong(run: Run, image: Path, options: list[str], code: int, words: str) -> None:
    shown = run("image", "predict", image, *options)
    assert shown.exit_code == code
    assert words in shown.stderr


def test_what_is_no_image_is_malformed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(kernel())
    shown = run("image", "predict", tmp_path / "vmlinuz")
    assert shown.exit_code == 4
    assert "no kernel in it" in shown.stderr


def test_policy_is_one_that_is_signed_and_believes_this_image_alone(
    run: Run, image: Path, owner: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "policy.toml"
    model = "cd" * 32
    options = ("--deployment", "acme", "--key", owner[0], "--model", f"sha256:{model}", "--machine", "77" * 32)
    shown = run("image", "policy", image, *options, "-o", out)
    assert shown.exit_code == 0, shown.stderr
    policy = load_policy(out, [owner[1]])
    assert (policy.deployment, policy.owner_key, policy.platforms) == ("acme", owner[1], ("vtpm",))
    assert (policy.models, policy.trust) == (frozenset({model}), None)
    assert policy.limits.platform_ids == frozenset({"77" * 32})
    assert policy.measurements["vtpm"] == predict_entries(uki(), Start(platform="vtpm"))
    assert signed_by(out, out.read_bytes()) == owner[1]


def test_policy_without_a_key_goes_to_standard_output(run: Run, image: Path, tmp_path: Path) -> None:
    shown = run("image", "policy", image, "--deployment", "acme", "--owner-key", OWNER)
    (tmp_path / "policy.toml").write_text(shown.stdout)
    assert load_policy(tmp_path / "policy.toml").owner_key == OWNER
    assert "fingerprint" in shown.stderr


def test_what_was_predicted_can_travel_signed_with_the_evidence(
    run: Run, image: Path, owner: tuple[Path, str], tmp_path: Path
) -> None:
    out, signed = tmp_path / "policy.toml", tmp_path / "measurements.json"
    assert run("image", "policy", image, "--deployment", "acme", "--key", owner[0], "-o", out).exit_code == 0
    shown = run("policy", "measurements", out, "--release", "3", "--key", owner[0], "-o", signed)
    assert "2 measurements of release 3" in shown.stdout


def test_policy_needs_an_owner_and_a_signature_a_file(run: Run, image: Path, owner: tuple[Path, str]) -> None:
    named = ("image", "policy", image, "--deployment", "acme")
    assert "Whose deployment" in run(*named).stderr
    assert "over a file" in run(*named, "--key", owner[0]).stderr
    assert "not the key" in run(*named, "--key", owner[0], "--owner-key", OWNER, "-o", "x").stderr


@pytest.fixture
def enclave(tmp_path: Path, owner: tuple[Path, str]) -> Path:
    """What `cloister image gramine` leaves, as far as a policy is made of it."""
    launch = LaunchConfig(
        owner_key=owner[1],
        deployment="acme",
        release=1,
        app=App("llm", "ab" * 32),
        models=("cd" * 32,),
        config_sha256="ef" * 32,
    )
    folder = tmp_path / "enclave"
    folder.mkdir()
    (folder / "launch.json").write_bytes(launch.encode())
    key = load_pem_private_key(make_signing_key(), None)
    assert isinstance(key, RSAPrivateKey)
    (folder / "cloister.sig").write_bytes(sigstruct(b"\x17" * 32, key))
    return folder


def test_a_policy_of_sgx_pins_the_enclave_with_its_launch_config(
    run: Run, enclave: Path, owner: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "policy.toml"
    options = ("--platform", "sgx", "--deployment", "acme", "--key", owner[0], "-o", out)
    said = json.loads(run("image", "policy", enclave, *options, "--json").stdout)
    launch_sha256 = hashlib.sha256((enclave / "launch.json").read_bytes()).hexdigest()
    entry = {"mr_enclave": "17" * 32, "launch_sha256": launch_sha256}
    policy = load_policy(out, [owner[1]])
    assert (policy.platforms, policy.models) == (("sgx",), frozenset({"cd" * 32}))
    assert [dict(one) for one in policy.measurements["sgx"]] == said["entries"] == [entry]
    assert said["toml"] == out.read_text()
    assert said["fingerprint"] == fingerprint(policy)
    assert (said["policy"], said["signature"]) == (str(out), str(signature_file(out)))
    assert signed_by(out, out.read_bytes()) == owner[1]
    shown = json.loads(run("image", "predict", enclave, "--platform", "sgx", "--json").stdout)
    assert shown == {"v": 1, "platform": "sgx", "entries": [entry]}


def test_a_policy_of_sgx_is_for_the_deployment_that_the_enclave_measures(
    run: Run, enclave: Path, owner: tuple[Path, str], tmp_path: Path
) -> None:
    named = ("image", "policy", enclave, "--platform", "sgx")
    other = run(*named, "--deployment", "other", "--owner-key", owner[1])
    assert (other.exit_code, "another --deployment" in other.stderr) == (2, True)
    stranger = run(*named, "--deployment", "acme", "--owner-key", OWNER)
    assert (stranger.exit_code, "another --owner-key" in stranger.stderr) == (2, True)
    signature = (enclave / "cloister.sig").read_bytes()
    (enclave / "cloister.sig").write_bytes(signature[:960] + bytes([signature[960] ^ 1]) + signature[961:])
    assert run(*named, "--deployment", "acme", "--owner-key", owner[1]).exit_code == 4
    (enclave / "cloister.sig").unlink()
    unsigned = run(*named, "--deployment", "acme", "--owner-key", owner[1])
    assert (unsigned.exit_code, "no signed enclave" in unsigned.stderr) == (2, True)


def test_policy_as_json_says_what_it_would_have_written(run: Run, image: Path, tmp_path: Path) -> None:
    said = json.loads(run("image", "policy", image, "--deployment", "acme", "--owner-key", OWNER, "--json").stdout)
    (tmp_path / "policy.toml").write_text(said["toml"])
    assert fingerprint(load_policy(tmp_path / "policy.toml")) == said["fingerprint"]
    assert (said["policy"], said["signature"], len(said["entries"])) == (None, None, 2)


def test_build_needs_a_checkout(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cloister.__file__", str(tmp_path / "a/b/__init__.py"))
    shown = run("image", "build", "--lock")
    assert shown.exit_code == 2
    assert "checkout" in shown.stderr


def test_build_runs_the_recipe_with_what_follows(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "packaging/image/build.py"
    script.parent.mkdir(parents=True)
    script.write_text("import sys\nopen('said', 'w').write(' '.join(sys.argv[1:]))\nsys.exit(7)\n")
    monkeypatch.setattr("cloister.__file__", str(tmp_path / "src/cloister/__init__.py"))
    assert run("image", "build", "--lock", "here").exit_code == 7
    assert Path("said").read_text() == "--lock here"


def test_gramine_is_a_command_of_the_family(run: Run) -> None:
    shown = run("image", "gramine", "--help")
    assert shown.exit_code == 0
    assert "SGX" in shown.stdout
    assert "--preheat" in shown.stdout


class _Without:
    """As if one of the packages that the command needs were not installed."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if name == "cloister.cli.image_gramine":
            raise ModuleNotFoundError(name="gguf")


def test_the_rest_works_where_an_enclaves_server_could_not(
    run: Run, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "cloister.cli.image_gramine", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Without(), *sys.meta_path])
    assert run("image", "predict", image).exit_code == 0
    shown = run("image", "gramine", "DIR", "--preheat")
    assert shown.exit_code == 2
    assert "cloister[server]" in shown.stderr


def test_the_image_reads_from_the_boot_disk_all_that_a_host_may_say() -> None:
    said: dict[str, Any] = {
        "launch": b'{"v":1}',
        "config": b"{}",
        "data": "model",
        "data_bytes": 77,
        "model_name": "tiny",
        "endorsements": b"collateral",
        "tls_port": 8443,
        "tls_origins": ("https://a.example:8443",),
        "founds_group": True,
    }
    disk_bytes = BootLine(api_keys=(("one", "ab" * 32),), **said).encode()
    assert len(disk_bytes) % SECTOR == 0
    assert parse_line(disk_bytes) == Received(port=GUEST_PORT, api_keys=(KeyHash("one", "ab" * 32),), **said)
