"""The verification as a whole: what is accepted, and for each check the one document that only it refuses."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.verify.world import (
    ENGINE,
    KEY_CONFIG,
    LAUNCH,
    MEASUREMENT,
    MODEL,
    NONCE,
    NOW,
    OTHER_OWNER,
    STATEMENT,
    World,
    failures,
    flips,
    replaced,
)

from cloister.errors import CloisterError, MalformedEvidence, VerificationFailed, WrongUse
from cloister.evidence.document import Document, Item
from cloister.evidence.launch import App, launch_digest
from cloister.evidence.statement import EngineStatement, ModelStatement
from cloister.verify import Limits, Tcb, Verified, simulated, verify
from cloister.verify.appraisers import Subject
from cloister.verify.platform import Appraisal
from cloister.verify.verified import Proof

OTHER = "ff" * 32
MEASURED = {"mr_td": "aa" * 48, "rtmr1": "bb" * 48, "rtmr2": "cc" * 48}


def refused(world: World, document: Document | None = None, **how: Any) -> dict[str, Any]:
    with pytest.raises(VerificationFailed) as caught:
        world.verify(document, **how)
    assert caught.value.exit_code == 3
    assert caught.value.step in failures(caught.value)
    return failures(caught.value)


def test_accepts_a_pinned_deployment(world: World) -> None:
    verified = world.verify()
    assert verified.platform == "sim"
    assert verified.simulated
    assert verified.ohttp_keys == KEY_CONFIG * 2
    assert verified.launch == LAUNCH
    assert verified.statement == STATEMENT
    assert verified.launch_sha256 == launch_digest(LAUNCH.encode()).hex()
    assert verified.measurement["code"] == MEASUREMENT.code
    assert (verified.verified_at, verified.expires_at) == (NOW, NOW + 3600)
    assert all(factor.verdict != "fail" for factor in verified.factors)


def test_says_what_it_does_not_prove(world: World) -> None:
    unproved = {factor.step for factor in world.verify().factors if factor.verdict == "not-checked"}
    assert unproved == {"hardware", "custody", "source", "weights", "egress", "names", "post-quantum"}


def test_says_which_pins_are_missing(world: World) -> None:
    absent: dict[str, Any] = {"deployment": None, "owner_key": None, "models": None, "config": None, "measurements": {}}
    verified = replace(world, pins=absent).verify()
    unproved = {factor.step for factor in verified.factors if factor.verdict == "not-checked"}
    assert {"deployment", "owner", "models", "config", "measurement"} <= unproved


@pytest.mark.parametrize("pin", ["deployment", "owner_key"])
def test_on_hardware_who_started_it_must_be_named(world: World, monkeypatch: pytest.MonkeyPatch, pin: str) -> None:
    def as_hardware(subject: Subject) -> Appraisal:
        appraisal = simulated.appraise(subject.document, subject.policy, subject.now)
        return replace(appraisal, platform="tdx", simulated=False, measurement=MEASURED)

    monkeypatch.setattr("cloister.verify.appraisers._APPRAISERS", {"sim": as_hardware})
    pins = {"platforms": ("tdx",), "measurements": {"tdx": (MEASURED,)}}
    assert not replace(world, pins=pins).verify().simulated
    assert set(refused(replace(world, pins={**pins, pin: None}))) == {pin.removesuffix("_key")}


def test_an_empty_pin_is_a_pin(world: World) -> None:
    assert set(refused(replace(world, pins={"deployment": ""}))) == {"deployment"}


def test_the_outcome_is_one_serializable_document(world: World) -> None:
    outcome = json.loads(json.dumps(world.verify().to_json()))
    assert outcome["verdict"] == "simulated"
    assert outcome["models"][0]["sha256"] == MODEL
    assert outcome["launch_sha256"] == STATEMENT.launch_sha256
    assert {"step", "verdict", "expected", "got", "hint"} == outcome["factors"][0].keys()
    assert outcome["first_use"] is False
    assert replace(world, pins={"trust": "first-use"}).verify().to_json()["first_use"] is True


def test_the_message_names_a_step_once_however_often_it_failed(world: World) -> None:
    both = (ModelStatement("demo", OTHER, "q8_0"), ModelStatement("more", "ee" * 32, "q8_0"))
    with pytest.raises(VerificationFailed) as caught:
        world.with_statement(models=both).verify()
    assert sum(getattr(factor, "verdict", "") == "fail" for factor in caught.value.factors) == 2
    assert caught.value.message == "Not trusted: statement.models."


MUTANTS: dict[str, Callable[[World], World]] = {
    "nonce": lambda w: w,
    "binding": lambda w: w,
    "launch": lambda w: replace(w, hardware_launch=bytes(32)).with_statement(launch_sha256="00" * 32),
    "statement.launch": lambda w: w.with_statement(launch_sha256=OTHER),
    "statement.models": lambda w: w.with_statement(models=(ModelStatement("demo", OTHER, "q8_0"),)),
    "statement.egress": lambda w: w.with_statement(egress=("https://elsewhere.example",)),
    "statement.engine": lambda w: w.with_statement(engine=EngineStatement(OTHER, "avx2")),
    "statement.ehbp": lambda w: w.with_statement(ehbp_key=bytes(32)),
    "statement.tls": lambda w: w.with_statement(tls_spki=OTHER),
    "purpose": lambda w: w.with_statement(purpose="provision"),
    "issued": lambda w: w.with_statement(iat=int(NOW) + 121),
    "expires": lambda w: w.with_statement(iat=int(NOW) - 3600, exp=int(NOW) - 121),
    "lifetime": lambda w: w.with_statement(exp=int(NOW) + 7201),
    "post-quantum": lambda w: replace(w, pins={"require_pq": True}),
    "insecure": lambda w: w.with_statement(insecure=("debug",)),
    "insecure.plaintext": lambda w: w.with_statement(insecure=("plaintext",)),
    "platform": lambda w: replace(w, pins={"platforms": ("tdx", "sev-snp")}),
    "custody": lambda w: replace(w, pins={"limits": Limits(platform_ids=frozenset({OTHER}))}),
    "measurement": lambda w: replace(w, pins={"measurements": {"sev-snp": ({"measurement": "01" * 48},)}}),
    "measurement.code": lambda w: replace(w, measurement=replace(MEASUREMENT, code=f"sha256:{OTHER}")),
    "measurement.interpreter": lambda w: replace(w, measurement=replace(MEASUREMENT, interpreter="cpython 3.11.8")),
    "measurement.engine": lambda w: replace(
        w.with_statement(engine=EngineStatement(OTHER, "avx2")),
        measurement=replace(MEASUREMENT, engine=f"sha256:{OTHER}"),
    ),
    "owner": lambda w: w.with_launch(owner_key=OTHER_OWNER),
    "deployment": lambda w: w.with_launch(deployment="acme-chat2"),
    "app": lambda w: w.with_launch(app=App("llm", OTHER)),
    "logs": lambda w: w.with_launch(logs="debug"),
    "broker": lambda w: w.with_launch(broker_key=OTHER_OWNER),
    "config": lambda w: w.with_launch(config_sha256=OTHER),
    "models": lambda w: w.with_launch(models=(MODEL, OTHER)),
    "keys": lambda w: w.with_statement(ohttp_keys=b""),
    "evidence.root": lambda w: replace(w, pins={"simulator_root": None}),
}
"""For each check, a document (or a policy) that this check alone refuses: leave the check out, and its test turns red."""


@pytest.mark.parametrize("step", MUTANTS)
def test_each_check_refuses_what_nothing_else_does(world: World, step: str) -> None:
    mutant = MUTANTS[step](world)
    if step == "nonce":
        assert set(refused(mutant, mutant.document(b""), nonce=b"")) == {"nonce"}
    elif step == "binding":
        assert set(refused(mutant, mutant.document(bytes(32)))) == {"binding"}
    else:
        assert set(refused(mutant)) == {step}


def test_reports_all_mismatches_together(world: World) -> None:
    wrong = world.with_launch(owner_key=OTHER_OWNER, deployment="other").with_statement(insecure=("ehbp",))
    assert set(refused(wrong)) == {"owner", "deployment", "insecure.ehbp", "statement.ehbp"}


def test_an_enclave_that_serves_and_lists_tls_names_its_key(world: World) -> None:
    tolerant = replace(world, pins={"tolerate_insecure": frozenset({"tls"})})
    assert set(refused(tolerant.with_statement(insecure=("tls",)))) == {"statement.tls"}
    assert tolerant.with_statement(insecure=("tls",), tls_spki=OTHER).verify().statement.tls_spki == OTHER


@pytest.mark.parametrize(("kind", "insecure", "enforced"), [
    ("llm", (), False), ("wsgi", (), True), ("asgi", (), True), ("wsgi", ("app-unconfined",), False),
])  # fmt: skip
def test_it_says_where_egress_is_enforced_by_the_measured_code(
    world: World, kind: str, insecure: tuple[str, ...], enforced: bool
) -> None:
    pins = {"app": OTHER, "tolerate_insecure": frozenset(insecure)}
    other = replace(world, pins=pins).with_launch(app=App(kind, OTHER)).with_statement(insecure=insecure)
    (factor,) = (factor for factor in other.verify().factors if factor.step == "egress")
    assert (factor.verdict, "host by host" in factor.hint) == ("not-checked", enforced)
    assert ("is its own word" in factor.hint) == (not enforced)


def test_a_changed_engine_is_named_with_both_digests(world: World) -> None:
    factor = refused(MUTANTS["measurement.engine"](world))["measurement.engine"]
    assert (factor.expected, factor.got) == (f"sha256:{ENGINE}", f"sha256:{OTHER}")
    assert factor.hint


def test_published_logs_are_accepted_only_where_the_policy_says_so(world: World) -> None:
    public = world.with_launch(logs="public")
    assert set(refused(public)) == {"logs"}
    allowed = replace(public, pins={"logs": "public"}).verify()
    assert [factor.got for factor in allowed.factors if factor.step == "logs"] == ["public"]
    assert set(refused(replace(world.with_launch(logs="everything"), pins={"logs": "public"}))) == {"logs"}
    replace(world, pins={"logs": "public"}).verify()  # nothing leaves: less than the policy allows


def test_the_broker_that_the_policy_names_is_accepted_and_no_other(world: World) -> None:
    named = replace(world.with_launch(broker_key=OTHER_OWNER), pins={"broker_key": OTHER_OWNER})
    assert "broker" in {factor.step for factor in named.verify().factors}
    assert set(refused(replace(named, pins={"broker_key": world.launch.owner_key}))) == {"broker"}
    replace(world, pins={"broker_key": OTHER_OWNER}).verify()  # nobody but the owner: less than the policy allows


@pytest.mark.parametrize("label", ["statement", "launch", "cpu"])
def test_absent_evidence_is_refused(world: World, label: str) -> None:
    items = {name: item for name, item in world.document().items.items() if name != label}
    assert set(refused(world, Document(items))) == {f"document.{label}"}


def test_absent_endorsements_are_refused(world: World) -> None:
    items = {name: item for name, item in world.document().items.items() if name != "endorsements"}
    with pytest.raises(MalformedEvidence, match="missing"):
        world.verify(Document(items))


def test_an_empty_document_is_refused(world: World) -> None:
    assert set(refused(world, Document({}))) == {"document.statement", "document.launch", "document.cpu"}


def test_evidence_that_nobody_judges_is_refused(world: World) -> None:
    document = Document({**world.document().items, "gpu-0": Item("application/cbor", b"\xa0")})
    assert set(refused(world, document)) == {"document.gpu-0"}


@pytest.mark.parametrize("media_type", ["application/cbor", "application/vnd.cloister.sim-report"])
def test_a_platform_without_verifier_is_refused_whatever_the_policy(world: World, media_type: str) -> None:
    document = world.document()
    document = Document({**document.items, "cpu": replace(document.items["cpu"], media_type=media_type)})
    pins = {"platforms": None, "tcb": Tcb(tolerate=frozenset({"OutOfDate"}))}
    factors = refused(replace(world, pins=pins), document)
    assert factors["document.cpu"].hint == "No verifier for this platform."


@pytest.mark.parametrize("label", ["statement", "launch"])
def test_a_statement_of_another_media_type_is_refused(world: World, label: str) -> None:
    document = world.document()
    document = Document({**document.items, label: replace(document.items[label], media_type="text/html")})
    assert set(refused(world, document)) == {f"document.{label}"}


def test_a_root_made_by_an_attacker_is_refused(world: World, other_world: World) -> None:
    with pytest.raises(VerificationFailed) as caught:
        verify(other_world.document(), policy=world.policy(), nonce=NONCE, now=NOW)
    assert set(failures(caught.value)) == {"evidence.chip-certificate"}


def test_a_report_signed_by_another_chip_is_refused(world: World, other_world: World) -> None:
    theirs = other_world.document().items["cpu"].content
    assert set(refused(world, replaced(world.document(), "cpu", theirs))) == {"evidence.signature"}


def test_a_replayed_nonce_is_refused(world: World) -> None:
    assert set(refused(world, world.document(), nonce=bytes(32))) == {"binding"}


def test_a_statement_serialised_again_is_refused(world: World) -> None:
    document = world.document()
    again = json.dumps(json.loads(document.items["statement"].content)).encode()
    assert again != document.items["statement"].content
    assert set(refused(world, replaced(document, "statement", again))) == {"binding"}


def test_a_launch_config_serialised_again_is_refused(world: World) -> None:
    document = world.document()
    again = json.dumps(json.loads(document.items["launch"].content)).encode()
    assert set(refused(world, replaced(document, "launch", again))) == {"launch"}


def test_a_statement_swapped_for_another_enclaves_is_refused(world: World) -> None:
    theirs = world.with_statement(receipt_key=b"\x01" * 32).statement.encode()
    assert set(refused(world, world.document(statement=theirs, bound=STATEMENT.encode()))) == {"binding"}


def test_a_launch_without_models_is_refused_when_models_are_pinned(world: World) -> None:
    bare = world.with_launch(models=()).with_statement(models=())
    assert set(refused(bare)) == {"models"}
    assert replace(bare, pins={"models": None}).verify().launch.models == ()


def test_a_model_outside_the_launch_config_is_refused(world: World) -> None:
    both = (ModelStatement("demo", MODEL, "q8_0"), ModelStatement("other", OTHER, "q8_0"))
    factor = refused(world.with_statement(models=both))["statement.models"]
    assert factor.got == OTHER


@pytest.mark.parametrize("label", ["statement", "launch", "cpu", "endorsements"])
def test_every_flipped_bit_is_refused(world: World, label: str) -> None:
    """All four are signed or hashed in whole: no byte may change unnoticed."""
    document = world.document()
    for mutant in flips(document.items[label].content):
        with pytest.raises((VerificationFailed, MalformedEvidence)):
            world.verify(replaced(document, label, mutant))


@pytest.mark.parametrize("label", ["statement", "launch", "cpu", "endorsements"])
def test_every_truncation_and_every_trailing_byte_is_refused(world: World, label: str) -> None:
    document = world.document()
    content = document.items[label].content
    mutants = [content[:length] for length in range(len(content))] + [content + b"\0", content + b" "]
    for mutant in mutants:
        with pytest.raises((VerificationFailed, MalformedEvidence)):
            world.verify(replaced(document, label, mutant))


def test_a_self_consistent_forgery_needs_the_chips_signature(world: World) -> None:
    document = world.document()
    report = cbor2.loads(document.items["cpu"].content)
    report["body"] = report["body"].replace(b"44" * 32, b"45" * 32)
    forged = replaced(document, "cpu", cbor2.dumps(report))
    assert {"evidence.signature", "evidence.measurement", "measurement.code"} <= set(refused(world, forged))


@pytest.mark.parametrize("now", [NOW - 121, NOW + 3600 + 121, float("nan"), float("inf"), float("-inf"), 0.0])
def test_outside_its_time_it_is_refused(world: World, now: float) -> None:
    assert {"issued", "expires"} & set(refused(world, now=now))


@pytest.mark.parametrize(
    ("now", "expires"), [(NOW - 120, NOW + 3480), (NOW + 60, NOW + 3600), (NOW + 3700, NOW + 3720)]
)
def test_clocks_may_differ_by_two_minutes(world: World, now: float, expires: float) -> None:
    assert world.verify(now=now).expires_at == expires


def test_a_long_lived_statement_is_relied_on_for_an_hour_only(world: World) -> None:
    assert world.with_statement(exp=int(NOW) + 7200).verify().expires_at == NOW + 3600


def test_a_post_quantum_key_satisfies_who_requires_one(world: World) -> None:
    config = b"\x00\x64\x7a" + bytes(1222)
    keys = len(config).to_bytes(2, "big") + config
    verified = replace(world, pins={"require_pq": True}).with_statement(ohttp_keys=keys).verify()
    assert {factor.step: factor.verdict for factor in verified.factors}["post-quantum"] == "pass"


def test_expiry_before_issue_is_refused(world: World) -> None:
    assert set(refused(world.with_statement(iat=int(NOW) + 60, exp=int(NOW) + 50))) == {"expires"}


def test_the_chips_certificate_has_its_time_too(world: World) -> None:
    later = int(NOW) + 3651 * 86_400
    moved = world.with_statement(iat=later, exp=later + 60)
    assert set(refused(moved, now=float(later))) == {"evidence.chip-certificate"}


def test_tolerated_weakenings_stay_visible(world: World) -> None:
    weak = world.with_statement(insecure=("plaintext", "api-keys-off"))
    tolerant = replace(weak, pins={"tolerate_insecure": frozenset({"plaintext", "api-keys-off"})})
    steps = {factor.step: factor.got for factor in tolerant.verify().factors}
    assert steps["insecure.plaintext"] == "weakened"
    assert tolerant.verify().to_json()["insecure"] == ["plaintext", "api-keys-off"]


def test_an_unknown_weakening_is_not_offered_for_tolerance(world: World) -> None:
    factor = refused(world.with_statement(insecure=("debug",)))["insecure"]
    assert factor.got == "debug"
    assert "tolerate" not in factor.hint


def test_tolerating_one_weakening_tolerates_no_other(world: World) -> None:
    weak = world.with_statement(insecure=("plaintext", "padding-off"))
    assert set(refused(replace(weak, pins={"tolerate_insecure": frozenset({"plaintext"})}))) == {"insecure.padding-off"}


def test_rules_for_hardware_are_said_not_to_apply(world: World) -> None:
    pins = {"tcb": Tcb(min_tcb_evaluation_data_number=17), "trust": "first-use"}
    unproved = {f.step for f in replace(world, pins=pins).verify().factors if f.verdict == "not-checked"}
    assert {"tcb", "trust"} <= unproved
    aged = replace(world, pins={"limits": Limits(max_crl_age_days=30)}).verify()
    assert "tcb" in {f.step for f in aged.factors if f.verdict == "not-checked"}


def test_rules_for_hardware_apply_to_hardware(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_hardware(subject: Any) -> Any:
        return replace(simulated.appraise(subject.document, subject.policy, subject.now), simulated=False)

    monkeypatch.setattr("cloister.verify.appraisers._APPRAISERS", {"sim": as_hardware})
    verified = replace(world, pins={"tcb": Tcb(min_tcb_evaluation_data_number=17)}).verify()
    assert "tcb" not in {f.step for f in verified.factors}


def test_sealed_code_and_shared_keys_are_said(world: World) -> None:
    group = world.with_statement(code="sealed", key_scope="group", group_policy_sha256=OTHER)
    unproved = {f.step for f in group.verify().factors if f.verdict == "not-checked"}
    assert {"code", "key-scope"} <= unproved


def test_a_named_machine_passes(world: World) -> None:
    custody = next(f for f in world.verify().factors if f.step == "custody")
    named = replace(world, pins={"limits": Limits(platform_ids=frozenset({custody.got}))})
    assert next(f for f in named.verify().factors if f.step == "custody").verdict == "pass"


@pytest.mark.parametrize("size", [1, 16, 31, 33, 64])
def test_a_nonce_of_another_size_is_wrong_use(world: World, size: int) -> None:
    with pytest.raises(WrongUse):
        world.verify(world.document(), nonce=bytes(size))


@pytest.mark.parametrize(
    "keys", [b"\x00", b"\x00\x29", KEY_CONFIG[:-1], KEY_CONFIG + b"\x00", b"\x00\x00", b"\x00\x28" + bytes(40)]
)
def test_misframed_key_configs_are_refused(world: World, keys: bytes) -> None:
    assert set(refused(world.with_statement(ohttp_keys=keys))) == {"keys"}


def test_nobody_else_makes_a_verified(world: World) -> None:
    verified = world.verify()
    fields = {name: getattr(verified, name) for name in Proof.__slots__}
    with pytest.raises(WrongUse):
        Verified(**fields, made_by=object())
    with pytest.raises((TypeError, ValueError)):
        replace(verified, ohttp_keys=b"")  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        verified.ohttp_keys = b""  # type: ignore[misc]
    assert copy.copy(verified).ohttp_keys == verified.ohttp_keys


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.text(max_size=80), st.floats())
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(json.loads(STATEMENT.encode()))), value=VALUES)
def test_only_typed_errors_escape_a_strange_statement(world: World, name: str, value: object) -> None:
    statement = json.dumps({**json.loads(STATEMENT.encode()), name: value}).encode()
    try:
        world.verify(world.document(statement=statement))
    except CloisterError:
        return


@settings(max_examples=150)
@given(data=st.data())
def test_only_typed_errors_escape_mangled_bytes(world: World, data: st.DataObject) -> None:
    document = world.document()
    label = data.draw(st.sampled_from(["statement", "launch", "cpu", "endorsements"]))
    content = document.items[label].content
    at = data.draw(st.integers(0, len(content)))
    mangled = content[:at] + data.draw(st.binary(max_size=8)) + content[at + data.draw(st.integers(0, 8)) :]
    if mangled == content:
        return
    with pytest.raises(CloisterError):
        world.verify(replaced(document, label, mangled))
