"""What `cloister deploy` decides and sends, against a host whose enclaves are scripted: they fail at once, so nothing is
released. What follows a start is in tests/end_to_end/test_deploy.py."""

import base64
import hashlib
import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import pytest
from tests.host.conftest import Served, backend, served, stage
from tests.host.stage import GIB, FakeBackend
from typer.testing import Result

from cloister.cli import deployments, image_gramine
from cloister.cli.deploy import _follow, _limits
from cloister.cli.deployments import Deployment
from cloister.cli.image_gramine import Image
from cloister.enclave.boot import EnclaveConfig, parse_config
from cloister.errors import CloisterError, ConnectionFailed, EngineDied, NotTrusted, VerificationFailed, WrongUse
from cloister.evidence.bundle import parse_bundle_head
from cloister.evidence.launch import launch_digest, parse_launch
from cloister.verify import Policy, parse_policy

__all__ = ["backend", "served", "stage"]

Run = Callable[..., Result]
APP_FILE = """
name = "words"
app = "app:app"
kind = "wsgi"
secrets = ["WORD"]
expiry = "2d"
"""
SECRET = "the-secret-itself"
TDX = {"mr_td": "ab" * 48, "rtmr1": "cd" * 48, "rtmr2": "ef" * 48}


@pytest.fixture
def deploy(run: Run, served: Served, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """In a folder `words`, logged in, at a host that ends what it starts."""
    backend.script = lambda _: [{"event": "failed", "error": "NotTrusted", "message": "As the test says."}]
    monkeypatch.setenv("WORD", SECRET)
    assert run("login", served.url, input=f"{served.token}\n").exit_code == 0
    Path("words").mkdir()
    Path("words/app.py").write_text("def app(environ, start_response): ...\n")
    Path("words/cloister.toml").write_text(APP_FILE)
    entry = ", ".join(f'{name} = "{value}"' for name, value in TDX.items())
    lines = ("version = 1", 'platforms = ["tdx"]', "[measurements]", f"tdx = [{{ {entry} }}]", "")
    Path("words/tdx.toml").write_text("\n".join(lines))
    return lambda *options: run("deploy", "words", *options)


def started(served: Served) -> Any:
    enclave = served.stage.backend.last
    return parse_launch(enclave.spawn.launch), served.stage.store.app("words")


def test_what_is_launched_is_the_app_of_the_bundle_under_the_owners_key(
    deploy: Callable[..., Result], served: Served, tmp_path: Path
) -> None:
    done = deploy("--platform", "sim", "--memory", "1GiB", "--cores", "2", "--restart", "never")
    assert done.exit_code == 5
    assert "As the test says." in done.stderr
    launch, app = started(served)
    content = served.stage.bundles.path(app.bundle).read_bytes()
    assert hashlib.sha256(content).hexdigest() == app.bundle
    head = parse_bundle_head(content)
    assert (launch.app.kind, launch.app.sha256) == ("wsgi", head.sha256)
    assert (launch.deployment, launch.release, launch.egress, launch.models) == ("words", 1, (), ())
    assert launch.config_sha256 == hashlib.sha256(app.config).hexdigest()
    assert (app.memory_bytes, app.cores, app.restart) == (GIB, 2, "never")
    assert app.expires_at > 0
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET.encode() not in kept


def test_the_same_app_is_uploaded_once_and_another_one_anew(deploy: Callable[..., Result], served: Served) -> None:
    bundles = []
    for _ in range(2):
        deploy("--platform", "sim")
        bundles.append(started(served)[1].bundle)
    Path("words/app.py").write_text("def app(environ, start_response): pass\n")
    deploy("--platform", "sim")
    launch, app = started(served)
    assert bundles[0] == bundles[1] != app.bundle
    assert launch.release == 3


def test_the_owners_record_is_private_and_holds_no_secret(deploy: Callable[..., Result], tmp_path: Path) -> None:
    deploy("--platform", "sim")
    folder = tmp_path / "state" / "cloister" / "deployments"
    record = folder / "words.json"
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    keys = json.loads(next((tmp_path / "state" / "cloister" / "bundles").glob("*.json")).read_bytes())["keys"]
    assert keys
    for secret in (SECRET, *keys.values()):
        assert secret not in record.read_text()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, "which TEE"),
        (["--platform", "sim", "--tier", "huge"], 2, "tier"),
        (["--platform", "sim", "--memory", "lots"], 2, "size"),
        (["--platform", "sim", "--bundle", "nothing"], 2, "cannot be read"),
        (["--platform", "sim", "--bundle", "words/app.py"], 4, "not a cloister bundle"),
        (["--platform", "sim", "--expires", "soon"], 2, "time"),
        (["--platform", "tdx"], 2, "cloister image policy"),
        (["--platform", "tdx", "--policy", "words/tdx.toml"], 2, "another platform"),
        (["--platform", "sim", "--name", "../words"], 2, "lower-case"),
        (["--platform", "sim", "--memory", "64GiB"], 5, "memory"),
        (["--model", "tiny"], 2, "name"),
        (["--model", "tiny", "--name", "chat"], 2, "simulated"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_deployed_is_said_and_nothing_is_started(
    deploy: Callable[..., Result], served: Served, options: list[str], code: int, words: str
) -> None:
    done = deploy(*options)
    assert (done.exit_code, words in done.stderr) == (code, True), done.stderr
    assert served.stage.backend.started == []
    assert served.stage.store.apps() == []


def test_a_restart_believes_what_was_believed_at_the_start(
    deploy: Callable[..., Result], served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The policy that `deploy --policy` was given stands in no file of the app's: it is kept, and comes to nobody's harm."""
    deploy("--platform", "sim")
    record = deployments._folder() / "words.json"
    found = json.loads(record.read_bytes())
    config = json.loads(base64.b64decode(found["config"]))
    found["config"] = base64.b64encode(json.dumps({**config, "platform": "tdx"}).encode()).decode()
    record.write_text(json.dumps(found))
    kept = deployments._folder() / "words.policy.toml"
    kept.unlink()
    with pytest.raises(WrongUse, match="not said"):
        deployments.load_record("words", found["host"], None)
    kept.write_text((Path("words/tdx.toml")).read_text())
    loaded = deployments.load_record("words", found["host"], None)
    assert loaded is not None
    assert loaded.policy.measurements["tdx"] == (TDX,)
    assert loaded.policy.owner_key == parse_launch(loaded.launch).owner_key


def test_an_edit_of_the_apps_file_asks_for_no_other_secrets_than_the_bundles(
    deploy: Callable[..., Result], served: Served
) -> None:
    deploy("--platform", "sim")
    file = Path("words/cloister.toml")
    file.write_text(file.read_text().replace('["WORD"]', '["WORD", "NEW"]'))
    found = json.loads((deployments._folder() / "words.json").read_bytes())
    loaded = deployments.load_record("words", found["host"], None)
    assert loaded is not None
    assert set(deployments.release_for(loaded, None).secrets) == {"WORD"}


def test_a_secret_without_a_value_is_said_before_anything_leaves(
    deploy: Callable[..., Result], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORD")
    done = deploy("--platform", "sim")
    assert done.exit_code == 2
    assert "WORD" in done.stderr
    assert served.stage.bundles.stored == 0


class Told:
    """A host that tells one state after the other."""

    def __init__(self, *states: tuple[str, int, str]) -> None:
        self.apps = [{"name": "words", "state": state, "starts": n, "detail": detail} for state, n, detail in states]

    def app(self, name: str) -> str:
        return name

    def get(self, _path: str) -> dict[str, Any]:
        return self.apps.pop(0)


def test_an_app_that_ends_after_its_release_is_told_and_not_released_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may never be ready, and the host would start it without end."""
    monkeypatch.setattr("cloister.cli.deploy._POLL", 0.0)
    released: list[Any] = []
    never = ("opening", 1, ""), ("restarting", 1, "The app does not become healthy."), ("waiting", 2, "")
    client = Told(("starting", 1, ""), ("restarting", 1, "No room."), ("waiting", 1, ""), *never)
    with pytest.raises(EngineDied, match="does not become healthy"):
        _follow(client, client.get(""), 60.0, released.append)  # type: ignore[arg-type]
    assert len(released) == 1


def test_a_tier_is_a_word_for_a_size(deploy: Callable[..., Result], served: Served) -> None:
    deploy("--platform", "sim", "--tier", "small")
    assert (started(served)[1].memory_bytes, started(served)[1].cores) == (2 * GIB, 1)


@pytest.mark.parametrize(
    ("platform", "size", "memory"),
    [
        ("sim", 3 * GIB, 5 * GIB),
        ("tdx", 3 * GIB, 8 * GIB),
        ("sev-snp", 3 * GIB, 8 * GIB),
        ("vtpm", 3 * GIB, 8 * GIB),
        ("sgx", 3 * GIB, 8 * GIB),
        ("sgx", 1, 4 * GIB),
    ],
)
def test_a_model_gets_what_it_takes_while_it_is_loaded_there(
    tmp_path: Path, platform: str, size: int, memory: int
) -> None:
    """In a virtual machine its file lies in the same memory as its weights; in SGX there are powers of two only."""
    bundle = tmp_path / "model.cloister"
    with bundle.open("wb") as file:
        file.truncate(size)
    config = EnclaveConfig(platform=platform).encode()
    made = Deployment(name="one", launch=b"", config=config, policy=Policy(), kind="llm", bundle=(bundle, ""))
    for one in (made, replace(made, bundle=None, weights=size)):
        assert _limits(None, one, "", "", 0).memory_bytes == memory
        assert _limits(None, one, "", "1GiB", 0).memory_bytes == GIB
    assert _limits(None, replace(made, kind="asgi"), "", "", 0).memory_bytes == 2 * GIB


def test_without_a_login_nothing_is_packaged(run: Run) -> None:
    done = run("deploy", ".", "--platform", "sim")
    assert done.exit_code == 2
    assert "cloister login" in done.stderr


def test_the_broker_that_is_named_stands_in_the_launch_config_and_the_policy(
    deploy: Callable[..., Result], served: Served, tmp_path: Path
) -> None:
    key = "ed25519:" + "A" * 43
    assert deploy("--platform", "sim", "--memory", "1GiB", "--broker", "mine").exit_code == 2
    deploy("--platform", "sim", "--memory", "1GiB", "--broker", key)
    assert started(served)[0].broker_key == key
    (policy,) = (tmp_path / "state" / "cloister" / "deployments").glob("*.policy.toml")
    assert f'broker_key = "{key}"' in policy.read_text()


class Judging:
    """A client's session, that says of the enclave what the test wants to see said in the end."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> "Judging":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def verify(self) -> NoReturn:
        raise NotTrusted("As a client judges.")


@pytest.fixture
def raced(
    deploy: Callable[..., Result], backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """A deployment to an enclave that waits until the owner's release comes: it fails by `error`, and the host is told `then`."""
    backend.script = lambda _: [{"event": "waiting"}]
    monkeypatch.setattr("cloister.cli.deploy._POLL", 0.0)
    monkeypatch.setattr("cloister.cli.deploy.Session", Judging)

    def race(error: CloisterError, then: str, *options: str) -> Result:
        def fail(*_: object, **__: object) -> NoReturn:
            backend.last.say(event=then, error="NotTrusted", message="It ended.")
            raise error

        monkeypatch.setattr("cloister.cli.deploy.provision", fail)
        return deploy("--platform", "sim", "--memory", "1GiB", *options)

    return race


BROKER = ["--broker", "ed25519:" + "A" * 43]


@pytest.mark.parametrize(
    "error",
    [
        NotTrusted("The enclave has had a release."),
        VerificationFailed("It serves already."),
        ConnectionFailed("The enclave gives no evidence."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_broker_may_be_first_and_the_enclave_is_judged_as_by_a_client(
    raced: Callable[..., Result], error: CloisterError
) -> None:
    done = raced(error, "ready", *BROKER)
    assert (done.exit_code, "its broker was first" in done.stderr, error.message in done.stderr) == (3, True, False)
    assert "As a client judges." in done.stderr


@pytest.mark.parametrize(
    ("then", "options"),
    [("waiting", BROKER), ("failed", BROKER), ("ready", [])],
    ids=["waits on", "ended", "no broker"],
)
def test_a_release_that_failed_where_no_broker_was_first_is_told(
    raced: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, then: str, options: list[str]
) -> None:
    monkeypatch.setattr("cloister.cli.deploy._TELLS", 0.0 if then == "waiting" else 60.0)
    done = raced(NotTrusted("Its evidence does not hold."), then, *options)
    assert (done.exit_code, "Its evidence does not hold." in done.stderr) == (3, True)
    assert "was first" not in done.stderr
    assert "As a client judges." not in done.stderr


def test_a_public_model_in_sgx_is_launched_with_its_measurement_pinned(
    run: Run, served: Served, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it measures is scripted, as there is no Gramine here: tests/cli/test_gramine_backend.py has the rest."""
    images: list[Image] = []

    def measure(image: Image) -> dict[str, str | int]:
        images.append(image)
        return {"mr_enclave": "ab" * 32, "launch_sha256": launch_digest(image.launch).hex()}

    monkeypatch.setattr(image_gramine, "measure", measure)
    backend.platform = "sgx"
    backend.script = lambda _: [{"event": "failed", "error": "NotTrusted", "message": "As the test says."}]
    assert run("login", served.url, input=f"{served.token}\n").exit_code == 0
    done = run("deploy", "--model", "tiny", "--name", "chat", "--platform", "sgx", "--memory", "2GiB")
    assert (done.exit_code, "As the test says." in done.stderr) == (5, True), done.stderr
    spawn = backend.last.spawn
    (image,) = images
    assert (spawn.launch, spawn.config, spawn.model) == (image.launch, image.config, "tiny")
    config = parse_config(spawn.config)
    assert (config.platform, config.engine) == ("sgx", "thread")
    (file,) = Path("..").resolve().rglob("chat.policy.toml")
    policy = parse_policy(file.read_bytes(), read=lambda name: name.encode())
    assert policy.measurements["sgx"][0]["launch_sha256"] == launch_digest(spawn.launch).hex()
    assert policy.models == frozenset(parse_launch(spawn.launch).models)


@pytest.mark.parametrize("platform", ["tdx", "", "nonsense"])
def test_a_public_model_runs_nowhere_else(run: Run, served: Served, platform: str) -> None:
    assert run("login", served.url, input=f"{served.token}\n").exit_code == 0
    done = run("deploy", "--model", "tiny", "--name", "chat", "--platform", platform)
    assert done.exit_code == 2
    assert "--platform sgx or sim" in done.stderr


def test_in_sgx_there_is_no_tls_listener(run: Run, served: Served, backend: FakeBackend) -> None:
    assert run("login", served.url, input=f"{served.token}\n").exit_code == 0
    done = run("deploy", "--model", "tiny", "--name", "chat", "--platform", "sgx", "--tls")
    assert (done.exit_code, backend.started) == (2, [])
    assert "without --tls" in done.stderr


@pytest.mark.parametrize("option", ["--api-keys", "--broker", "--bundle", "--policy", "--secrets"])
def test_what_a_public_model_cannot_have_is_refused_and_not_passed_over(
    run: Run, served: Served, tmp_path: Path, option: str
) -> None:
    """With its keys left out it would serve everybody."""
    assert run("login", served.url, input=f"{served.token}\n").exit_code == 0
    (tmp_path / "given").write_text("x")
    done = run("deploy", "--model", "tiny", "--name", "chat", "--platform", "sim", option, str(tmp_path / "given"))
    assert done.exit_code == 2
    assert "Only with an app of your own" in done.stderr or "has no secrets" in done.stderr
