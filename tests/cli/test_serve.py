import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.cli.running import run

from cloister.cli.local import LocalEnclave, Plan, owner_key, policy_for, write_root
from cloister.cli.main import app
from cloister.cli.serve import _warn_of_plaintext, _warn_of_tls
from cloister.enclave.boot import KeyHash
from cloister.errors import WrongUse
from cloister.host.process import names_of, origins
from cloister.models.download import resolve
from cloister.owner.deployment import owner_name
from cloister.sim import Device


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def test_refuses_to_simulate_unasked() -> None:
    refused = run(app, "serve", "tiny")
    assert refused.exit_code == 2
    assert "--platform sim" in refused.stderr


def test_refuses_a_platform_without_a_driver() -> None:
    assert run(app, "serve", "tiny", "--platform", "tdx").exit_code == 2


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_simulates_on_loopback_only(host: str) -> None:
    refused = run(app, "serve", "tiny", "--platform", "sim", "--host", host)
    assert refused.exit_code == 2
    assert "loopback" in refused.stderr


def test_refuses_a_model_that_is_not_there() -> None:
    refused = run(app, "serve", "nowhere.gguf", "--platform", "sim")
    assert refused.exit_code == 2
    assert "nowhere.gguf" in refused.stderr


def test_says_what_a_model_takes_and_refuses_one_that_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.cli.serve.available_memory", lambda: 300_000)
    refused = run(app, "serve", "tiny", "--platform", "sim")
    assert refused.exit_code == 2
    assert "memory  " in refused.stderr
    assert "does not fit" in refused.stderr
    assert "models quantize" in refused.stderr


def test_refuses_a_cache_of_another_type() -> None:
    refused = run(app, "serve", "tiny", "--platform", "sim", "--kv-type", "q2_K")
    assert refused.exit_code == 2
    assert "f16 or q8_0" in refused.stderr


def test_two_starts_at_once_have_one_owner() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len({owner_name(key) for key in pool.map(lambda _: owner_key(), range(8))}) == 1


@pytest.mark.parametrize("damage", ["", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_damaged_owner_key_is_not_replaced_silently(state: Path, damage: str) -> None:
    owner_key()
    (state / "cloister" / "owner.pem").write_text(damage)
    with pytest.raises(WrongUse):
        owner_key()


def test_refuses_an_owner_key_that_others_can_read(state: Path) -> None:
    owner_key()
    (state / "cloister" / "owner.pem").chmod(0o644)
    with pytest.raises(WrongUse, match="Others"):
        owner_key()


def test_refuses_a_state_directory_that_others_can_reach(state: Path) -> None:
    """They could put another simulator's root in the place of this one's."""
    owner_key()
    (state / "cloister").chmod(0o770)
    with pytest.raises(WrongUse, match="Others"):
        owner_key()
    with pytest.raises(WrongUse, match="Others"):
        write_root(Device.open(state / "sim"))


def test_the_owner_key_is_made_once_and_private(state: Path) -> None:
    assert owner_name(owner_key()) == owner_name(owner_key())
    file = state / "cloister" / "owner.pem"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_the_policy_pins_all_that_can_be_pinned() -> None:
    plan = Plan.make(resolve("tiny"))
    policy = policy_for(plan, b"root")
    assert policy.models == frozenset({plan.model_digest})
    assert policy.owner_key == plan.owner
    assert policy.measurements["sim"] == (plan.measurement.components(),)
    assert policy.config == plan.config.digest().hex()
    assert policy.deployment == "local"


@pytest.mark.parametrize("name", ["ehbp", "plaintext", "tls"])
def test_what_weakens_is_off_unless_asked_and_named_when_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plans: list[Plan] = []

    def started(plan: Plan, **_: object) -> None:
        plans.append(plan)
        raise WrongUse("enough was seen")

    monkeypatch.setattr("cloister.cli.serve.LocalEnclave", started)
    for options in ((), (f"--{name}",)):
        assert run(app, "serve", "tiny", "--platform", "sim", *options).exit_code == 2
    seen = [(getattr(plan.config, name), name in plan.config.insecure) for plan in plans]
    assert seen == [(False, False), (True, True)]
    assert name in policy_for(plans[1], b"root").tolerate_insecure


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
@pytest.mark.parametrize("platform", ["sim", "tdx"])
def test_plaintext_is_answered_on_loopback_only(monkeypatch: pytest.MonkeyPatch, host: str, platform: str) -> None:
    monkeypatch.setattr("cloister.cli.serve._find_platform", lambda _asked: platform)
    refused = run(app, "serve", "tiny", "--plaintext", "--host", host)
    assert refused.exit_code == 2
    assert "Plaintext is answered on loopback only" in refused.stderr


def test_plaintext_is_said_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    _warn_of_plaintext("http://127.0.0.1:8484")
    said = capsys.readouterr().err
    assert "PLAINTEXT" in said
    assert 'dangerously_tolerate_insecure = ["plaintext"]' in said


def test_a_tls_listener_is_called_by_what_leads_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names_of("127.0.0.1") == names_of("localhost") == ("localhost", "127.0.0.1")
    assert names_of("::1") == ("localhost", "::1")
    assert (names_of("10.0.0.7"), names_of("chat.example")) == (("10.0.0.7",), ("chat.example",))
    assert origins(("localhost", "::1"), 8443) == ("https://localhost:8443", "https://[::1]:8443")
    monkeypatch.setattr("cloister.cli.serve._find_platform", lambda _asked: "tdx")
    nameless = run(app, "serve", "tiny", "--tls", "--host", "0.0.0.0", "--dangerously-without-api-keys")
    assert nameless.exit_code == 2
    assert "--tls-name" in nameless.stderr


def test_a_name_without_a_tls_listener_is_wrong_use() -> None:
    assert run(app, "serve", "tiny", "--platform", "sim", "--tls-name", "chat.example").exit_code == 2


def test_a_tls_port_that_is_taken_is_named() -> None:
    plan = Plan.make(resolve("tiny"), tls=True)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(WrongUse) as caught:
        LocalEnclave(plan, tls_port=taken.getsockname()[1])
    assert "--tls-port" in caught.value.hint


def test_tls_is_said_to_be_weaker(capsys: pytest.CaptureFixture[str]) -> None:
    _warn_of_tls(("https://localhost:8443",))
    said = capsys.readouterr().err
    assert "https://localhost:8443" in said
    assert "--save-cert" in said
    assert 'dangerously_tolerate_insecure = ["tls"]' in said


def test_keys_are_on_when_there_are_any_and_their_absence_is_named() -> None:
    assert Plan.make(resolve("tiny")).config.insecure == ("api-keys-off",)
    assert Plan.make(resolve("tiny"), keys=(KeyHash("a", "0" * 64),)).config.insecure == ()
