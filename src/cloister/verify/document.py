"""The verification itself: numbered steps in one order, the same for every platform."""

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Literal, TypeAlias, TypeVar, overload

from cloister.errors import MalformedEvidence, VerificationFailed, WrongUse
from cloister.evidence.binding import NONCE_SIZES, report_data
from cloister.evidence.document import Document, gpu_labels
from cloister.evidence.launch import NO_LOGS, PUBLIC, LaunchConfig, launch_digest, parse_launch
from cloister.evidence.provenance import MEDIA_TYPE as PROVENANCE_MEDIA_TYPE
from cloister.evidence.provenance import parse_provenance
from cloister.evidence.statement import INSECURE_NAMES, Statement, parse_statement
from cloister.verify.appraisers import TPM_BINDING, Subject, appraise, check_labels
from cloister.verify.factors import Factor, compare, failed, not_checked, passed
from cloister.verify.key_configs import X_WING, X_WING_PUBLIC, config_kems
from cloister.verify.measurement import check_measurement
from cloister.verify.platform import Appraisal
from cloister.verify.policy import Measurements, Policy, Tcb
from cloister.verify.provenance import joined, signed_measurements
from cloister.verify.roots import PINNED, Roots
from cloister.verify.verified import _ONLY_VERIFY, Verified, VerifiedPeer, VerifiedProvision

__all__ = ["CLOCK_TOLERANCE", "MAX_AGE", "MAX_LIFE", "verify"]

Purpose: TypeAlias = Literal["serve", "provision", "key-join"]
_Kind = TypeVar("_Kind", Verified, VerifiedProvision, VerifiedPeer)

_NOT_SERVING = "This enclave is not ready for prompts: it waits for its owner, or for its peers."
_NOT_WAITING = "This enclave waits for no owner: it serves already, or asks its peers."
_NOT_JOINING = "This is no evidence of a replica for its key group."
_HINTS = MappingProxyType({"serve": _NOT_SERVING, "provision": _NOT_WAITING, "key-join": _NOT_JOINING})

CLOCK_TOLERANCE = 120.0
"""Seconds that the client's and the enclave's clocks may differ."""

MAX_LIFE = 7200
"""Seconds between `iat` and `exp` of a statement; keys live one hour."""

MAX_AGE = 3600.0
"""Seconds a client may rely on one verification (PROTOCOL, "Freshness")."""

_MEDIA_TYPES = MappingProxyType(
    {"statement": "application/json", "launch": "application/json", "provenance": PROVENANCE_MEDIA_TYPE}
)


@dataclass(frozen=True, slots=True)
class _Case:
    """Everything that is judged, parsed once."""

    document: Document
    policy: Policy
    nonce: bytes
    now: float
    purpose: Purpose
    statement_bytes: bytes
    statement: Statement
    launch_bytes: bytes
    launch: LaunchConfig
    appraisal: Appraisal
    allowed: Measurements
    provenance: tuple[Factor, ...]


@overload
def verify(
    document: Document,
    *,
    policy: Policy,
    nonce: bytes,
    now: float,
    roots: Roots = ...,
    purpose: Literal["serve"] = ...,
) -> Verified: ...


@overload
def verify(
    document: Document,
    *,
    policy: Policy,
    nonce: bytes,
    now: float,
    roots: Roots = ...,
    purpose: Literal["provision"],
) -> VerifiedProvision: ...


@overload
def verify(
    document: Document,
    *,
    policy: Policy,
    nonce: bytes,
    now: float,
    roots: Roots = ...,
    purpose: Literal["key-join"],
) -> VerifiedPeer: ...


def verify(
    document: Document,
    *,
    policy: Policy,
    nonce: bytes,
    now: float,
    roots: Roots = PINNED,
    purpose: Purpose = "serve",
) -> Verified | VerifiedProvision | VerifiedPeer:
    """Judge a whole attestation document (PROTOCOL, "Attestation document", "Launch config", "Client policy").

    (1) the document holds what is needed, all of it judged, statement and launch config well formed
    (2) the hardware's evidence is genuine: the CPU's, and that of a TPM and of GPUs beside it
    (3) it is fresh: report_data binds this nonce, the statement's exact bytes and all GPU evidence
    (4) the launch config's digest stands in the hardware's own field
    (5) the statement agrees with the launch config and with the measured engine
    (6) its purpose is the one asked for, to serve unless said otherwise, it is meant to live two hours at most, and now lies between iat and exp
    (7) every weakened setting is known, and tolerated by the policy
    (8) platform, machine, measurement (the policy's own, or signed by whom it names), owner, deployment, app, models and
        configuration are those of the policy, and nothing leads out of the enclave that it does not name
    (9) the key configs are framed correctly (channel parses them), a post-quantum one among them where that is required;
        of an enclave that waits for its owner: there is a provision key, post-quantum, and no other; of a replica that
        speaks to its key group: either the one, if it asks to be let in, or the other
    (10) what nothing above proves is said

    `nonce` is the caller's own fresh 32 bytes; with an empty one everything is judged for display and then refused.
    `purpose` "provision" is the owner's, who hands over an app's keys: what it gives, no client can seal to; nor to what
    "key-join" gives, by which replicas judge each other.
    `now` in Unix seconds. `roots` are the vendors' pinned ones: only tests name others. All mismatches are reported together. Does not check physical custody, nor which source the
    measured code was built from, nor where weights come from.

    Raises: VerificationFailed with every factor; MalformedEvidence; MalformedPolicy; WrongUse for a nonce of another
    size.
    """
    if len(nonce) not in NONCE_SIZES:
        raise WrongUse("A nonce has 32 bytes.", step="nonce", expected="32", got=str(len(nonce)))
    missing = (*_check_own_labels(document), *check_labels(document))
    _raise_if_failed(missing)
    case = _parse(Subject(document=document, policy=policy, nonce=nonce, now=now, roots=roots), purpose)
    factors = (
        passed("document", f"{len(document.items)} items"),  # (1)
        *case.appraisal.factors,  # (2)
        *_check_freshness(case),  # (3)
        _check_launch(case),  # (4)
        *_check_agreement(case),  # (5)
        *_check_purpose_and_time(case),  # (6)
        *_check_insecure(case),  # (7)
        *_check_policy(case),  # (8)
        *(_check_provision_key(case) if _offers_one_key(case) else _check_keys(case)),  # (9)
        *_not_proved(case),  # (10)
    )
    _raise_if_failed(factors)
    if purpose == "serve":
        return _proof(Verified, case, factors)
    if purpose == "provision":
        return _proof(VerifiedProvision, case, factors)
    return _proof(VerifiedPeer, case, factors)


def _raise_if_failed(factors: tuple[Factor, ...]) -> None:
    wrong = [factor for factor in factors if factor.verdict == "fail"]
    if wrong:
        names = ", ".join(dict.fromkeys(factor.step for factor in wrong))
        raise VerificationFailed(f"Not trusted: {names}.", factors=factors, hint=wrong[0].hint, step=wrong[0].step)


def _check_own_labels(document: Document) -> Iterator[Factor]:
    for label in ("statement", "launch"):
        if label not in document.items:
            yield failed(
                f"document.{label}", expected="evidence", got="nothing", hint="Absent evidence is no evidence."
            )
    for label, expected in _MEDIA_TYPES.items():
        if label in document.items and (got := document.items[label].media_type) != expected:
            yield failed(f"document.{label}", expected=expected, got=got)


def _parse(subject: Subject, purpose: Purpose) -> _Case:
    document, policy = subject.document, subject.policy
    statement = document.items["statement"].content
    launch = document.items["launch"].content
    parsed = parse_launch(launch)
    signed = document.items.get("provenance")
    provenance = parse_provenance(signed.content) if signed is not None else None
    signed_ones, factors = signed_measurements(provenance, policy=policy, launch=parsed)
    allowed = joined(policy.measurements, signed_ones)
    return _Case(
        document=document,
        policy=policy,
        nonce=subject.nonce,
        now=subject.now,
        purpose=purpose,
        statement_bytes=statement,
        statement=parse_statement(statement),
        launch_bytes=launch,
        launch=parsed,
        appraisal=appraise(subject, allowed),
        allowed=allowed,
        provenance=factors,
    )


def _check_freshness(case: _Case) -> Iterator[Factor]:
    if not case.nonce:
        hint = "Made for no client in particular: it may be old. Ask the enclave itself, with a nonce."
        yield failed("nonce", expected="32 fresh bytes", got="none", hint=hint)
    gpus = [case.document.items[label].content for label in gpu_labels(case.document)]
    expected = report_data(case.nonce, case.statement_bytes, gpus)
    if case.appraisal.platform == "vtpm":
        expected = expected[:TPM_BINDING]
    if hmac.compare_digest(expected, case.appraisal.report_data):
        yield passed("binding", expected.hex()[:32])
        return
    hint = "Replayed evidence, or a statement that was changed on the way."
    yield failed("binding", expected=expected.hex()[:32], got=case.appraisal.report_data.hex()[:32], hint=hint)


def _check_launch(case: _Case) -> Factor:
    got = launch_digest(case.launch_bytes).hex()
    if case.appraisal.launch_sha256 is None:
        # Only the measurement covers it. Every entry of a policy names both together, and `check_measurement` compares.
        return passed("launch", got, "Covered by the measurement; the policy pins both together.")
    return compare(
        "launch",
        expected=case.appraisal.launch_sha256.hex() or "what the hardware was started with",
        got=got,
        hint="The hardware was started with another launch config.",
    )


def _check_agreement(case: _Case) -> Iterator[Factor]:
    statement, launch = case.statement, case.launch
    yield compare(
        "statement.launch",
        expected=(case.appraisal.launch_sha256 or launch_digest(case.launch_bytes)).hex(),
        got=statement.launch_sha256,
        hint="The enclave says it was started with another launch config than the hardware does.",
    )
    yield from _check_each("statement.models", [m.sha256 for m in statement.models], launch.models, "launch config")
    yield compare(
        "statement.egress",
        expected=" ".join(launch.egress) or "nowhere",
        got=" ".join(statement.egress) or "nowhere",
        hint="The enclave may connect to other places than its launch config says.",
    )
    if case.appraisal.engine is not None:
        yield compare(
            "statement.engine",
            expected=case.appraisal.engine,
            got=f"sha256:{statement.engine.sha256}",
            hint="The engine that runs is not the one that was measured.",
        )
    listed = "ehbp" in statement.insecure
    yield compare(
        "statement.ehbp",
        expected="listed as insecure" if statement.ehbp_key else "off",
        got="listed as insecure" if listed else "off",
        hint="The EHBP key and the list of weakened settings contradict each other.",
    )
    policy = statement.group_policy_sha256
    if policy is not None or statement.key_scope == "group":
        yield compare(
            "statement.group",
            expected="replica" if policy is None else "group",
            got=statement.key_scope,
            hint="Whether its keys are shared, and by which policy, contradict each other.",
        )
    yield _check_tls(statement)


def _check_tls(statement: Statement) -> Factor:
    """An enclave that does not serve yet has no such key, and may say already that it will."""
    listed = "listed as insecure" if "tls" in statement.insecure else "off"
    expected = "listed as insecure" if statement.tls_spki else "off"
    if statement.purpose != "serve" and not statement.tls_spki:
        return passed("statement.tls", listed)
    hint = "The TLS listener's key and the list of weakened settings contradict each other."
    return compare("statement.tls", expected=expected, got=listed, hint=hint)


def _check_each(
    step: str, digests: list[str], allowed: tuple[str, ...] | frozenset[str], where: str
) -> Iterator[Factor]:
    wrong = [digest for digest in digests if digest not in allowed]
    for digest in wrong:
        hint = f"This model is not one of the {where}."
        yield failed(step, expected=" or ".join(sorted(allowed)) or "no model", got=digest, hint=hint)
    if not wrong:
        yield passed(step, " ".join(digests) or "no model")


def _check_purpose_and_time(case: _Case) -> Iterator[Factor]:
    statement, now = case.statement, case.now
    yield compare("purpose", expected=case.purpose, got=statement.purpose, hint=_HINTS[case.purpose])
    hint = "The enclave's clock or this one is wrong."
    if statement.iat - CLOCK_TOLERANCE <= now:
        yield passed("issued", _moment(statement.iat))
    else:
        expected = f"at most 120 s after {_moment(now)}"
        yield failed("issued", expected=expected, got=_moment(statement.iat), hint=hint)
    if statement.iat < statement.exp and now <= statement.exp + CLOCK_TOLERANCE:
        yield passed("expires", _moment(statement.exp))
    else:
        hint = "Its time is over: ask the enclave for new evidence."
        expected = f"at most 120 s before {_moment(now)}"
        yield failed("expires", expected=expected, got=_moment(statement.exp), hint=hint)
    # The host owns the enclave's clock: set forward once, it would keep one set of keys alive for years.
    life = statement.exp - statement.iat
    if life <= MAX_LIFE:
        yield passed("lifetime", f"{life} s")
    else:
        hint = "Keys that live long protect nothing once they leak. The enclave's clock was tampered with, or is wrong."
        yield failed("lifetime", expected=f"at most {MAX_LIFE} s", got=f"{life} s", hint=hint)


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # beyond the calendar, or no number
        return str(seconds)


def _check_insecure(case: _Case) -> Iterator[Factor]:
    for name in case.statement.insecure:
        step = f"insecure.{name}" if name in INSECURE_NAMES else "insecure"
        if name not in INSECURE_NAMES:
            yield failed(
                step, expected="known names", got=name, hint="A weakened setting that this version does not know."
            )
        elif name not in case.policy.tolerate_insecure:
            hint = f'A protection is switched off. To accept that: dangerously_tolerate_insecure = ["{name}"]'
            yield failed(step, expected="off", got="weakened", hint=hint)
        else:
            yield passed(step, "weakened", "Weakened, and your policy tolerates it.")
    if not case.statement.insecure:
        yield passed("insecure", "nothing is weakened")


def _check_policy(case: _Case) -> Iterator[Factor]:
    policy, launch, appraisal = case.policy, case.launch, case.appraisal
    yield (
        passed("platform", appraisal.platform)
        if policy.platforms is None
        else compare(
            "platform",
            expected=policy.platforms,
            got=appraisal.platform,
            hint="The policy does not accept this platform.",
        )
    )
    yield _check_machine(case)
    yield from case.provenance
    yield from check_measurement(case.allowed, appraisal)
    yield _check_identity(case, "owner", policy.owner_key, launch.owner_key, "Somebody else started this enclave.")
    yield _check_identity(case, "deployment", policy.deployment, launch.deployment, "This is another deployment.")
    app = None if policy.app is None else f"sha256:{policy.app}"
    yield _check_identity(case, "app", app, f"sha256:{launch.app.sha256}", "It runs another app.")
    config = f"sha256:{launch.config_sha256}"
    pinned = None if policy.config is None else f"sha256:{policy.config}"
    yield _check_pin("config", pinned, config, "It runs with another configuration.")
    yield from _check_models(case)
    yield from _check_leaks(launch, policy)
    yield from _check_hardware_rules(case)


def _check_identity(case: _Case, step: str, pinned: str | None, got: str, hint: str) -> Factor:
    """Anybody can start the genuine image on genuine hardware: what is left to tell them apart must be named."""
    if pinned is None and not case.appraisal.simulated:
        also = "" if step == "app" else " or in the address (#owner=…&deployment=…)"
        hint = f"Name the {step}, in the policy{also}."
        return failed(step, expected=f"the {step} that the policy names", got=got, hint=hint)
    return _check_pin(step, pinned, got, hint)


def _check_pin(step: str, pinned: str | None, got: str, hint: str) -> Factor:
    if pinned is not None:
        return compare(step, expected=pinned, got=got, hint=hint)
    return not_checked(step, f"The policy does not say which {step} it expects.", got)


def _check_machine(case: _Case) -> Factor:
    allowed, got = case.policy.limits.platform_ids, case.appraisal.platform_id
    if allowed is None:
        return not_checked("custody", "Nothing proves who has the machine in hand: bus probes stay possible.", got)
    return compare("custody", expected=allowed, got=got, hint="Another machine than those the policy names.")


def _check_models(case: _Case) -> Iterator[Factor]:
    pinned, launch = case.policy.models, case.launch.models
    if pinned is None and launch and not case.appraisal.simulated:
        # Without a bundle the image runs whichever model it was started for, whatever app its launch config names.
        hint = "Name the models, in the policy."
        yield failed("models", expected="the models that the policy names", got=" ".join(launch), hint=hint)
        return
    if pinned is None:
        yield not_checked("models", "The policy pins no model: any that the launch config names.", " ".join(launch))
        return
    if pinned and not launch:
        yield failed("models", expected=" or ".join(sorted(pinned)), got="no model", hint="No model is named.")
        return
    yield from _check_each("models", list(launch), pinned, "policy's")


def _check_leaks(launch: LaunchConfig, policy: Policy) -> Iterator[Factor]:
    """What the launch config lets out of the enclave."""
    hint = "It was started to let logs out, which may hold prompts."
    if launch.logs == PUBLIC:
        hint = 'What the app writes to its logs is public, and may hold prompts. To accept that: logs = "public" in the policy.'
    yield compare("logs", expected={NO_LOGS, policy.logs}, got=launch.logs, hint=hint)
    if launch.broker_key is not None:
        hint = 'Whoever holds this key hands it keys and secrets too. If it is the owner\'s: broker_key = "…" in the policy.'
        yield compare("broker", expected=policy.broker_key or "none", got=launch.broker_key, hint=hint)


def _check_hardware_rules(case: _Case) -> Iterator[Factor]:
    if case.appraisal.simulated and (case.policy.tcb != Tcb() or case.policy.limits.max_crl_age_days is not None):
        yield not_checked("tcb", "A simulator has no TCB: [tcb] and max_crl_age_days say nothing here.")
    if case.policy.trust == "first-use":
        yield not_checked("trust", "First use: this policy was written from a running server. Compare it out of band.")


def _check_keys(case: _Case) -> Iterator[Factor]:
    try:
        kems = config_kems(case.statement.ohttp_keys)
    except MalformedEvidence as error:
        yield failed("keys", expected="key configs", got="something else", hint=error.message)
        return
    yield passed("keys", f"{len(kems)} key configs")
    if X_WING in kems:
        yield passed("post-quantum", "X-Wing (X25519 and ML-KEM-768)")
    elif case.policy.require_pq:
        hint = "What is recorded today could be read by a quantum computer one day."
        yield failed("post-quantum", expected="X-Wing (X25519 and ML-KEM-768)", got="classical keys only", hint=hint)
    else:
        yield not_checked("post-quantum", "Only classical keys are offered, and the policy asks for no more.")


def _offers_one_key(case: _Case) -> bool:
    """To its owner, or to a member of its key group."""
    joins = case.purpose == "key-join" and case.statement.provision_key is not None
    return joins or case.purpose == "provision"


def _check_provision_key(case: _Case) -> Iterator[Factor]:
    """An enclave that waits offers one key, for its owner alone, or for its key group."""
    key = case.statement.provision_key or b""
    offered = f"{len(key)} bytes and " + ("keys for clients" if case.statement.ohttp_keys else "no other key")
    hint = "What waits for its owner offers one X-Wing key, and nobody else any."
    yield compare("keys", expected=f"{X_WING_PUBLIC} bytes and no other key", got=offered, hint=hint)
    yield passed("post-quantum", "X-Wing (X25519 and ML-KEM-768)")


def _not_proved(case: _Case) -> Iterator[Factor]:
    if not case.appraisal.simulated:
        yield not_checked(
            "owner.signature",
            "Anybody can write an owner's key into a launch config: what runs is pinned, who started it is not.",
        )
    yield not_checked("source", "Nothing here proves which source the measured code was built from.")
    yield not_checked("egress", _about_egress(case))
    yield not_checked("names", "A model's name is the operator's word; what was checked is its digest.")
    yield not_checked("weights", "The digest says which weights run, not where they come from nor what they know.")
    if case.statement.code == "sealed":
        yield not_checked("code", "The owner keeps the app's code sealed: nobody else can read what it does.")
    if case.statement.key_scope == "group":
        yield _check_key_scope(case)


def _check_key_scope(case: _Case) -> Factor:
    """Whom a group lets in, also a simulator, is written in the configuration, which whoever starts the enclave chooses."""
    group = case.statement.group_policy_sha256 or ""
    if case.policy.config is None and not case.appraisal.simulated:
        hint = "Its keys are shared with whomever its configuration lets in. Name the config, in the policy."
        return failed(
            "key-scope", expected="keys of its own, or the config that the policy names", got=group, hint=hint
        )
    return not_checked("key-scope", "The keys are shared by a group of replicas: one leak exposes all.", group)


def _about_egress(case: _Case) -> str:
    if case.launch.app.kind == "llm" or "app-unconfined" in case.statement.insecure:
        return "Where the enclave connects to is its own word; no platform's rule enforces it yet."
    return (
        "The measured code lets its app connect nowhere but there, host by host; no platform's rule stands behind it."
    )


def _expires_at(case: _Case) -> float:
    """Never past `exp`, but for a client whose clock is ahead of it and who was let in by the tolerance."""
    end = case.statement.exp if case.now < case.statement.exp else case.statement.exp + CLOCK_TOLERANCE
    return min(end, case.now + MAX_AGE)


def _proof(kind: type[_Kind], case: _Case, factors: tuple[Factor, ...]) -> _Kind:
    return kind(
        platform=case.appraisal.platform,
        simulated=case.appraisal.simulated,
        statement=case.statement,
        statement_sha256=hashlib.sha256(case.statement_bytes).hexdigest(),
        launch=case.launch,
        launch_sha256=launch_digest(case.launch_bytes).hex(),
        measurement=case.appraisal.measurement,
        platform_id=case.appraisal.platform_id,
        tcb=case.appraisal.tcb,
        expiries=tuple(sorted(case.appraisal.expiries, key=lambda one: one.at)),
        counters=MappingProxyType({**case.appraisal.counters, "release": case.launch.release}),
        factors=factors,
        ohttp_keys=case.statement.ohttp_keys,
        verified_at=case.now,
        expires_at=_expires_at(case),
        made_by=_ONLY_VERIFY,
    )
