import ast
import base64
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.cli import hardware
from tests.cli.conftest import LAUNCH, MODEL, OWNER, Enclave
from tests.collateral.service import Running, intel_replies
from tests.collateral.service import roots as vendor_roots
from tests.vendors import intel
from tests.verify.world import NOW
from typer.testing import Result

import cloister
from cloister.cli import judgement, output
from cloister.cli.judgement import reason_of, show
from cloister.client.account import urgency
from cloister.client.explanations import EXPLANATIONS, explain
from cloister.collateral import complete
from cloister.evidence.document import Document, parse_document
from cloister.evidence.statement import INSECURE_NAMES
from cloister.verify import Factor
from cloister.verify.factors import passed
from cloister.verify.intel import judge_tdx
from cloister.verify.platform import Expiry, TcbLevel

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "cloister" / "seen.json"


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


def test_the_lines_that_are_shown_make_the_same_command_pass(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    policy, document = tmp_path / "policy.toml", tmp_path / "document"
    start = 'version = 1\ndangerously_trust_simulator = "root.pem"\ndangerously_tolerate_insecure = ["api-keys-off"]\n'
    pinned = f'deployment = "other"\n[measurements]\nsim = [{{ measurement = "{"00" * 32}" }}]\n'
    for target in (enclave.url, document):
        policy.write_text(start + pinned)
        saving = ["--save", document] if target == enclave.url else []
        ran = run("verify", target, "--policy", policy, "--explain", *saving)
        assert ran.exit_code == 3
        assert f"expected: {'00' * 32}" in ran.stdout
        told = json.loads(run("verify", target, "--policy", policy, "--json").stdout)
        lines = ran.stdout.partition("with that policy.\n")[2].partition("\n\n")[0] + "\n"
        assert told["policy_change"] == lines
        policy.write_text(start + lines)
        assert run("verify", target, "--policy", policy).exit_code == 0


def test_no_lines_are_shown_for_what_no_policy_should_accept(run: Run, enclave: Enclave) -> None:
    assert "with that policy" not in run("verify", enclave.url).output
    assert json.loads(run("verify", enclave.url, "--json").stdout)["policy_change"] == ""


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
    for wrong in ("zz", raw["nonce"][1:], "00" * 31):
        ran = run("verify", bare, "--nonce", wrong, *enclave.trusted)
        assert (ran.exit_code, ran.stdout) == (2, "")
        assert "no saved document" not in ran.stderr
        assert "nonce" in ran.stderr


def test_a_policy_at_fault_is_no_verdict(run: Run, saved: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text("version = 2\n")
    ran = run("verify", saved, "--policy", policy)
    assert (ran.exit_code, ran.stdout) == (4, "")
    told = json.loads(run("verify", saved, "--policy", policy, "--json").stdout)
    assert (told["verdict"], told["error"], told["reason"]) == ("not-verified", "MalformedPolicy", None)
    settings = tmp_path / "config" / "cloister" / "config.toml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(f'[client]\npolicy_signer = "{OWNER}"\n')
    policy.write_text("version = 1\n")
    ran = run("verify", saved, "--policy", policy)
    assert (ran.exit_code, ran.stdout) == (3, "")
    assert "not signed" in ran.stderr


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

    tcb = TcbLevel(PAINT, (PAINT,), 1e300)
    expiries = (Expiry(PAINT, 0.0), Expiry(PAINT, -1e300), Expiry(PAINT, float("inf")))
    factors = (Factor(PAINT, "pass", PAINT, PAINT, PAINT), Factor(PAINT, "not-checked", PAINT, PAINT, PAINT))
    expires_at = verified_at = 0.0

    def __getattr__(self, name: str) -> Any:
        return [] if name in ("models", "insecure") else _Text()


class _Text(str, _Hostile):
    def __new__(cls) -> "_Text":
        return str.__new__(cls, PAINT)


@pytest.mark.parametrize("terminal", [False, True])
def test_hostile_fields_stay_on_their_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda stream: terminal)
    hostile: Any = _Hostile()
    show(hostile)
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


# At another time


@pytest.fixture
def hardware_root() -> Iterator[None]:
    with hardware.trusting_the_synthetic_root():
        yield


@pytest.fixture
def policy(tmp_path: Path) -> list[str | Path]:
    (tmp_path / "hardware.toml").write_text(hardware.POLICY)
    return ["--policy", tmp_path / "hardware.toml"]


@pytest.fixture
def good(hardware_root: None, tmp_path: Path) -> Path:
    return hardware.save(tmp_path / "good.json", hardware.document())


@pytest.mark.parametrize("at", [f"{NOW + 60:.0f}", f"{NOW + 60:.2f}", "2027-01-15T08:01:00Z", "2027-01-15 08:01"])
def test_a_saved_document_is_judged_at_the_time_one_asks_for(
    run: Run, good: Path, policy: list[str | Path], at: str
) -> None:
    ran = run("verify", good, *policy, "--at", at)
    assert ran.exit_code == 0
    assert ran.stderr == "judged as of 2027-01-15 08:01:00 UTC, as you asked: it says nothing about now\n"


def test_at_a_time_after_its_own_only_the_time_fails(run: Run, good: Path, policy: list[str | Path]) -> None:
    ran = run("verify", good, *policy, "--at", "2027-01-16")
    assert ran.exit_code == 3
    assert ran.stdout.splitlines()[-1].startswith("TOO OLD: nothing but the time failed.")
    ran = run("verify", good, *policy, "--at", "2027-06-01")
    assert "  FAIL evidence.expired" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("AN ATTACK OR A MISTAKE")


@pytest.mark.parametrize("at", ["soon", "1e9", "-5", "99999999999999999", "2027-13-01", "nan", "."])
def test_a_time_that_is_none_is_wrong_use(run: Run, good: Path, policy: list[str | Path], at: str) -> None:
    assert run("verify", good, *policy, f"--at={at}").exit_code == 2


def test_an_enclave_is_judged_now(run: Run, enclave: Enclave) -> None:
    assert run("verify", enclave.url, "--at", "2027-01-15", *enclave.trusted).exit_code == 2
    assert enclave.gateway.paths == []


# The forecast


def test_the_forecast_tells_what_ends_when_soonest_first(run: Run, good: Path, policy: list[str | Path]) -> None:
    lines = run("verify", good, *policy).stdout.splitlines()
    at = lines.index("forecast:")
    assert lines[at - 4 : at] == [
        "firmware:",
        "  UpToDate",
        "  in step with the vendor's updates of 2026-11-01, 75 days ago",
        "  no open advisories",
    ]
    assert lines[at + 1 : at + 6] == [
        "     in 29 days  2027-02-13  TCB info  renew soon",
        "     in 29 days  2027-02-13  QE identity  renew soon",
        "     in 29 days  2027-02-13  PCK revocation list  renew soon",
        "     in 29 days  2027-02-13  root revocation list  renew soon",
        "    in 300 days  2027-11-11  PCK certificate",
    ]


@pytest.mark.parametrize(
    ("days", "said"),
    [
        (-1, "over  2027-01-14  x  renew now"),
        (0.5, "today  2027-01-15  x  renew now"),
        (1.5, "in 1 day  2027-01-16  x  renew now"),
        (6.9, "in 6 days  2027-01-22  x  renew now"),
        (7, "in 7 days  2027-01-22  x  renew soon"),
        (29.9, "in 29 days  2027-02-14  x  renew soon"),
        (30, "in 30 days  2027-02-14  x"),
    ],
)
def test_the_forecast_warns_in_words_and_colours(capsys: pytest.CaptureFixture[str], days: float, said: str) -> None:
    judgement._show_forecast(None, (Expiry("x", NOW + days * 86400),), NOW)
    assert capsys.readouterr().out.splitlines()[1].strip() == said
    assert urgency(days)[1] == ("bad" if days < 7 else "warn" if days < 30 else "")


def test_a_tolerated_status_and_its_advisories_are_said(
    run: Run, hardware_root: None, policy: list[str | Path], tmp_path: Path
) -> None:
    (tmp_path / "hardware.toml").write_text(hardware.POLICY + '[tcb]\ntolerate = ["OutOfDate"]\n')
    shown = run("verify", hardware.save(tmp_path / "old.json", hardware.out_of_date()), *policy).stdout
    assert "  OutOfDate\n  in step with the vendor's updates of 2025-02-12, 702 days ago\n" in shown
    assert "  open advisories: INTEL-SA-00837\n" in shown


def test_json_is_one_document_with_the_forecast(run: Run, good: Path, policy: list[str | Path]) -> None:
    told = json.loads(run("verify", good, *policy, "--json").stdout)
    assert (told["verdict"], told["platform"], told["first_use"]) == ("trusted", "tdx", False)
    assert told["tcb"]["status"] == "UpToDate"
    assert told["forecast"][0]["what"] == "TCB info"
    assert told["counters"]["release"] == 1
    assert len(told["platform_id"]) == 32
    assert "explanations" not in told


# Why


def test_only_old_firmware_is_out_of_date_and_no_attack(
    run: Run, hardware_root: None, policy: list[str | Path], tmp_path: Path
) -> None:
    saved = hardware.save(tmp_path / "old.json", hardware.out_of_date())
    ran = run("verify", saved, *policy)
    assert ran.exit_code == 3
    assert ran.stdout.splitlines()[-1].startswith("OUT OF DATE, not an attack: ")
    assert json.loads(run("verify", saved, *policy, "--json").stdout)["reason"] == "out-of-date"


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (lambda: hardware.document(intel.other_intel()), "evidence.root"),
        (lambda: hardware.document(report={"td_attributes": hardware.DEBUG}), "evidence.debug"),
        (lambda: hardware.out_of_date(report={"td_attributes": hardware.DEBUG}), "evidence.debug"),
        (lambda: hardware.document(report={"rtmr1": bytes(48)}), "measurement.rtmr1"),
    ],
)
def test_anything_else_is_an_attack_or_a_mistake(
    run: Run, hardware_root: None, policy: list[str | Path], tmp_path: Path, make: Callable[[], Document], step: str
) -> None:
    saved = hardware.save(tmp_path / "saved.json", make())
    ran = run("verify", saved, *policy)
    assert ran.exit_code == 3
    assert f"  FAIL {step}" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("AN ATTACK OR A MISTAKE: ")
    assert json.loads(run("verify", saved, *policy, "--json").stdout)["reason"] == "attack-or-mistake"


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (["tcb.status", "tcb.advisories"], "out-of-date"),
        (["gpu-0.tcb.status", "tpm.tcb.minimum"], "out-of-date"),
        (["tcb.status", "expires"], "attack-or-mistake"),
        (["expires", "issued"], "expired"),
        (["evidence.tcb"], "attack-or-mistake"),
        (["tpm.evidence.tcb"], "attack-or-mistake"),
        (["evidence.tcb-order"], "attack-or-mistake"),
        (["rollback.tcb-evaluation-data-number"], "attack-or-mistake"),
        ([], "attack-or-mistake"),
    ],
)
def test_the_reason_follows_from_what_failed(steps: list[str], reason: str) -> None:
    assert reason_of([*(Factor(step, "fail") for step in steps), passed("document")]) == reason


# --explain


def test_explain_says_of_every_step_what_it_means(run: Run, good: Path, policy: list[str | Path]) -> None:
    plain = run("verify", good, *policy).stdout
    told = json.loads(run("verify", good, *policy, "--json", "--explain").stdout)
    steps = {factor["step"] for factor in told["factors"]}
    assert set(told["explanations"]) == steps
    shown = run("verify", good, *policy, "--explain").stdout
    for one in told["explanations"].values():
        assert one["meaning"] in shown
        assert one["meaning"] not in plain
        assert one["remedy"] not in shown  # nothing failed


def test_explain_says_what_to_do_about_what_failed(
    run: Run, hardware_root: None, policy: list[str | Path], tmp_path: Path
) -> None:
    saved = hardware.save(tmp_path / "old.json", hardware.out_of_date())
    shown = run("verify", saved, *policy, "--explain").stdout
    assert EXPLANATIONS["tcb.status"].meaning in shown
    assert EXPLANATIONS["tcb.status"].remedy in shown
    assert EXPLANATIONS["evidence.debug"].remedy not in shown
    told = json.loads(run("verify", saved, *policy, "--explain", "--json").stdout)
    assert told["explanations"]["tcb.status"]["remedy"] == EXPLANATIONS["tcb.status"].remedy


MAKERS = {"Factor": 0, "compare": 0, "failed": 0, "not_checked": 0, "passed": 0, "_check_identity": 1}
"""Function -> which of its arguments is the step."""

FAMILIES = r"(document|endorsements|evidence|gpu|enrol|insecure|measurement|provenance|rollback|statement|tcb)"
STEP = re.compile(FAMILIES + r"\.[a-z0-9_.*-]+")
NO_STEPS = {"measurement.md"}
"""Strings that look like steps and are none."""


def emitted() -> set[str]:
    """Every step that the verifiers' and the session's code names: what factors are made with, and any text that looks
    like a step; in the tests too. `*` stands for what is filled in."""
    package, tests = Path(cloister.__file__).parent, Path(__file__).parents[1]
    sources = [*(package / "verify").glob("*.py"), package / "client" / "attestor.py"]
    found = {step for path in sources for step in _made(ast.parse(path.read_text()))}
    found |= {f"insecure.{name}" for name in INSECURE_NAMES}
    for path in [*sources, *(tests / "verify").glob("*.py"), *(tests / "client").glob("test_session.py")]:
        texts = (_text(node) for node in ast.walk(ast.parse(path.read_text())))
        found |= {text for text in texts if STEP.fullmatch(text)} - NO_STEPS
    return found


def _made(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MAKERS:
            yield from filter(None, map(_text, node.args[MAKERS[node.func.id] :][:1]))


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "*" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_every_step_that_a_verifier_can_emit_has_a_text() -> None:
    steps = emitted()
    assert len(steps) > 80
    assert [step for step in sorted(steps) if explain(step) is None] == []


def test_no_text_is_for_a_step_that_nobody_emits() -> None:
    steps = emitted()
    words = {word for step in steps for word in (step, step.partition(".")[0])}
    variables = {"config", "deployment", "measurement", "owner", "release"}  # their names are arguments
    assert sorted(set(EXPLANATIONS) - words - variables) == []


def test_the_texts_are_plain_and_short() -> None:
    for step, one in EXPLANATIONS.items():
        for text in (one.meaning, one.remedy):
            assert text[0].isupper(), step
            assert text.endswith((".", "`.")), step
            assert len(re.findall(r"[.!?](?: |$)", text)) <= 3, step
            assert len(text) <= 220, step


@pytest.mark.parametrize(
    ("step", "found"),
    [
        ("measurement.mr_td", "measurement"),
        ("gpu-0.measurement.driver", "measurement"),
        ("gpu-12.gpu.rim.signature", "gpu.rim"),
        ("tpm.evidence.crl", "evidence.crl"),
        ("rollback.pck-crl", "rollback"),
        ("evidence.something-new", "evidence"),
    ],
)
def test_a_step_is_explained_by_its_longest_known_beginning(step: str, found: str) -> None:
    assert explain(step) is EXPLANATIONS[found]


def test_a_step_that_nobody_knows_is_not_explained() -> None:
    assert explain("unheard-of") is None


# On a terminal


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "100")


def test_a_terminal_shows_a_table_that_fits(
    run: Run, good: Path, policy: list[str | Path], terminal: None, tmp_path: Path
) -> None:
    lines = run("verify", good, *policy).stdout.splitlines()
    assert lines[0] == "VERIFIED  tdx"
    at = next(number for number, line in enumerate(lines) if line.startswith("STEP "))
    column = lines[at].index("RESULT")
    assert {line[column : column + 10].strip() for line in lines[at + 1 :]} == {"pass", "not proved", ""}
    assert max(map(len, lines)) <= 100
    old = hardware.save(tmp_path / "old.json", hardware.out_of_date())
    for more in ([], ["--explain"]):
        shown = run("verify", old, *policy, *more).stdout
        assert re.search(r"^tcb.status +FAIL +expected UpToDate\n +got +OutOfDate$", shown, re.MULTILINE)
        assert max(map(len, shown.splitlines())) <= 100
        assert bool(re.search("^evidence.root +pass", shown, re.MULTILINE)) == bool(more)


# What was seen before


def _remember(state: Path, scope: str, **counters: int) -> None:
    told = json.loads(state.read_text())
    told["seen"][scope] |= counters
    state.write_text(json.dumps(told))


def test_a_release_that_was_overtaken_is_refused_by_every_command(run: Run, enclave: Enclave, state: Path) -> None:
    assert run("verify", enclave.url, *enclave.trusted).exit_code == 0
    assert json.loads(state.read_text())["seen"][f"deployment {OWNER} laptop"] == {"release": 1}
    _remember(state, f"deployment {OWNER} laptop", release=2)
    ran = run("verify", enclave.url, *enclave.trusted)
    assert ran.exit_code == 3
    assert "  FAIL release\n       expected: 2 or later\n       got:      1\n" in ran.stdout
    assert run("ask", enclave.url, "hello", *enclave.trusted).exit_code == 3
    assert enclave.model.requests == []


def test_a_saved_document_is_judged_by_itself(run: Run, enclave: Enclave, saved: Path, state: Path) -> None:
    """It is about its own time, at which the newer ones had not been seen."""
    _remember(state, f"deployment {OWNER} laptop", release=2)
    before = state.read_text()
    assert run("verify", saved, *enclave.trusted).exit_code == 0
    assert state.read_text() == before


def test_what_was_refused_is_not_remembered(run: Run, enclave: Enclave, state: Path) -> None:
    assert run("verify", f"{enclave.url}/#deployment=other", *enclave.trusted).exit_code == 3
    assert not state.exists()


def test_a_damaged_memory_is_said_and_not_begun_anew(run: Run, enclave: Enclave, state: Path) -> None:
    assert run("verify", enclave.url, *enclave.trusted).exit_code == 0
    state.write_text("{")
    ran = run("verify", enclave.url, *enclave.trusted)
    assert ran.exit_code == 2
    assert "is damaged" in ran.stderr
    assert state.read_text() == "{"


def test_says_how_tomorrows_standard_rates_it_when_asked(
    run: Run,
    good: Path,
    policy: list[str | Path],
    hardware_root: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The enclave's own collateral is the standard set; the early one is asked for, and tells ahead of time."""
    old = intel.level("OutOfDate", tdx=bytes([5, 0, 5, *([0] * 13)]), advisoryIDs=["INTEL-SA-09999"])
    ahead = intel.tdx(
        tcb_info={"tcbEvaluationDataNumber": 19, "tcbLevels": [old]}, qe_identity={"tcbEvaluationDataNumber": 19}
    )
    synthetic = vendor_roots(tdx=intel.tdx())
    monkeypatch.setattr("cloister.cli.trust.complete", partial(complete, roots=synthetic))
    monkeypatch.setattr("cloister.cli.verify.judge_tdx", partial(judge_tdx, root=synthetic.intel))
    running = Running()
    running.service.serve({**intel_replies(intel.tdx()), **intel_replies(ahead, early=True)})
    monkeypatch.setenv("CLOISTER_INTEL_PCS", running.service.url)
    try:
        shown = run("verify", good, *policy, "--early")
        told = run("verify", good, *policy, "--early", "--json")
        plain = run("verify", good, *policy, "--json")
    finally:
        running.stop()
    assert (shown.exit_code, told.exit_code) == (0, 0), shown.output
    assert "early update set" in shown.stdout
    assert "INTEL-SA-09999" in shown.stdout
    assert json.loads(told.stdout)["tcb"]["status"] == "UpToDate"
    assert json.loads(told.stdout)["tcb_early"]["status"] == "OutOfDate"
    assert "tcb_early" not in json.loads(plain.stdout)
