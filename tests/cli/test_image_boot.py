import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from cloister.cli import deployments
from cloister.enclave.machine import Disks, parse_line
from cloister.evidence.bundle import parse_bundle_head
from cloister.evidence.launch import parse_launch
from cloister.owner.broker_state import BrokerKeys, Records, read_root

Run = Callable[..., Result]
APP_FILE = """
name = "words"
app = "app:app"
kind = "wsgi"
platform = "tdx"
"""
TDX = ", ".join(f'{name} = "{letters * 48}"' for name, letters in (("mr_td", "ab"), ("rtmr1", "cd"), ("rtmr2", "ef")))
BROKER = "ed25519:" + "A" * 43


@pytest.fixture
def write(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    Path("words").mkdir()
    Path("words/app.py").write_text("def app(environ, start_response): ...\n")
    Path("words/cloister.toml").write_text(APP_FILE)
    policy = ("version = 1", 'platforms = ["tdx"]', "[measurements]", f"tdx = [{{ {TDX} }}]", "")
    Path("policy.toml").write_text("\n".join(policy))
    return lambda *options: run("image", "boot", "words", "-o", "disks", "--policy", "policy.toml", *options)


def test_the_disks_are_what_the_image_takes(write: Callable[..., Result], tmp_path: Path) -> None:
    done = write("--broker", BROKER, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    disks = tmp_path / "disks"
    assert sorted(path.name for path in disks.iterdir()) == ["boot.raw", "data.raw", "policy.toml"]
    devices = tmp_path / "devices"
    for name, disk in (("vda", "boot.raw"), ("vdb", "data.raw")):
        (devices / name).mkdir(parents=True)
        (tmp_path / name).symlink_to(disks / disk)
        assert (disks / disk).stat().st_size % 512 == 0
    attached = Disks(devices=devices, nodes=tmp_path, patience=0)
    received = parse_line(attached.find(b'{"', "boot").read_bytes())
    launch = parse_launch(received.launch)
    assert (launch.deployment, launch.release, launch.broker_key) == ("words", 1, BROKER)
    assert (received.data, json.loads(received.config)["platform"]) == ("bundle", "tdx")
    bundle = attached.find(b"cloister-bundle\0", "bundle").read_bytes()[: received.data_bytes]
    assert bundle == Path("words/words.cloister").read_bytes()
    assert parse_bundle_head(bundle).sha256 == launch.app.sha256
    assert "ab" * 48 in Path(told["policy"]).read_text()
    assert f"--policy {told['policy']} --watch " in told["release"][1]
    assert list(deployments._folder().iterdir()) == []  # what runs on a host under that name is another matter


def test_what_is_to_be_done_next_stands_there_as_it_can_be_typed(
    write: Callable[..., Result], run: Run, tmp_path: Path
) -> None:
    """The broker is handed what these disks hold, and the keys that the app asks for."""
    broker = run("broker", "init").stdout.strip()
    assert json.loads(write("--broker", broker, "--json").stdout)["release"][0] == "cloister broker add words words"
    Path("my words").mkdir()
    bundle, keys = Path("words/words.cloister").rename("my words/other.cloister"), Path("my words/keys.toml")
    assert run("keys", "new", keys, "me").exit_code == 0
    options = ["--bundle", bundle, "--api-keys", keys]
    told = json.loads(write("--broker", broker, "-o", "my disks", *options, "--json").stdout)["release"]
    add, serve = (shlex.split(line) for line in told)
    assert add == ["cloister", "broker", "add", "words", "words", *map(str, options)]
    assert serve[:5] == ["cloister", "broker", "serve", "--policy", "my disks/policy.toml"]
    assert run(*add[1:]).exit_code == 0
    place = tmp_path / "state" / "cloister" / "broker"
    record = Records(place / "records", BrokerKeys.derive(read_root(place / "root")).records).load("words")
    assert (record.app, [key.name for key in record.api_keys]) == (
        parse_bundle_head(bundle.read_bytes()).sha256,
        ["me"],
    )


def test_each_writing_is_a_release_of_its_own(write: Callable[..., Result]) -> None:
    for release in (1, 2):
        assert write("--broker", BROKER).exit_code == 0
        received = parse_line(Path("disks/boot.raw").read_bytes())
        assert parse_launch(received.launch).release == release


def test_without_a_broker_nobody_could_release_it(write: Callable[..., Result]) -> None:
    done = write("--broker", "")
    assert (done.exit_code, "cloister broker init" in done.stderr) == (2, True)
    assert not Path("disks").exists()
