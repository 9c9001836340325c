import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import LAUNCH, MODEL, OWNER, Enclave
from typer.testing import Result

from cloister.cli.verify import _show
from cloister.evidence.document import Document, parse_document

Run = Callable[..., Result]


def test_a_simulator_that_the_caller_names_is_trusted_and_called_by_its_name(run: Run, enclave: Enclave) -> None:
    ran = run("verify", enclave.url, *enclave.trusted)
    assert ran.exit_code == 0
    lines = ran.stdout.splitlines()
    assert lines[0] == "SIMULATED  sim"
    assert f"  model toy      q8_0, sha256 {MODEL.sha256}" in lines
    assert "  weakened       api-keys-off" in lines
    assert lines[-1] == "Simulated hardware proves nothing about who can read: whoever runs it can."
    assert "VERIFIED" not in ran.output
    assert "\x1b" not in ran.output


def test_it_says_what_is_not_proved(run: Run, enclave: Enclave) -> None:
    said = run("verify", enclave.url, *enclave.trusted).stdout.partition("not proved:\n")[2]
    assert "custody: " in said
    assert "measurement: " in said


def test_without_a_policy_a_simulator_is_refused_and_the_factor_named(run: Run, enclave: Enclave) -> None:
    ran = run("verify", enclave.url)
    assert ran.exit_code == 3
    assert ran.stdout.startswith("NOT TRUSTED\n")
    assert "  FAIL evidence.root" in ran.stdout
    assert "hint: " in ran.stderr
    assert enclave.gateway.paths == ["GET /.well-known/cloister-attestation"]


def test_a_policy_file_pins_the_model(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    lines = f'version = 1\ndangerously_trust_simulator = "root.pem"\ndeployment = "laptop"\nowner_key = "{OWNER}"\n'
    lines += 'dangerously_tolerate_insecure = ["api-keys-off"]\n'
    policy.write_text(lines + f'models = ["sha256:{MODEL.sha256}"]\n')
    assert run("verify", enclave.url, "--policy", policy).exit_code == 0
    policy.write_text(lines + f'models = ["sha256:{"00" * 32}"]\n')
    ran = run("verify", enclave.url, "--policy", policy)
    assert ran.exit_code == 3
    assert "  FAIL models" in ran.stdout


def test_a_policy_that_is_none_is_malformed(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("version = 1\nmodles = []\n")
    assert run("verify", enclave.url, "--policy", tmp_path / "policy.toml").exit_code == 4
    assert run("verify", enclave.url, "--policy", tmp_path / "missing.toml").exit_code == 2
    assert enclave.gateway.paths == []


def test_json_tells_it_all(run: Run, enclave: Enclave) -> None:
    ran = run("verify", enclave.url, "--json", *enclave.trusted)
    told = json.loads(ran.stdout)
    assert (told["verdict"], told["platform"], told["models"][0]["name"]) == ("simulated", "sim", "toy")
    refused = run("verify", enclave.url, "--json")
    told = json.loads(refused.stdout)
    assert (told["verdict"], told["error"]) == ("not-trusted", "VerificationFailed")
    assert "evidence.root" in [factor["step"] for factor in told["factors"] if factor["verdict"] == "fail"]
    assert refused.exit_code == 3


def test_nobody_there_is_unreachable_and_no_verdict(run: Run, nowhere: str) -> None:
    ran = run("verify", nowhere)
    assert (ran.exit_code, ran.stdout) == (5, "")
    told = run("verify", nowhere, "--json")
    assert (told.exit_code, json.loads(told.stdout)["verdict"]) == (5, "not-verified")


@pytest.mark.parametrize("url", ["http://", "http://[", "http://[#x", "http://user@host", "https://host?x=1"])
def test_an_address_that_is_none_is_wrong_use(run: Run, url: str) -> None:
    assert run("verify", url).exit_code == 2


def test_the_address_may_name_owner_and_deployment(run: Run, enclave: Enclave) -> None:
    assert run("verify", f"{enclave.url}/#owner={OWNER}&deployment=laptop", *enclave.trusted).exit_code == 0
    ran = run("verify", f"{enclave.url}/#deployment=other", *enclave.trusted)
    assert ran.exit_code == 3
    assert "  FAIL deployment" in ran.stdout


@pytest.fixture
def saved(run: Run, enclave: Enclave, tmp_path: Path) -> Path:
    assert run("verify", enclave.url, *enclave.trusted, "--save", tmp_path / "saved.json").exit_code == 0
    return tmp_path / "saved.json"


def test_a_saved_document_verifies_again_offline_at_its_time(run: Run, enclave: Enclave, saved: Path) -> None:
    enclave.gateway.paths.clear()
    ran = run("verify", saved, *enclave.trusted)
    assert (ran.exit_code, ran.stdout.splitlines()[0]) == (0, "SIMULATED  sim")
    assert "judged as of 20" in ran.stderr
    assert run("verify", saved).exit_code == 3
    assert enclave.gateway.paths == []


def _change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_saved_document_does_not_verify_at_another_time_or_for_another_nonce(
    run: Run, enclave: Enclave, saved: Path
) -> None:
    at = json.loads(saved.read_text())["at"]
    _change(saved, at=at + 8000)
    assert "FAIL expires" in run("verify", saved, *enclave.trusted).stdout
    _change(saved, at=at, nonce="00" * 32)
    assert "FAIL binding" in run("verify", saved, *enclave.trusted).stdout


def test_a_bare_document_needs_its_nonce(run: Run, enclave: Enclave, saved: Path, tmp_path: Path) -> None:
    raw = json.loads(saved.read_text())
    bare = tmp_path / "bare.json"
    bare.write_bytes(base64.b64decode(raw["document"]))
    assert run("verify", bare, *enclave.trusted).exit_code == 4
    assert run("verify", bare, "--nonce", raw["nonce"], *enclave.trusted).exit_code == 0
    assert run("verify", bare, "--nonce", "00" * 32, *enclave.trusted).exit_code == 3


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"cloister":1}', b'{"cloister":2,"at":0,"nonce":"","document":""}']
    + [
        b'{"cloister":1,"at":%s,"nonce":"","document":""}' % at
        for at in (b"1e999", b"1e17", b"-1e17", b"NaN", b"null", b'"x"', b"9e99")
    ],
)
def test_a_file_that_is_none_is_malformed(run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert run("verify", tmp_path / "file").exit_code == 4


def test_a_refused_document_can_be_kept_too(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    assert run("verify", enclave.url, "--save", tmp_path / "refused.json").exit_code == 3
    assert run("verify", tmp_path / "refused.json", *enclave.trusted).exit_code == 0


def test_a_file_that_is_not_there_is_wrong_use(run: Run, tmp_path: Path) -> None:
    assert run("verify", tmp_path / "missing").exit_code == 2
    assert run("verify", tmp_path / "missing", "--save", tmp_path / "x").exit_code == 2


PAINT = "\x1b[2J\x1b[H\x1b[32mVERIFIED\x1b]52;c;cm0=\x07\r\n\u202eVERIFIED\x9b1m"


def test_a_hostile_document_cannot_paint(run: Run, enclave: Enclave) -> None:
    def paint(document: bytes) -> bytes:
        items = dict(parse_document(document).items)
        changed = LAUNCH.replace(b'"logs":"none"', b'"logs":"none","x":' + json.dumps(PAINT).encode())
        items["launch"] = type(items["launch"])("application/json", changed)
        return Document({**items, "statement": items["statement"]}).encode()

    enclave.gateway.change = paint
    _assert_harmless(run("verify", enclave.url, *enclave.trusted), code=4)


def test_hostile_bytes_in_place_of_a_document_cannot_paint(run: Run, enclave: Enclave) -> None:
    enclave.gateway.change = lambda document: PAINT.encode()
    _assert_harmless(run("verify", enclave.url, *enclave.trusted), code=4)


def _assert_harmless(ran: Result, *, code: int) -> None:
    assert ran.exit_code == code
    assert not [char for char in ran.output if char != "\n" and not char.isprintable()]
    assert not [line for line in ran.output.splitlines() if line.startswith(("VERIFIED", "SIMULATED"))]


class _Hostile:
    """Fields as a verifier of another platform might let them through."""

    def __getattr__(self, name: str) -> Any:
        return [] if name in ("models", "insecure", "factors") else 0 if name == "expires_at" else _Text()


class _Text(str, _Hostile):
    def __new__(cls) -> "_Text":
        return str.__new__(cls, PAINT)


def test_hostile_fields_stay_on_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    hostile: Any = _Hostile()
    _show(hostile)
    shown = capsys.readouterr().out
    assert not [char for char in shown if char != "\n" and not char.isprintable()]
    assert len([line for line in shown.splitlines() if line.startswith("VERIFIED")]) == 0


def test_the_address_may_not_contradict_the_policy(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text('version = 1\ndeployment = "other"\n')
    policy = ["--policy", tmp_path / "policy.toml"]
    assert run("verify", f"{enclave.url}/#deployment=laptop", *policy, *enclave.trusted).exit_code == 2
    assert enclave.gateway.paths == []


def test_a_nonce_is_for_a_file_alone(run: Run, enclave: Enclave) -> None:
    assert run("verify", enclave.url, "--nonce", "00" * 32, *enclave.trusted).exit_code == 2
    assert enclave.gateway.paths == []


@pytest.mark.parametrize(
    "fragment",
    ["onwer=x", "owner", "owner=", "deployment=laptop&deployment=laptop", "deployment=laptop&x=1", "owner=x", OWNER],
)
def test_a_pin_in_the_address_that_is_misspelt_is_wrong_use(run: Run, enclave: Enclave, fragment: str) -> None:
    assert run("verify", f"{enclave.url}/#{fragment}", *enclave.trusted).exit_code == 2
    assert enclave.gateway.paths == []
