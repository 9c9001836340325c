"""`cloister policy`: transcripts over a simulated enclave on this machine and over saved evidence of synthetic hardware."""

import base64
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from tests.cli import hardware
from tests.cli.conftest import INFO, LAUNCH, MEASUREMENT, MODEL, OWNER, Enclave
from tests.vendors import intel
from tests.verify import world
from typer.testing import Result

from cloister.cli.policy import _CODE, _is_pin, _pinned
from cloister.cli.policy_file import canonical, fingerprint, key_name, load_policy, signature_of, to_toml
from cloister.evidence.document import Document
from cloister.evidence.launch import parse_launch
from cloister.evidence.provenance import parse_payload, parse_provenance
from cloister.verify import Factor, Limits, Policy, Tcb, parse_policy
from cloister.verify.policy import _REQUIRED, GPUS, PLATFORMS, TCB_STATUSES, UNKNOWN
from cloister.verify.provenance import signed_measurements

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def hardware_root() -> Iterator[None]:
    with hardware.trusting_the_synthetic_root():
        yield


@pytest.fixture
def good(hardware_root: None, tmp_path: Path) -> Path:
    return hardware.save(tmp_path / "good.json", hardware.document())


def write_key(path: Path) -> Ed25519PrivateKey:
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    return key


def told_fingerprint(text: str) -> str:
    match = re.search(r"fingerprint +((?:[0-9a-f]{4} ?){16})", text)
    assert match is not None, text
    return match[1].strip()


# init


def test_init_writes_what_runs_on_hardware_and_the_policy_then_holds(run: Run, good: Path, tmp_path: Path) -> None:
    ran = run("policy", "init", "--from", good, "-o", tmp_path / "p.toml")
    assert (ran.exit_code, ran.stdout) == (0, f"wrote {tmp_path / 'p.toml'}\n")
    written = tomllib.loads((tmp_path / "p.toml").read_text())
    assert written == {**tomllib.loads(hardware.POLICY), "trust": "first-use"}
    assert "FIRST USE" in ran.stderr
    ran = run("verify", good, "--policy", tmp_path / "p.toml")
    assert ran.exit_code == 0
    assert ran.stdout.splitlines()[:2] == [
        "VERIFIED  tdx",
        "FIRST USE  the policy was written from a running server: compare it with the owner's, by another way.",
    ]


def test_init_writes_what_runs_on_another_vendors_hardware(run: Run, hardware_root: None, tmp_path: Path) -> None:
    saved = hardware.save(tmp_path / "snp.json", hardware.snp_document())
    ran = run("policy", "init", "--from", saved, "-o", tmp_path / "p.toml")
    assert ran.exit_code == 0, ran.output
    written = tomllib.loads((tmp_path / "p.toml").read_text())
    assert written["measurements"] == {"sev-snp": [{"measurement": bytes(range(48)).hex()}]}
    assert run("verify", saved, "--policy", tmp_path / "p.toml").exit_code == 0
    assert written["tcb"]["min_sev_snp"] == {"bootloader": 4, "tee": 1, "snp": 24, "microcode": 219}
    (tmp_path / "p.toml").write_text((tmp_path / "p.toml").read_text().replace("microcode = 219", "microcode = 220"))
    ran = run("verify", saved, "--policy", tmp_path / "p.toml")
    assert ran.exit_code == 3
    assert ran.stdout.splitlines()[-1].startswith("OUT OF DATE, not an attack: ")


CODE = {"mr_td": "aa", "rtmr1": "bb", "rtmr2": "cc"}
"""By the byte, of 48."""


def test_each_kind_of_gpu_is_written_down_once() -> None:
    steps = {"platform": "tdx", "owner": OWNER, "deployment": "a", "config": f"sha256:{'11' * 32}", "models": "22" * 32}
    steps |= {f"measurement.{name}": value * 48 for name, value in CODE.items()}
    for gpu, driver in (("gpu-0", "550"), ("gpu-1", "550"), ("gpu-2", "560")):
        steps |= {f"{gpu}.measurement.driver": driver, f"{gpu}.measurement.vbios": "96"}
        steps[f"{gpu}.measurement.measurements"] = "96" * 32
    steps["gpu-2.evidence.architecture"] = "hopper (GH100)"
    steps["gpu-3.evidence.architecture"] = "ls10 (LS10)"  # a switch: it is pinned, and does not count
    steps |= {"gpu-3.measurement.vbios": "97", "gpu-3.measurement.measurements": "97" * 32}
    policy = _pinned(Policy(), [Factor(step, "fail", "unknown", got) for step, got in steps.items()])
    assert [entry.get("driver") for entry in policy.measurements["nvidia"]] == ["550", "560", None]
    assert policy.limits.gpus == 3
    assert policy.measurements["nvidia"][0].keys() == {"driver", "vbios", "measurements"}
    assert dict(policy.measurements["tdx"][0]) == {name: value * 48 for name, value in CODE.items()}


@pytest.mark.parametrize(
    ("step", "pin"),
    [
        ("owner", True),
        ("deployment", True),
        ("models", True),
        ("key-scope", True),
        ("measurement", True),
        ("measurement.pcr4", True),
        ("gpu-0.measurement.driver", True),
        ("evidence.measurement", False),
        ("gpu-0.evidence.measurement", False),
        ("tpm.evidence.root", False),
        ("config", False),
        ("platform", False),
        ("statement.models", False),
        ("release", False),
        ("provenance", False),
    ],
)
def test_only_a_pin_may_fail_before_the_policy_is_written(step: str, pin: bool) -> None:
    assert _is_pin(step) == pin


def test_init_writes_what_runs_in_a_simulator(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    ran = run("policy", "init", "--from", enclave.url, "-o", tmp_path / "p.toml", *enclave.trusted)
    assert ran.exit_code == 0, ran.output
    launch = parse_launch(LAUNCH)
    assert tomllib.loads((tmp_path / "p.toml").read_text()) == {
        "version": 1,
        "trust": "first-use",
        "deployment": "laptop",
        "owner_key": OWNER,
        "models": [f"sha256:{MODEL.sha256}"],
        "config": f"sha256:{launch.config_sha256}",
        "app": f"sha256:{launch.app.sha256}",
        "platforms": ["sim"],
        "dangerously_trust_simulator": str(enclave.root),
        "dangerously_tolerate_insecure": ["api-keys-off"],
        "measurements": {"sim": [dict(MEASUREMENT.components())]},
    }
    assert f"sha256:{INFO.sha256}" == MEASUREMENT.engine
    assert run("verify", enclave.url, "--policy", tmp_path / "p.toml").exit_code == 0


def test_init_tolerates_exactly_what_is_switched_off_and_says_so(
    run: Run, start_enclave: Callable[..., Enclave], tmp_path: Path
) -> None:
    enclave = start_enclave(insecure=("api-keys-off", "ehbp"))
    ran = run("policy", "init", "--from", enclave.url, "-o", tmp_path / "p.toml", *enclave.trusted)
    assert ran.exit_code == 0, ran.output
    written = tomllib.loads((tmp_path / "p.toml").read_text())
    assert written["dangerously_tolerate_insecure"] == ["api-keys-off", "ehbp"]
    assert written["trust"] == "first-use"
    assert "WEAKENED  ehbp: the policy tolerates it. It also speaks EHBP" in ran.stderr
    assert "WEAKENED  api-keys-off: " in ran.stderr
    ran = run("verify", enclave.url, "--policy", tmp_path / "p.toml")
    assert (ran.exit_code, "FIRST USE" in ran.stdout) == (0, True)


def test_init_says_nothing_of_weakness_where_there_is_none(run: Run, good: Path, tmp_path: Path) -> None:
    ran = run("policy", "init", "--from", good, "-o", tmp_path / "p.toml")
    assert "WEAKENED" not in ran.output
    assert "dangerously_tolerate_insecure" not in (tmp_path / "p.toml").read_text()


@pytest.mark.parametrize("command", ["verify", "ask", "chat"])
def test_first_use_is_said_on_every_screen(run: Run, enclave: Enclave, tmp_path: Path, command: str) -> None:
    assert run("policy", "init", "--from", enclave.url, "-o", tmp_path / "p.toml", *enclave.trusted).exit_code == 0
    more = ["hello"] if command == "ask" else []
    ran = run(command, enclave.url, *more, "--policy", tmp_path / "p.toml", input="")
    assert ran.exit_code == 0, ran.output
    assert "FIRST USE" in ran.output
    told = told_fingerprint(run("policy", "show", tmp_path / "p.toml").stdout)
    assert run("policy", "accept", tmp_path / "p.toml", "--fingerprint", told).exit_code == 0
    assert "FIRST USE" not in run(command, enclave.url, *more, "--policy", tmp_path / "p.toml", input="").output


def test_init_without_a_file_writes_to_standard_output(run: Run, good: Path, tmp_path: Path) -> None:
    ran = run("policy", "init", "--from", good)
    assert parse_policy(ran.stdout, read=lambda name: b"").trust == "first-use"
    assert told_fingerprint(ran.stderr) == told_fingerprint(
        run("policy", "init", "--from", good, "-o", tmp_path / "p.toml").stderr
    )


def test_init_takes_no_simulator_by_itself(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    ran = run("policy", "init", "--from", enclave.url, "-o", tmp_path / "p.toml")
    assert ran.exit_code == 3
    assert "  FAIL evidence.root" in ran.stdout
    assert not (tmp_path / "p.toml").exists()


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (lambda: hardware.document(intel.other_intel()), "evidence.root"),
        (lambda: hardware.document(report={"td_attributes": hardware.DEBUG}), "evidence.debug"),
        (lambda: hardware.document(report={"report_data": bytes(64)}), "binding"),
        (lambda: hardware.document(report={"mr_config_id": bytes(48)}), "launch"),
        (lambda: hardware.document(revoked=frozenset({"pck"})), "evidence.revoked"),
        (hardware.out_of_date, "tcb.status"),
    ],
)
def test_init_writes_nothing_from_what_is_not_genuine(
    run: Run, hardware_root: None, tmp_path: Path, make: Callable[[], Document], step: str
) -> None:
    saved = hardware.save(tmp_path / "saved", make())
    ran = run("policy", "init", "--from", saved, "-o", tmp_path / "p.toml")
    assert ran.exit_code == 3
    assert f"  FAIL {step}" in ran.stdout
    assert "FAIL owner" not in ran.stdout  # what a policy would pin is no fault here
    assert "error: Not genuine: " in ran.stderr
    assert ran.stdout.splitlines()[-1].startswith("OUT OF DATE" if step == "tcb.status" else "AN ATTACK OR A MISTAKE")
    assert not (tmp_path / "p.toml").exists()


def test_init_tolerates_what_it_is_told_to_and_writes_that_down(run: Run, hardware_root: None, tmp_path: Path) -> None:
    saved = hardware.save(tmp_path / "saved", hardware.out_of_date())
    ran = run("policy", "init", "--from", saved, "-o", tmp_path / "p.toml", "--tolerate", "OutOfDate")
    assert ran.exit_code == 0
    assert tomllib.loads((tmp_path / "p.toml").read_text())["tcb"] == {"tolerate": ["OutOfDate"]}
    assert run("verify", saved, "--policy", tmp_path / "p.toml").exit_code == 0


def test_init_believes_the_address_before_the_server(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    """A pin that came out of band is none that a server may fill in."""
    for pin in ("deployment=other", f"owner={world.OTHER_OWNER}"):
        ran = run("policy", "init", "--from", f"{enclave.url}/#{pin}", *enclave.trusted)
        assert ran.exit_code == 3
        assert f"  FAIL {pin.partition('=')[0]}\n" in ran.stdout
    ran = run("policy", "init", "--from", f"{enclave.url}/#owner={OWNER}&deployment=laptop", *enclave.trusted)
    assert ran.exit_code == 0


def test_init_does_not_go_back_to_what_was_seen_before(run: Run, enclave: Enclave, state: Path) -> None:
    assert run("policy", "init", "--from", enclave.url, *enclave.trusted).exit_code == 0
    seen = json.loads((state / "cloister" / "seen.json").read_text())
    seen["seen"][f"deployment {OWNER} laptop"]["release"] = 2
    (state / "cloister" / "seen.json").write_text(json.dumps(seen))
    ran = run("policy", "init", "--from", enclave.url, *enclave.trusted)
    assert ran.exit_code == 3
    assert "  FAIL release" in ran.stdout


def test_nobody_there_is_unreachable(run: Run, nowhere: str) -> None:
    assert run("policy", "init", "--from", nowhere).exit_code == 5


def test_every_platform_is_written_with_what_the_policy_demands() -> None:
    assert set(_CODE) == {*PLATFORMS, GPUS}
    for platform, required in _REQUIRED.items():
        assert any(names <= set(_CODE[platform]) for names in required), platform


def test_what_runs_now_against_what_the_file_says(run: Run, good: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    assert run("policy", "init", "--from", good, "-o", policy).exit_code == 0
    before = policy.read_bytes()
    ran = run("policy", "init", "--from", good, "-o", policy)
    assert (ran.exit_code, ran.stdout) == (0, f"{policy} says so already\n")
    launch = replace(world.LAUNCH, models=("77" * 32,))
    statement = replace(world.STATEMENT, models=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "STATEMENT", statement)
        changed = hardware.document(launch=launch, report={"rtmr2": b"\xbb" * 48})
    other = hardware.save(tmp_path / "other.json", changed)
    ran = run("policy", "init", "--from", other, "-o", policy)
    assert ran.exit_code == 2
    assert ran.stdout == (
        f"measurements.tdx[0].rtmr2\n  - {'a2' * 48}\n  + {'bb' * 48}\nmodels\n  - {world.MODEL}\n  + {'77' * 32}\n"
    )
    assert "--replace" in ran.stderr
    assert policy.read_bytes() == before
    ran = run("policy", "init", "--from", other, "-o", policy, "--replace")
    assert (ran.exit_code, ran.stdout.splitlines()[-1]) == (0, f"wrote {policy}")
    assert run("verify", other, "--policy", policy).exit_code == 0
    assert run("verify", good, "--policy", policy).exit_code == 3


def test_an_accepted_policy_that_says_the_same_stays_accepted(run: Run, good: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text("# by hand\n" + hardware.POLICY)
    assert run("policy", "init", "--from", good, "-o", policy, "--replace").exit_code == 0
    assert policy.read_text() == "# by hand\n" + hardware.POLICY


def test_a_policy_that_replaces_an_accepted_one_is_first_use_again(run: Run, good: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(hardware.POLICY.replace(hardware.MR_TD, "dd" * 48))
    assert run("policy", "init", "--from", good, "-o", policy, "--replace").exit_code == 0
    assert load_policy(policy).trust == "first-use"


# Fingerprints and accept


def test_accept_takes_the_mark_away_and_nothing_else(run: Run, good: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    told = told_fingerprint(run("policy", "init", "--from", good, "-o", policy).stderr)
    before = policy.read_text()
    ran = run("policy", "accept", policy, "--fingerprint", told.upper().replace(" ", ":"))
    assert (ran.exit_code, ran.stdout) == (0, f"accepted {policy}\n")
    assert policy.read_text() == before.replace('trust = "first-use"\n', "")
    assert "FIRST USE" not in run("verify", good, "--policy", policy).output
    assert told_fingerprint(run("policy", "show", policy).stdout) == told
    ran = run("policy", "accept", policy, "--fingerprint", told)
    assert (ran.exit_code, ran.stdout) == (0, f"{policy} was accepted before\n")


def test_accept_wants_the_whole_fingerprint_and_the_right_one(run: Run, good: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    told = told_fingerprint(run("policy", "init", "--from", good, "-o", policy).stderr)
    other = ("0" if told[0] != "0" else "1") + told[1:]
    for wrong in (other, told[:-1], told[:4], "", told + " 00"):
        ran = run("policy", "accept", policy, "--fingerprint", wrong)
        assert ran.exit_code == 3
        assert load_policy(policy).trust == "first-use"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("trust='first-use' # not yet\ndeployment = 'a'", 0),
        ("'trust' = 'first-use'\ndeployment = 'a'", 2),
        ('\'trust\' = \'first-use\'\ndeployment = """\ntrust = 1"""', 2),
    ],
)
def test_accept_finds_the_line_or_says_that_it_did_not(run: Run, tmp_path: Path, text: str, code: int) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(f"version = 1\n{text}\n")
    ran = run("policy", "accept", policy, "--fingerprint", fingerprint(load_policy(policy)))
    assert ran.exit_code == code, ran.output
    assert (load_policy(policy).trust is None) == (code == 0)
    assert code == 0 or policy.read_text() == f"version = 1\n{text}\n"


def _policy(text: str) -> Policy:
    return parse_policy(text, read=lambda name: name.encode())


def test_a_fingerprint_is_of_the_content_alone() -> None:
    same = "# other words\n" + hardware.POLICY.replace(
        "version = 1\n", 'version=1\nrequire_pq=false\ntrust="first-use"\n'
    )
    assert fingerprint(_policy(same)) == fingerprint(_policy(hardware.POLICY))
    many = Policy(models=frozenset({"11" * 32, "22" * 32}), platforms=("sgx", "tdx"))
    assert fingerprint(many) == fingerprint(replace(many, platforms=("tdx", "sgx")))


def test_a_fingerprint_changes_with_every_field() -> None:
    """One change to each; a field that is not named here turns this red."""
    entry = {name: value * 48 for name, value in CODE.items()}
    changes: dict[str, Any] = {
        "deployment": "a",
        "owner_key": OWNER,
        "broker_key": OWNER,
        "models": frozenset(),
        "config": "11" * 32,
        "app": "11" * 32,
        "logs": "public",
        "platforms": ("tdx",),
        "measurements": {"tdx": (entry,)},
        "measurements_signer": OWNER,
        "sigstore": {"identity": "a", "issuer": "b"},
        "tcb": Tcb(tolerate=frozenset({"OutOfDate"})),
        "limits": Limits(max_crl_age_days=3),
        "simulator_root": b"root",
        "tolerate_insecure": frozenset({"ehbp"}),
        "require_pq": True,
    }
    assert {*changes, "trust"} == set(Policy.__dataclass_fields__)
    policies = [Policy(), *(Policy(**{name: value}) for name, value in changes.items())]
    policies += [Policy(measurements={"tdx": ({**entry, "rtmr2": "cd" * 48},)}), Policy(simulator_root=b"other root")]
    policies += [Policy(tcb=replace(Tcb(), **{name: value})) for name, value in _tcb_changes().items()]
    assert len({fingerprint(policy) for policy in policies}) == len(policies)


def _tcb_changes() -> dict[str, Any]:
    return {
        "tolerate_advisories": frozenset(),
        "min_tcb_evaluation_data_number": 17,
        "min_sev_snp": {"microcode": 1},
        "tolerate": frozenset({"SWHardeningNeeded"}),
    }


_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)


@given(
    deployment=_TEXT,
    component=st.one_of(_TEXT.filter(lambda text: text != UNKNOWN), st.integers(0, 1 << 40)),
    tolerate=st.frozensets(st.sampled_from(TCB_STATUSES), max_size=3),
    sigstore=st.one_of(st.none(), st.fixed_dictionaries({"identity": _TEXT, "issuer": _TEXT})),
)
def test_what_is_written_is_read_back(
    deployment: str, component: str | int, tolerate: frozenset[str], sigstore: dict[str, str] | None
) -> None:
    policy = Policy(
        deployment=deployment,
        models=frozenset({"11" * 32}),
        platforms=("sev-snp",),
        measurements={
            "sev-snp": ({"measurement": "bb" * 48, "vcpus": 8},),
            "nvidia": ({"driver": component, "vbios": "96"}, {"driver": "550", "vbios": component}),
        },
        sigstore=sigstore,
        tcb=Tcb(tolerate=tolerate, tolerate_advisories=frozenset(), min_sev_snp={"microcode": 3}),
        limits=Limits(platform_ids=frozenset({"ab"}), dangerously_allow_missing_crl=True),
        simulator_root=b"root",
        require_pq=True,
        trust="first-use",
    )
    text = to_toml(policy, comment="x", root=Path("/root.pem"))
    again = parse_policy(text, read=lambda name: {"/root.pem": b"root"}[name])
    assert again == policy
    assert canonical(again) == canonical(policy)


# show


def test_show_says_in_words_what_is_allowed(run: Run, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(hardware.POLICY)
    ran = run("policy", "show", policy)
    assert ran.exit_code == 0
    assert ran.stdout.splitlines() == [
        "hardware      tdx",
        "deployment    acme-chat",
        f"owner         {OWNER}",
        f"models        {world.MODEL}",
        f"configuration {world.CONFIG}",
        f"app           {world.LAUNCH.app.sha256}",
        f"code          tdx: mr_td {hardware.MR_TD}",
        f"code          tdx: rtmr1 {hardware.RTMR1}",
        f"code          tdx: rtmr2 {hardware.RTMR2}",
        "firmware      UpToDate",
        "machines      any",
        "weakened      nothing is tolerated",
        "post-quantum  taken where it is offered",
        f"fingerprint   {told_fingerprint(ran.stdout)}",
        "signed by     nobody",
    ]


def test_show_says_what_is_dangerous_and_what_is_open(run: Run, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    (tmp_path / "root.pem").write_text("root")
    policy.write_text(
        f'version = 1\ntrust = "first-use"\ndangerously_trust_simulator = "root.pem"\nmeasurements_signer = "{OWNER}"\n'
        "[tcb]\ntolerate = ['OutOfDate']\ntolerate_advisories = []\nmin_sev_snp = { microcode = 9 }\n"
        "[limits]\ngpus = 2\ndangerously_allow_missing_crl = true\n"
    )
    shown = run("policy", "show", policy).stdout
    for said in (
        "FIRST USE",
        "SIMULATOR",
        "DANGEROUS",
        "UpToDate or OutOfDate",
        "microcode 9",
        "2, no more",
        "none named",
        OWNER,
    ):
        assert said in shown
    assert "none named: no hardware is believed" in run("policy", "show", _empty(tmp_path)).stdout


def _empty(folder: Path) -> Path:
    (folder / "empty.toml").write_text("version = 1\n")
    return folder / "empty.toml"


def test_show_as_json(run: Run, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(hardware.POLICY)
    told = json.loads(run("policy", "show", policy, "--json").stdout)
    assert told["fingerprint"] == fingerprint(load_policy(policy))
    assert (told["first_use"], told["signed_by"], told["signature_fits"]) == (False, None, None)
    assert told["policy"]["measurements"]["tdx"][0]["mr_td"] == hardware.MR_TD


def test_a_hostile_policy_cannot_paint(run: Run, good: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text('version = 1\n[measurements]\nsev-snp = [{ measurement = "\\u001b[2J\\u202e\\nVERIFIED" }]\n')
    commands = [["show", policy], ["check", policy], ["show", policy, "--json"], ["init", "--from", good, "-o", policy]]
    for ran in (run("policy", *command) for command in commands):
        assert not [char for char in ran.output if char != "\n" and not char.isprintable()]
        assert not [line for line in ran.output.splitlines() if line.startswith("VERIFIED")]


# check


def test_check_tells_what_would_fail(run: Run, good: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(hardware.POLICY)
    ran = run("policy", "check", policy)
    assert (ran.exit_code, ran.stdout) == (0, f"{policy} is well formed\n")
    ran = run("policy", "check", policy, good)
    assert ran.exit_code == 0
    assert ran.stdout.splitlines()[1].startswith("nothing fails; not proved: custody, measurement, ")
    policy.write_text(hardware.POLICY.replace("a1", "aa").replace("acme", "acne"))
    ran = run("policy", "check", policy, good)
    assert ran.exit_code == 3
    assert "  FAIL measurement.rtmr1" in ran.stdout
    assert "  FAIL deployment" in ran.stdout


def test_check_tells_programs_too(run: Run, good: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(hardware.POLICY)
    told = json.loads(run("policy", "check", policy, "--json").stdout)
    assert told == {
        "v": 1,
        "fingerprint": fingerprint(load_policy(policy)),
        "first_use": False,
        "signed_by": None,
        "judged": None,
    }
    ran = run("policy", "check", policy, good, "--json")
    judged = json.loads(ran.stdout)["judged"]
    assert (ran.exit_code, judged["verdict"], judged["platform"]) == (0, "trusted", "tdx")
    policy.write_text('trust = "first-use"\n' + hardware.POLICY.replace("acme", "acne"))
    ran = run("policy", "check", policy, good, "--json")
    told = json.loads(ran.stdout)
    assert (ran.exit_code, told["first_use"], told["judged"]["verdict"]) == (3, True, "not-trusted")
    assert "deployment" in {one["step"] for one in told["judged"]["factors"] if one["verdict"] == "fail"}


def test_check_an_enclave(run: Run, enclave: Enclave, nowhere: str, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(f'version = 1\nowner_key = "{OWNER}"\n')
    assert run("policy", "check", policy, enclave.url, *enclave.trusted).exit_code == 0
    assert run("policy", "check", policy, enclave.url).exit_code == 3
    assert run("policy", "check", policy, nowhere).exit_code == 5


def test_check_a_file_that_is_none(run: Run, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("version = 2\n")
    assert run("policy", "check", tmp_path / "p.toml").exit_code == 4
    assert run("policy", "check", tmp_path / "missing.toml").exit_code == 2


# sign


@pytest.fixture
def signed(run: Run, tmp_path: Path) -> tuple[Path, str]:
    """A signed policy, and its signer."""
    policy = tmp_path / "p.toml"
    policy.write_text(hardware.POLICY)
    key = write_key(tmp_path / "owner.pem")
    ran = run("policy", "sign", policy, "--key", tmp_path / "owner.pem")
    assert (ran.exit_code, ran.stdout) == (0, f"wrote {policy}.sig\n")
    assert key_name(key) in ran.stderr
    return policy, key_name(key)


def test_a_signature_is_checked_by_its_signer(run: Run, signed: tuple[Path, str], tmp_path: Path) -> None:
    policy, signer = signed
    ran = run("policy", "check", policy, "--signer", signer)
    assert (ran.exit_code, ran.stdout) == (0, f"{policy} is well formed and signed by {signer}\n")
    assert run("policy", "check", policy).stdout == ran.stdout
    assert json.loads(run("policy", "check", policy, "--json").stdout)["signed_by"] == signer
    assert f"signed by     {signer}" in run("policy", "show", policy).stdout
    assert run("policy", "check", policy, "--signer", OWNER).exit_code == 3
    assert run("policy", "check", policy, "--signer", "somebody").exit_code == 2


def test_the_signature_is_over_the_exact_bytes_under_its_own_name(signed: tuple[Path, str], tmp_path: Path) -> None:
    policy, signer = signed
    told = json.loads(policy.with_name("p.toml.sig").read_text())
    assert told.keys() == {"key", "signature"}
    assert told["key"] == signer
    key = base64.urlsafe_b64decode(signer.removeprefix("ed25519:") + "=")
    signature = base64.urlsafe_b64decode(told["signature"] + "==")
    Ed25519PublicKey.from_public_bytes(key).verify(signature, b"cloister/policy/v1\0" + policy.read_bytes())


def test_one_changed_byte_and_the_signature_does_not_fit(run: Run, signed: tuple[Path, str]) -> None:
    policy, signer = signed
    policy.write_text(policy.read_text() + " ")
    assert run("policy", "check", policy, "--signer", signer).exit_code == 3
    for options in ([], ["--json"]):
        ran = run("policy", "check", policy, *options)
        assert (ran.exit_code, ran.stdout) == (3, "")
        assert "does not fit" in ran.stderr
    ran = run("policy", "show", policy)
    assert ran.exit_code == 3
    assert "NOBODY: the signature does not fit" in ran.stdout
    told = json.loads(run("policy", "show", policy, "--json").stdout)
    assert (told["signed_by"], told["signature_fits"]) == (None, False)


@pytest.mark.parametrize("at", range(0, 86, 7))
def test_one_changed_letter_of_the_signature_and_it_does_not_fit(run: Run, signed: tuple[Path, str], at: int) -> None:
    policy, signer = signed
    beside = policy.with_name("p.toml.sig")
    told = json.loads(beside.read_text())
    told["signature"] = (
        told["signature"][:at] + ("A" if told["signature"][at] != "A" else "B") + told["signature"][at + 1 :]
    )
    beside.write_text(json.dumps(told))
    assert run("policy", "check", policy, "--signer", signer).exit_code in (3, 4)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"key":"x","signature":"AA"}', b"{" * 5000])
def test_a_signature_file_that_is_none(run: Run, signed: tuple[Path, str], content: bytes) -> None:
    policy, signer = signed
    policy.with_name("p.toml.sig").write_bytes(content)
    assert run("policy", "check", policy, "--signer", signer).exit_code == 4


def test_no_signature_is_no_signature(run: Run, signed: tuple[Path, str]) -> None:
    policy, signer = signed
    policy.with_name("p.toml.sig").unlink()
    ran = run("policy", "check", policy, "--signer", signer)
    assert ran.exit_code == 3
    assert "no signature" in ran.stderr


def test_another_kind_of_signature_by_the_same_key_does_not_fit(
    run: Run, signed: tuple[Path, str], tmp_path: Path
) -> None:
    """Signed measurements and policies have different names in what is signed."""
    policy, signer = signed
    ran = run("policy", "measurements", policy, "--release", 1, "--key", tmp_path / "owner.pem", "-o", tmp_path / "m")
    assert ran.exit_code == 0
    signature = json.loads((tmp_path / "m").read_text())["signature"]
    payload = base64.urlsafe_b64decode(json.loads((tmp_path / "m").read_text())["payload"] + "==")
    policy.write_bytes(payload)
    policy.with_name("p.toml.sig").write_text(json.dumps({"key": signer, "signature": signature}))
    assert run("policy", "check", policy, "--signer", signer).exit_code == 3


def test_a_key_that_others_may_read_or_that_is_none_signs_nothing(
    run: Run, signed: tuple[Path, str], tmp_path: Path
) -> None:
    policy, _ = signed
    (tmp_path / "owner.pem").chmod(0o644)
    assert run("policy", "sign", policy, "--key", tmp_path / "owner.pem").exit_code == 2
    (tmp_path / "other.pem").write_text("no key")
    (tmp_path / "other.pem").chmod(0o600)
    assert run("policy", "sign", policy, "--key", tmp_path / "other.pem").exit_code == 2


def test_what_nobody_compared_is_not_signed(run: Run, good: Path, tmp_path: Path) -> None:
    assert run("policy", "init", "--from", good, "-o", tmp_path / "p.toml").exit_code == 0
    write_key(tmp_path / "owner.pem")
    ran = run("policy", "sign", tmp_path / "p.toml", "--key", tmp_path / "owner.pem")
    assert ran.exit_code == 2
    assert "cloister policy accept" in ran.stderr


def test_accepting_a_signed_file_says_that_its_signature_is_over(run: Run, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text('trust = "first-use"\n' + hardware.POLICY)
    policy.with_name("p.toml.sig").write_text(signature_of(policy.read_bytes(), Ed25519PrivateKey.generate()))
    ran = run("policy", "accept", policy, "--fingerprint", fingerprint(load_policy(policy)))
    assert ran.exit_code == 0
    assert "signed anew" in ran.stderr


# The settings demand a signature


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., None]:
    def write(folder: Path | None = None, **client: str) -> None:
        path = (tmp_path / "config" / "cloister" / "config.toml") if folder is None else folder / "cloister.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[client]\n" + "".join(f'{name} = "{value}"\n' for name, value in client.items()))

    return write


@pytest.mark.parametrize("named", ["flag", "settings"])
def test_the_settings_may_demand_a_signer(
    run: Run, good: Path, signed: tuple[Path, str], settings: Callable[..., None], named: str
) -> None:
    policy, signer = signed
    more = ["--policy", policy] if named == "flag" else []
    setting = {} if named == "flag" else {"policy": str(policy)}
    settings(**setting, policy_signer=signer)
    assert run("verify", good, *more).exit_code == 0
    settings(**setting, policy_signer=OWNER)
    ran = run("verify", good, *more)
    assert ran.exit_code == 3
    assert f"expected: {OWNER}" in ran.stderr
    settings(**setting, policy_signer=signer)
    policy.with_name("p.toml.sig").unlink()
    assert run("verify", good, *more).exit_code == 3


def test_a_folder_cannot_take_the_users_signer_away(
    run: Run, good: Path, signed: tuple[Path, str], settings: Callable[..., None], tmp_path: Path
) -> None:
    policy, signer = signed
    settings(policy_signer=OWNER)
    settings(Path(), policy=str(policy), policy_signer=signer)
    assert run("verify", good).exit_code == 3


@pytest.mark.parametrize("signer", ["", "me", "ed25519:short"])
def test_a_signer_that_is_none_is_malformed(run: Run, good: Path, settings: Callable[..., None], signer: str) -> None:
    settings(policy_signer=signer)
    assert run("verify", good).exit_code == 4


def test_nothing_is_asked_of_a_server_under_an_unsigned_policy(
    run: Run, enclave: Enclave, settings: Callable[..., None], tmp_path: Path
) -> None:
    settings(policy_signer=OWNER)
    (tmp_path / "p.toml").write_text("version = 1\n")
    assert run("ask", enclave.url, "hello", "--policy", tmp_path / "p.toml").exit_code == 3
    assert enclave.gateway.paths == []


# measurements


def test_signed_measurements_are_what_a_policy_with_that_signer_believes(run: Run, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(hardware.POLICY)
    key = write_key(tmp_path / "owner.pem")
    ran = run("policy", "measurements", policy, "--release", 5, "--key", tmp_path / "owner.pem", "-o", tmp_path / "out")
    assert (ran.exit_code, ran.stdout) == (0, f"wrote {tmp_path / 'out'}: 1 measurement of release 5\n")
    provenance = parse_provenance((tmp_path / "out").read_bytes())
    assert parse_payload(provenance.payload).release == 5
    believing = Policy(measurements_signer=key_name(key))
    found, factors = signed_measurements(provenance, policy=believing, launch=replace(world.LAUNCH, release=5))
    assert dict(found["tdx"][0]) == {"mr_td": hardware.MR_TD, "rtmr1": hardware.RTMR1, "rtmr2": hardware.RTMR2}
    assert {factor.verdict for factor in factors} == {"pass"}
    found, factors = signed_measurements(provenance, policy=believing, launch=replace(world.LAUNCH, release=6))
    assert not found
    assert [factor.step for factor in factors if factor.verdict == "fail"] == ["provenance.release"]


def test_a_policy_without_measurements_has_none_to_sign(run: Run, tmp_path: Path) -> None:
    write_key(tmp_path / "owner.pem")
    command = ["policy", "measurements", _empty(tmp_path), "--release", 1, "--key", tmp_path / "owner.pem"]
    assert run(*command, "-o", tmp_path / "out").exit_code == 2
