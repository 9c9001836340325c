import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from cloister.cli.local import owner_key
from cloister.cli.policy_file import to_toml
from cloister.evidence.bundle import parse_bundle_head
from cloister.owner.broker_state import BrokerKeys, Records, read_root
from cloister.owner.deployment import owner_name
from cloister.verify import Policy

TOML = 'name = "hello"\napp = "main:app"\nkind = "wsgi"\nsecrets = ["TOKEN"]\nsettings = { GREETING = "hi" }\n'
Run = Callable[..., Result]


@pytest.fixture
def app_folder(tmp_path: Path, run: Run) -> Path:
    """Packaged, so that its keys are in the owner's state folder."""
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "cloister.toml").write_text(TOML)
    (folder / "main.py").write_text("app = None")
    (folder / "secrets.toml").write_text('TOKEN = "canary-secret"\n')
    assert run("package", folder).exit_code == 0
    return folder


@pytest.fixture
def place(tmp_path: Path, run: Run) -> Path:
    assert run("broker", "init").exit_code == 0
    return tmp_path / "state" / "cloister" / "broker"


def kept(place: Path) -> Records:
    return Records(place / "records", BrokerKeys.derive(read_root(place / "root")).records)


def written_policy(path: Path, **pins: str) -> Path:
    told = {"owner_key": owner_name(owner_key()), "deployment": "acme", **pins}
    path.write_text(to_toml(Policy(platforms=("tdx",), **told), comment="x"))  # type: ignore[arg-type]
    return path


def events(run: Run, *arguments: str | Path) -> list[str]:
    shown = run("broker", "log", "show", "--json", *arguments)
    assert shown.exit_code == 0, shown.stderr
    return [json.loads(line)["event"] for line in shown.stdout.splitlines()]


def test_a_broker_begins_once_and_shows_its_key(run: Run, place: Path) -> None:
    first = run("broker", "init").stdout
    assert first == f"{BrokerKeys.derive(read_root(place / 'root')).name}\n"
    assert json.loads(run("broker", "init", "--json").stdout)["broker_key"] == first.strip()
    assert events(run) == ["init"]
    assert place.stat().st_mode & 0o777 == 0o700


def test_the_root_may_lie_elsewhere(run: Run, tmp_path: Path) -> None:
    elsewhere: list[str | Path] = ["--folder", tmp_path / "b", "--root", tmp_path / "root"]
    assert run("broker", "init", *elsewhere).exit_code == 0
    assert not (tmp_path / "b" / "root").exists()
    assert events(run, *elsewhere) == ["init"]
    refused = run("broker", "log", "show", "--folder", tmp_path / "b")
    assert (refused.exit_code, refused.stdout) == (2, "")


def test_what_is_handed_over_rests_sealed_and_is_not_shown(run: Run, place: Path, app_folder: Path) -> None:
    ran = run("broker", "add", "acme", app_folder, "--json")
    assert ran.exit_code == 0, ran.stderr
    record = kept(place).load("acme")
    head = parse_bundle_head((app_folder / "hello.cloister").read_bytes())
    assert (record.app, set(record.keys)) == (head.sha256, {"code"})
    assert (record.secrets, record.settings) == ({"TOKEN": "canary-secret"}, {"GREETING": "hi"})
    assert json.loads(ran.stdout)["secrets"] == ["TOKEN"]
    assert "canary" not in ran.stdout + ran.stderr + run("broker", "log", "show").stdout
    assert all(b"canary" not in path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert events(run) == ["init", "added"]


def test_keys_and_secrets_may_be_brought_as_files(run: Run, place: Path, app_folder: Path, tmp_path: Path) -> None:
    """The broker's machine is another one than that on which the app was packaged."""
    (keys,) = (tmp_path / "state" / "cloister" / "bundles").iterdir()
    keys.rename(brought := tmp_path / "keys.json")
    (app_folder / "secrets.toml").rename(secrets := tmp_path / "brought.toml")
    refused = run("broker", "add", "acme", app_folder)
    assert refused.exit_code == 2
    files = ["--bundle-keys", brought, "--secrets", secrets, "--bundle", app_folder / "hello.cloister"]
    assert run("broker", "add", "acme", app_folder, *files).exit_code == 0
    assert kept(place).load("acme").secrets == {"TOKEN": "canary-secret"}
    brought.chmod(0o644)
    assert run("broker", "add", "acme", app_folder, *files).exit_code == 2


def test_keys_of_another_bundle_are_refused(run: Run, place: Path, app_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.touch(mode=0o600)
    keys.write_text('{"v":1,"keys":{}}')
    refused = run("broker", "add", "acme", app_folder, "--bundle-keys", keys)
    assert refused.exit_code == 2
    assert "not the keys of that bundle" in refused.stderr
    assert events(run) == ["init"]


def test_an_apps_time_counts_from_when_it_is_handed_over(
    run: Run, place: Path, app_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (app_folder / "cloister.toml").write_text(f'expiry = "1h"\n{TOML}')
    monkeypatch.setattr("cloister.cli.broker.time.time", lambda: 1_800_000_000.5)
    assert run("broker", "add", "acme", app_folder).exit_code == 0
    assert kept(place).load("acme").expires == 1_800_003_600


def test_revoking_forgets(run: Run, place: Path, app_folder: Path) -> None:
    run("broker", "add", "acme", app_folder)
    assert json.loads(run("broker", "revoke", "acme", "--json").stdout) == {"revoked": "acme"}
    assert (kept(place).load("acme").revoked, kept(place).load("acme").keys) == (True, {})
    assert run("broker", "revoke", "another").exit_code == 2
    assert events(run) == ["init", "added", "revoked"]


def test_a_whole_log_is_said_to_be_whole_and_what_that_leaves_open(run: Run, place: Path, app_folder: Path) -> None:
    run("broker", "add", "acme", app_folder)
    ran = run("broker", "log", "verify")
    assert ran.exit_code == 0
    assert ran.stdout.startswith("whole: 2 lines, the last one sha256:")
    assert "very end" in ran.stderr
    told = json.loads(run("broker", "log", "verify", "--json").stdout)
    assert told["lines"] == 2
    assert told["sha256"] in ran.stdout


def test_a_log_is_verified_from_a_copy_with_the_brokers_public_key_alone(run: Run, place: Path, tmp_path: Path) -> None:
    key = run("broker", "init").stdout.strip()
    copy = tmp_path / "copy.jsonl"
    (place / "log.jsonl").rename(copy)
    (place / "root").unlink()
    assert run("broker", "log", "verify", copy, "--key", key).exit_code == 0
    assert run("broker", "log", "verify", copy, "--key", "ed25519:" + "A" * 43).exit_code == 3
    assert run("broker", "log", "verify", copy, "--key", "mine").exit_code == 2
    assert run("broker", "log", "verify", copy).exit_code == 2


def test_a_changed_or_empty_log_is_refused(run: Run, place: Path) -> None:
    log = place / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"init"', b'"evil"'))
    refused = run("broker", "log", "verify")
    assert (refused.exit_code, refused.stdout) == (3, "")
    assert "line 1" in refused.stderr
    log.write_bytes(b"")
    assert run("broker", "log", "verify").exit_code == 2


def test_without_a_broker_the_remedy_is_named(run: Run, tmp_path: Path) -> None:
    refused = run("broker", "serve", "--policy", tmp_path / "p.toml", "--watch", "http://127.0.0.1:1")
    assert refused.exit_code == 2
    assert "cloister broker init" in refused.stderr


def test_what_is_no_address_is_refused(run: Run, place: Path, tmp_path: Path) -> None:
    policy = written_policy(tmp_path / "p.toml")
    for url in ("127.0.0.1:80", "ftp://a", "http://", "http://a/#owner=x", "http://a:b"):
        refused = run("broker", "serve", "--policy", policy, "--watch", url, "--once")
        assert refused.exit_code == 2, url


def test_a_policy_for_anybodys_enclave_is_refused(run: Run, place: Path, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("version = 1\n")
    refused = run("broker", "serve", "--policy", tmp_path / "p.toml", "--watch", "http://127.0.0.1:1", "--once")
    assert refused.exit_code == 2
    assert "owner and the deployment" in refused.stderr


def test_where_nobody_answers_it_says_so_and_logs_nothing(run: Run, place: Path, tmp_path: Path, nowhere: str) -> None:
    policy = written_policy(tmp_path / "p.toml")
    ran = run("broker", "serve", "--policy", policy, "--watch", nowhere, "--watch", f"{nowhere}/2", "--once")
    assert ran.exit_code == 0
    assert sorted(ran.stdout.split()) == sorted(["unreachable", nowhere, "unreachable", f"{nowhere}/2"])
    assert events(run) == ["init"]
