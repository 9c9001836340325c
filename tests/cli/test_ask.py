import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import MODEL, Enclave
from tests.client.deployment import Deployment, InnerApp, Served
from typer.testing import Result

from cloister.errors import EngineDied
from cloister.evidence.launch import App
from cloister.sim import Device

Run = Callable[..., Result]


def test_the_answer_is_all_that_goes_to_standard_output(run: Run, enclave: Enclave) -> None:
    ran = run("ask", enclave.url, "hello", *enclave.trusted)
    assert (ran.exit_code, ran.stdout) == (0, "You said hello.\n")
    assert ran.stderr.startswith("SIMULATED  sim, deployment laptop, toy (q8_0, sha256 abababababab…), until ")


def test_nothing_is_asked_of_an_enclave_that_is_not_trusted(run: Run, enclave: Enclave) -> None:
    ran = run("ask", enclave.url, "my secret")
    assert (ran.exit_code, ran.stdout) == (3, "")
    assert enclave.gateway.paths == ["GET /.well-known/cloister-attestation"]
    assert "failed: evidence.root" in ran.stderr
    assert "my secret" not in ran.output


def test_of_an_app_that_may_be_no_model_it_says_how_to_ask_it(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    device = Device.open(tmp_path / "own")
    (tmp_path / "own.pem").write_bytes(device.root_pem)
    own = Deployment(device, InnerApp())
    own.launch = replace(own.launch, app=App("wsgi", "66" * 32))
    with Served(own.gateway) as served:
        ran = run("ask", served.url, "so it goes", "--dangerously-trust-simulator", tmp_path / "own.pem")
    assert "cloister fetch URL /PATH" in ran.stderr
    assert "cloister fetch" not in run("ask", enclave.url, "hello", *enclave.trusted).stderr


@pytest.mark.parametrize("arguments", [["-"], []])
def test_the_question_may_come_from_a_pipe(run: Run, enclave: Enclave, arguments: list[str]) -> None:
    assert run("ask", enclave.url, *arguments, *enclave.trusted, input="two\nlines").stdout == "You said two\nlines.\n"


def test_settings_reach_the_engine(run: Run, enclave: Enclave) -> None:
    options = ["--system", "Be brief.", "--max-tokens", "9", "--temperature", "0.5", "--seed", "7"]
    run("ask", enclave.url, "hello", *options, *enclave.trusted)
    sampling = enclave.model.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (9, 0.5, 7)
    assert enclave.model.asked() == [[("system", "Be brief."), ("user", "hello")]]


def test_raw_goes_without_a_template(run: Run, enclave: Enclave) -> None:
    assert run("ask", enclave.url, "Once upon", "--raw", *enclave.trusted).stdout == "You said Once upon.\n"
    assert enclave.model.requests[0].prompt.text == "Once upon"


def test_json_holds_answer_counts_and_verification(run: Run, enclave: Enclave) -> None:
    told = json.loads(run("ask", enclave.url, "hello", "--json", *enclave.trusted).stdout)
    assert (told["answer"], told["finish_reason"], told["usage"]["prompt_tokens"]) == ("You said hello.", "stop", 3)
    assert told["verification"]["verdict"] == "simulated"


def test_a_hostile_model_cannot_paint(run: Run, enclave: Enclave) -> None:
    hostile = ["\x1b[2J\x1b[32m", "VERIFIED\r", "\x1b]52;c;cm0=\x07", "\u202eok\u2066", "\x9b", "31m\b\b", "\x00né"]
    enclave.model.answer = lambda asked: hostile
    ran = run("ask", enclave.url, "hello", *enclave.trusted)
    assert ran.stdout == "[2J[32mVERIFIED]52;c;cm0=ok31mné\n"
    assert json.loads(run("ask", enclave.url, "x", "--json", *enclave.trusted).stdout)["answer"] == "".join(hostile)


def test_an_engine_that_dies_in_the_middle_is_an_error(run: Run, enclave: Enclave) -> None:
    enclave.model.answer = lambda asked: ["Part", EngineDied("gone")]
    ran = run("ask", enclave.url, "hello", *enclave.trusted)
    assert (ran.exit_code, ran.stdout) == (5, "Part\n")
    assert "engine" in ran.stderr
    assert run("ask", enclave.url, "hello", "--json", *enclave.trusted).stdout == ""


def test_an_answer_that_is_cut_on_the_way_is_an_error(run: Run, enclave: Enclave) -> None:
    enclave.model.answer = lambda asked: ["word "] * 400
    enclave.gateway.cut = 3000
    ran = run("ask", enclave.url, "hello", *enclave.trusted)
    assert ran.exit_code == 3
    assert "error: " in ran.stderr


def test_an_api_key_is_needed_where_keys_are_on(run: Run, start_enclave: Callable[..., Enclave]) -> None:
    enclave = start_enclave(api_key="ck-right")
    ran = run("ask", enclave.url, "hello", *enclave.trusted)
    assert ran.exit_code == 2
    assert "CLOISTER_API_KEY" in ran.stderr
    assert run("ask", enclave.url, "hello", "--api-key", "ck-wrong", *enclave.trusted).exit_code == 2
    assert run("ask", enclave.url, "hello", "--api-key", "ck-right", *enclave.trusted).exit_code == 0
    assert "ck-" not in ran.output


def test_an_api_key_may_come_from_the_environment(
    run: Run, start_enclave: Callable[..., Enclave], monkeypatch: pytest.MonkeyPatch
) -> None:
    enclave = start_enclave(api_key="ck-right")
    monkeypatch.setenv("CLOISTER_API_KEY", "ck-right")
    assert run("ask", enclave.url, "hello", *enclave.trusted).exit_code == 0
    assert run("ask", enclave.url, "hello", "--api-key", "ck-wrong", *enclave.trusted).exit_code == 2


@pytest.mark.parametrize("key", ["ck-geheim\n", "ck geheim", "ck-geheïm", "\x1bck-geheim"])
def test_an_api_key_that_cannot_travel_is_wrong_use_and_not_shown(run: Run, enclave: Enclave, key: str) -> None:
    ran = run("ask", enclave.url, "hello", "--api-key", key, *enclave.trusted)
    assert ran.exit_code == 2
    assert "geh" not in ran.output
    assert enclave.gateway.paths == []


@pytest.mark.parametrize(
    "arguments", [["a\udcffb"], ["hello", "--system", "\udcff"], ["hello", "--temperature", "nan"]]
)
def test_what_is_no_text_or_number_is_wrong_use(run: Run, enclave: Enclave, arguments: list[str]) -> None:
    ran = run("ask", enclave.url, *arguments, *enclave.trusted)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert enclave.model.requests == []


def _settings(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_flag_goes_before_the_environment_the_project_and_the_user(
    run: Run, enclave: Enclave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["user", "project", "environment", "flag"]
    for name in names:
        _settings(tmp_path / f"{name}.toml", f'version = 1\ndeployment = "{name}"\n')
    seen = []
    for name, arguments in zip(names, [[], [], [], ["--policy", tmp_path / "flag.toml"]], strict=True):
        if name == "user":
            _settings(tmp_path / "config" / "cloister" / "config.toml", '[client]\npolicy = "../../user.toml"\n')
        if name == "project":
            _settings(tmp_path / "work" / "cloister.toml", '[client]\npolicy = "../project.toml"\n')
        if name == "environment":
            monkeypatch.setenv("CLOISTER_POLICY", str(tmp_path / "environment.toml"))
        told = json.loads(run("verify", enclave.url, "--json", *enclave.trusted, *arguments).stdout)
        seen += [factor["expected"] for factor in told["factors"] if factor["step"] == "deployment"]
    assert seen == names


def test_a_policy_of_first_use_is_said_on_every_screen(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    _settings(tmp_path / "policy.toml", 'version = 1\ntrust = "first-use"\n')
    policy = ["--policy", tmp_path / "policy.toml", *enclave.trusted]
    assert "FIRST USE" in run("ask", enclave.url, "hello", *policy).stderr
    assert "FIRST USE" in run("chat", enclave.url, *policy).stderr
    assert "  trust: First use" in run("verify", enclave.url, *policy).stdout
    assert "FIRST USE" not in run("ask", enclave.url, "hello", *enclave.trusted).stderr


@pytest.mark.parametrize(
    "danger", ['dangerously_trust_simulator = "root.pem"', 'dangerously_tolerate_insecure = ["api-keys-off"]']
)
def test_a_policy_that_loosens_something_takes_a_flag(run: Run, enclave: Enclave, tmp_path: Path, danger: str) -> None:
    _settings(tmp_path / "policy.toml", f"version = 1\n{danger}\n")
    _settings(tmp_path / "work" / "cloister.toml", '[client]\npolicy = "../policy.toml"\n')
    ran = run("ask", enclave.url, "hello", *enclave.trusted)
    assert (ran.exit_code, enclave.gateway.paths) == (2, [])
    assert "dangerously_" in ran.stderr
    assert run("ask", enclave.url, "hello", "--policy", tmp_path / "policy.toml", *enclave.trusted).exit_code == 0


@pytest.mark.parametrize(
    "text",
    [
        "[client]\ndangerously_trust_simulator = 'x'\n",
        "client = 1\n",
        "[client]\napi_key = 'x'\n",
        "[client]\nrequire_pq = 1\n",
        "[client]\nrequire_pq = 'true'\n",
        "[client]\npolicy = 1\n",
        "nonsense",
        "x = " + "[" * 50_000,
    ],
)
def test_a_project_file_cannot_set_anything_else(run: Run, enclave: Enclave, tmp_path: Path, text: str) -> None:
    _settings(tmp_path / "work" / "cloister.toml", text)
    assert run("ask", enclave.url, "hello", *enclave.trusted).exit_code == 4
    assert enclave.gateway.paths == []


def test_a_receipt_keeps_the_answer_with_its_proof(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    file = tmp_path / "receipt.json"
    ran = run("ask", enclave.url, "hello", "--receipt", file, *enclave.trusted)
    assert (ran.exit_code, ran.stdout) == (0, "You said hello.\n")
    assert f"cloister receipt verify {file}" in ran.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    checked = run("receipt", "verify", file, *enclave.trusted)
    assert checked.exit_code == 0, checked.output
    assert checked.stdout.startswith(f"answered by  {MODEL.name}, sha256:{MODEL.sha256}\n")
    assert json.loads(run("receipt", "verify", file, "--json", *enclave.trusted).stdout)["models"] == [
        {"name": MODEL.name, "sha256": MODEL.sha256}
    ]


def test_a_receipt_goes_with_json_too(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    ran = run("ask", enclave.url, "hello", "--json", "--receipt", tmp_path / "r", *enclave.trusted)
    assert json.loads(ran.stdout)["answer"] == "You said hello."
    assert run("receipt", "verify", tmp_path / "r", *enclave.trusted).exit_code == 0


def test_a_receipt_that_was_touched_is_refused(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    file = tmp_path / "receipt.json"
    run("ask", enclave.url, "hello", "--receipt", file, *enclave.trusted)
    kept = json.loads(file.read_text())

    def verified(*options: str | Path, **changes: Any) -> int:
        (tmp_path / "changed").write_text(json.dumps({**kept, **changes}))
        return run("receipt", "verify", tmp_path / "changed", *options).exit_code

    def flipped(name: str) -> str:
        content = base64.b64decode(kept[name])
        return base64.b64encode(content.replace(b"hello", b"hellO")).decode()

    trusted = enclave.trusted
    assert verified(*trusted) == 0
    assert verified() == 3, "under no policy"
    assert verified(*trusted, request=flipped("request")) == 3
    assert verified(*trusted, answer=flipped("answer")) == 3
    assert verified(*trusted, answer=base64.b64encode(b"data: [DONE]\n\n").decode()) == 4
    assert verified(*trusted, document={**kept["document"], "nonce": "00" * 32}) == 3
    assert verified(*trusted, cloister_receipt=2) == 4
    assert verified(*trusted, request="%") == 4
    assert verified(*trusted, more=1) == 4
    assert verified(*trusted, "--request", file) == 2
    assert run("receipt", "verify", tmp_path / "none", *trusted).exit_code == 2
    (tmp_path / "bare").write_bytes(base64.b64decode(kept["answer"]))
    assert run("receipt", "verify", tmp_path / "bare", *trusted).exit_code == 2


def test_no_receipt_is_kept_of_an_answer_that_was_cut_behind_its_end(
    run: Run, enclave: Enclave, tmp_path: Path
) -> None:
    """All of the text came, and the receipt did not."""
    whole = run("ask", enclave.url, "hello", "--receipt", tmp_path / "whole", *enclave.trusted)
    assert whole.exit_code == 0
    for cut in range(500, 20_000, 250):
        enclave.gateway.cut = cut
        ran = run("ask", enclave.url, "hello", "--receipt", tmp_path / "cut", *enclave.trusted)
        assert (ran.exit_code == 0) == (tmp_path / "cut").exists()
        if ran.exit_code == 0:
            break
        assert ran.exit_code in (2, 3)
    assert run("receipt", "verify", tmp_path / "cut", *enclave.trusted).exit_code == 0


def test_a_receipt_that_cannot_be_written_is_wrong_use(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    ran = run("ask", enclave.url, "hello", "--receipt", tmp_path / "no" / "folder", *enclave.trusted)
    assert (ran.exit_code, ran.stdout) == (2, "You said hello.\n")
