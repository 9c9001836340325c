"""Who is trusted, for how long, and what makes a session change its mind."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.client.deployment import HANG, Deployment, Stage
from tests.verify.world import failures

from cloister.client import AsyncSession, Clock, InnerRequest, Session
from cloister.client.attestor import Attestor
from cloister.client.memory import FileMemory, ProcessMemory, release_scope
from cloister.errors import ConnectionFailed, MalformedEvidence, PlaintextRefused, VerificationFailed, WrongUse
from cloister.evidence.document import Document, Item, parse_document
from cloister.verify import Policy, Verified, verify


class Time:
    """`passed` seconds by the monotonic clock; the wall clock may be set apart from it."""

    def __init__(self, deployment: Deployment) -> None:
        self.passed = 0.0
        self.wall = deployment.now

    def clock(self) -> Clock:
        return Clock(wall=self.wall, monotonic=lambda: self.passed)


@pytest.fixture
def time(deployment: Deployment) -> Time:
    return Time(deployment)


@pytest.fixture
def session(deployment: Deployment, stage: Stage, time: Time) -> Iterator[Session]:
    with Session(stage.show(deployment.gateway), policy=deployment.policy, clock=time.clock()) as session:
        yield session


def test_verifies_once_an_hour(deployment: Deployment, session: Session, time: Time) -> None:
    first = session.verify()
    time.passed = 3500.0
    assert session.verify() is first
    time.passed = 3600.0
    assert session.verified is None
    assert session.verify() is not first
    assert deployment.attested == 2


def test_never_trusts_past_the_statement_s_end(deployment: Deployment, session: Session) -> None:
    verified = session.verify()
    deployment.offset = verified.expires_at - deployment.now() + 1
    assert session.verified is None


def test_force_verifies_anew_over_another_nonce(deployment: Deployment, session: Session) -> None:
    first = session.verify()
    nonce, document = session.nonce, session.document
    assert session.verify(force=True) is not first
    assert len(session.nonce) == 32
    assert session.nonce != nonce
    assert session.document != document


def test_sends_nothing_to_what_the_policy_refuses(deployment: Deployment, stage: Stage) -> None:
    policy = replace(deployment.policy, config="00" * 32)
    with Session(stage.show(deployment.gateway), policy=policy) as session:
        with pytest.raises(VerificationFailed) as caught:
            session.send(InnerRequest("POST", "http://enclave.invalid/v1/echo", (), b"marked"))
        assert failures(caught.value)
        assert session.document != b""
        assert session.verified is None


def test_the_empty_policy_refuses_a_simulator(deployment: Deployment, stage: Stage) -> None:
    with (
        Session(stage.show(deployment.gateway), policy=Policy()) as session,
        pytest.raises(VerificationFailed),
    ):
        session.verify()


def test_a_stale_document_is_refused(deployment: Deployment, stage: Stage) -> None:
    """The host answers with evidence that it kept: genuine, and made over another nonce."""
    kept: list[bytes] = []
    attest = deployment.attest

    async def keep(nonce: bytes) -> bytes:
        kept.append(await attest(nonce))
        return kept[0]

    stale = Deployment(deployment.device)
    stale.gateway._attest = keep
    with Session(stage.show(stale.gateway), policy=stale.policy) as session:
        session.verify()
        with pytest.raises(VerificationFailed):
            session.verify(force=True)


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["10.0.0.7", "enclave.example", "127.0.0.1.example", "[2001:db8::1]"])
async def test_a_simulator_is_trusted_on_this_machine_only(deployment: Deployment, host: str) -> None:
    attestor = Attestor(f"http://{host}:8484", deployment.policy, clock=Clock())
    challenge = attestor.challenge()
    document = await deployment.attest(challenge.nonce)
    with pytest.raises(VerificationFailed) as caught:
        attestor.accept(challenge, 200, "application/cmw+json", document)
    assert caught.value.step == "simulator"


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "localhost", "[::1]"])
async def test_a_simulator_on_this_machine_is_what_the_policy_says(deployment: Deployment, host: str) -> None:
    attestor = Attestor(f"http://{host}:8484/", deployment.policy, clock=Clock())
    challenge = attestor.challenge()
    document = await deployment.attest(challenge.nonce)
    assert attestor.accept(challenge, 200, "application/cmw+json", document).simulated


def test_a_lower_release_than_seen_before_is_refused(deployment: Deployment, session: Session) -> None:
    session.verify()
    deployment.launch = replace(deployment.launch, release=2)
    with pytest.raises(VerificationFailed) as caught:
        session.verify(force=True)
    factor = failures(caught.value)["release"]
    assert (factor.expected, factor.got) == ("3 or later", "2")
    deployment.launch = replace(deployment.launch, release=4)
    assert session.verify(force=True).launch.release == 4


def test_a_memory_carries_over_to_the_next_session(deployment: Deployment, stage: Stage, tmp_path: Path) -> None:
    url = stage.show(deployment.gateway)
    with Session(url, policy=deployment.policy, memory=FileMemory(tmp_path / "seen.json")) as session:
        session.verify()
    deployment.launch = replace(deployment.launch, release=2)
    with (
        Session(url, policy=deployment.policy, memory=FileMemory(tmp_path / "seen.json")) as session,
        pytest.raises(VerificationFailed) as caught,
    ):
        session.verify()
    assert failures(caught.value)["release"].expected == "3 or later"
    with Session(url, policy=deployment.policy) as session:
        assert session.verify().launch.release == 2  # without one it remembers for its own life


def test_each_deployment_counts_its_own_releases(deployment: Deployment, stage: Stage) -> None:
    memory = ProcessMemory()
    policy = replace(deployment.policy, deployment=None)
    with Session(stage.show(deployment.gateway), policy=policy, memory=memory) as session:
        session.verify()
        deployment.launch = replace(deployment.launch, deployment="another", release=1)
        assert session.verify(force=True).launch.release == 1


def test_only_what_was_accepted_is_remembered(deployment: Deployment, stage: Stage) -> None:
    """Not even a genuine document under a policy that refuses it, or one that a pinned session refuses."""
    memory = ProcessMemory()
    url = stage.show(deployment.gateway)
    with Session(url, policy=deployment.policy, memory=memory, pin_measurement=True) as session:
        session.verify()
        deployment.launch = replace(deployment.launch, release=9)
        with pytest.raises(VerificationFailed):
            session.verify(force=True)
    refusing = replace(deployment.policy, deployment="other")
    with Session(url, policy=refusing, memory=memory) as session, pytest.raises(VerificationFailed):
        session.verify()
    assert memory.highest(release_scope(deployment.launch.owner_key, "acme-chat"), "release") == 3


def test_a_memory_that_is_damaged_stops_everything(deployment: Deployment, stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "seen.json").write_text("{")
    (tmp_path / "seen.json").chmod(0o600)
    memory = FileMemory(tmp_path / "seen.json")
    with Session(stage.show(deployment.gateway), policy=deployment.policy, memory=memory) as session:
        with pytest.raises(WrongUse):
            session.verify()
        assert session.verified is None


class _Stub:
    """Hardware evidence whose vendor counts: what `verify` gives back for it."""

    def __init__(self, verified: Verified, **counters: int) -> None:
        self._verified = verified
        self.counters = {"release": verified.launch.release, **counters}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._verified, name)


@pytest.mark.anyio
async def test_collateral_that_is_older_than_seen_is_refused_by_its_name(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    week = 7 * 86400
    counters = {"tcb-evaluation-data-number": 18, "pck-crl": 7, "pck-crl-platform-issued": 2 * week}

    def judge(*arguments: Any, **options: Any) -> Any:
        return _Stub(verify(*arguments, **options), **counters)

    monkeypatch.setattr("cloister.client.attestor.verify", judge)
    attestor = Attestor("http://127.0.0.1", deployment.policy, clock=Clock())

    async def attest() -> Verified:
        challenge = attestor.challenge()
        document = await deployment.attest(challenge.nonce)
        return attestor.accept(challenge, 200, "application/cmw+json", document)

    await attest()
    counters["pck-crl"] = 8
    await attest()
    counters["pck-crl-platform-issued"] = week  # another server, which fetched its list some days before
    await attest()
    older = (("pck-crl", 7), ("tcb-evaluation-data-number", 17), ("pck-crl-platform-issued", week - 1))
    for counter, value in older:
        kept = counters[counter]
        counters[counter] = value
        with pytest.raises(VerificationFailed) as caught:
            await attest()
        assert set(failures(caught.value)) == {f"rollback.{counter}"}
        assert failures(caught.value)[f"rollback.{counter}"].got == str(value)
        counters[counter] = kept
    await attest()


def test_what_was_believed_does_not_outlive_a_refusal(deployment: Deployment, session: Session) -> None:
    session.verify()
    deployment.launch = replace(deployment.launch, deployment="another")
    for _ in range(2):
        with pytest.raises(VerificationFailed):
            session.verify(force=True)
        assert session.verified is None
    with pytest.raises(VerificationFailed):
        session.send(InnerRequest("GET", "http://enclave.invalid/v1/echo", (), b""))
    assert deployment.app.seen == []  # type: ignore[attr-defined]


def test_a_pinned_session_refuses_another_measurement_and_shows_both(deployment: Deployment, stage: Stage) -> None:
    url = stage.show(deployment.gateway)
    with (
        Session(url, policy=deployment.policy, pin_measurement=True) as pinned,
        Session(url, policy=deployment.policy) as free,
    ):
        old = pinned.verify().measurement["code"]
        free.verify()
        deployment.measurement = replace(deployment.measurement, code=f"sha256:{'99' * 32}")
        deployment.renew_keys()
        assert free.verify(force=True).measurement["code"] != old
        with pytest.raises(VerificationFailed) as caught:
            pinned.send(InnerRequest("GET", "http://enclave.invalid/v1/echo", (), b"")).close()
        factor = failures(caught.value)["measurement.code"]
        assert (factor.expected, factor.got) == (old, f"sha256:{'99' * 32}")


def test_nobody_there_is_connection_failed(deployment: Deployment) -> None:
    with socket.socket() as taken:  # a port that nobody listens on, and that nobody else can have
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with Session(url, policy=deployment.policy) as session, pytest.raises(ConnectionFailed):
            session.verify()


@pytest.mark.parametrize(
    ("status", "error"), [(404, PlaintextRefused), (200, PlaintextRefused), (503, ConnectionFailed)]
)
def test_no_document_is_a_typed_error(
    deployment: Deployment, stage: Stage, status: int, error: type[Exception]
) -> None:
    async def other(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"hello"})  # type: ignore[operator]

    with Session(stage.show(other), policy=deployment.policy) as session, pytest.raises(error):
        session.verify()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:8484",
        "ftp://host",
        "http://",
        "http://user:pass@127.0.0.1",
        "http://@127.0.0.1",
        "http://a?b=c",
        "http://[::1",
        "http://[::1]x",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:x",
        "http://127.0.0.1\\.example",
        "http://127.0.0.1 .example",
        "http://127.0.0.1/\n",
        "http://a..b",
        "http://" + "a" * 64,
        "http://ex\u2100mple",
    ],
)
def test_an_address_that_is_none_is_wrong_use(deployment: Deployment, url: str) -> None:
    with pytest.raises(WrongUse):
        Session(url, policy=deployment.policy)


def test_an_address_s_fragment_is_not_dropped_in_silence(deployment: Deployment) -> None:
    with pytest.raises(WrongUse) as caught:
        Session("http://127.0.0.1:8484/#owner=x&deployment=y", policy=deployment.policy)
    assert "policy" in caught.value.hint


@pytest.mark.parametrize("set_by_caller", [True, False])
def test_the_cache_secret_is_the_session_s_unless_the_caller_s(
    deployment: Deployment, stage: Stage, set_by_caller: bool
) -> None:
    headers = ((b"Cloister-Cache-Secret", b"mine"),) if set_by_caller else ()
    request = InnerRequest("GET", "http://enclave.invalid/v1/echo", headers, b"")
    url = stage.show(deployment.gateway)
    for _ in range(2):
        with Session(url, policy=deployment.policy) as session:
            for _ in range(2):
                session.send(request).close()
    with Session(url, policy=deployment.policy, reuse_cache=False) as session:
        session.send(request).close()
    seen = [call["headers"].get("cloister-cache-secret") for call in deployment.app.seen]  # type: ignore[attr-defined]
    if set_by_caller:
        assert seen == ["mine"] * 5
    else:
        assert seen[0] == seen[1] != seen[2] == seen[3]
        assert len(seen[0]) == 43
        assert seen[4] is None


@pytest.mark.anyio
async def test_a_session_that_was_closed_sends_nothing_more(deployment: Deployment, stage: Stage) -> None:
    request = InnerRequest("GET", "http://enclave.invalid/v1/echo", (), b"")
    url = stage.show(deployment.gateway)
    with Session(url, policy=deployment.policy) as session:
        verified = session.verify()
    async with AsyncSession(url, policy=deployment.policy) as other:
        await other.verify()
    assert session.verify() is verified
    for ask in (lambda: session.send(request), lambda: session.verify(force=True)):
        with pytest.raises(WrongUse, match="closed"):
            ask()
    with pytest.raises(WrongUse, match="closed"):
        await other.send(request)
    with pytest.raises(WrongUse, match="closed"):
        await other.verify(force=True)
    assert deployment.app.seen == []  # type: ignore[attr-defined]


@pytest.mark.anyio
async def test_the_async_session_does_the_same(deployment: Deployment, stage: Stage) -> None:
    async with AsyncSession(stage.show(deployment.gateway), policy=deployment.policy) as session:
        first = await session.verify()
        deployment.renew_keys()
        answer = await session.send(InnerRequest("GET", "http://enclave.invalid/v1/echo", (), b""))
        assert b'"method": "GET"' in b"".join([part async for part in answer])
        await answer.aclose()
        assert session.verified not in (None, first)


@pytest.mark.anyio
async def test_a_verification_that_was_given_up_writes_nothing_after_the_next(
    deployment: Deployment, stage: Stage
) -> None:
    """Its thread cannot be stopped: whoever gave it up goes on at once, and the next waits for it."""
    working, go_on = threading.Event(), threading.Event()
    noted: list[bytes] = []

    def complete(document: Document, _now: float) -> Document:
        working.set()
        assert go_on.wait(HANG)
        noted.append(shared.nonce)
        return document

    async with AsyncSession(stage.show(deployment.gateway), policy=deployment.policy, complete=complete) as shared:
        given_up = asyncio.create_task(shared.verify())
        await asyncio.to_thread(working.wait, HANG)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        following = asyncio.create_task(shared.verify(force=True))
        await asyncio.sleep(0.1)
        seen = (deployment.attested, [*noted])
        go_on.set()
        verified = await following
        assert seen == (1, [])
        assert shared.verified is verified


def test_a_document_is_completed_before_it_is_judged_and_kept_so(deployment: Deployment, stage: Stage) -> None:
    """What is added is judged like the rest: a completer cannot make anything trusted."""

    def complete(document: Document, _now: float) -> Document:
        items = {label: item for label, item in document.items.items() if label != "endorsements"}
        return Document({**items, "endorsements": kept[0]} if kept else items)

    kept: list[Item] = []
    with Session(stage.show(deployment.gateway), policy=deployment.policy, complete=complete) as session:
        with pytest.raises(MalformedEvidence):
            session.verify()
        assert "endorsements" not in parse_document(session.document).items
    with Session(stage.show(deployment.gateway), policy=deployment.policy) as session:
        session.verify()
        kept.append(parse_document(session.document).items["endorsements"])
    with Session(stage.show(deployment.gateway), policy=deployment.policy, complete=complete) as session:
        assert session.verify().simulated
