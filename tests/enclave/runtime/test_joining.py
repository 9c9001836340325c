"""Replicas of one key group in one process, over simulated hardware and the real verifier: who is let in, and who is not."""

import asyncio
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.enclave.runtime.slow import Slow
from tests.verify.world import MEASUREMENT, OTHER_OWNER, OWNER

from cloister.channel.group import MAX_MESSAGE, Admission, Join, Request, parse_admission, parse_request, seal_secrets
from cloister.channel.hpke import KEM_XWING, generate
from cloister.channel.keys import GroupRing, KeyRing
from cloister.enclave.attestation import Attestation, Runs, Witness
from cloister.enclave.boot import EnclaveConfig
from cloister.enclave.runtime.entrance import GROUP_PATH, Entrance
from cloister.enclave.runtime.joining import Group, group_policy
from cloister.errors import (
    ChannelBroken,
    EngineLoading,
    MalformedMessage,
    MalformedPolicy,
    NotTrusted,
    VerificationFailed,
)
from cloister.evidence.document import Document, Item, parse_document
from cloister.evidence.launch import App, LaunchConfig, launch_digest, parse_launch
from cloister.evidence.statement import EngineStatement, ModelStatement, parse_statement
from cloister.evidence.strict_json import b64url
from cloister.sim import Device, LaunchedEnclave, Measurement
from cloister.verify import verify

NOW = 1_800_000_000.0
MODEL = "11" * 32
BROKER = Ed25519PrivateKey.generate()
BROKER_NAME = "ed25519:" + b64url(BROKER.public_key().public_bytes_raw())
ENGINE = EngineStatement(MEASUREMENT.engine.removeprefix("sha256:"), "not loaded")
T = TypeVar("T")


@dataclass
class Chip:
    """An `EvidenceSource` over a simulated start."""

    hardware: LaunchedEnclave
    platform: str = "sim"

    def fix_launch(self, launch: bytes) -> None: ...

    def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
        return self.hardware.report(report_data)


@dataclass
class Site:
    """Starts replicas. What is changed of one start makes it another deployment, other code or another machine."""

    device: Device
    other: Device
    policy: str
    started: list[LaunchedEnclave] = field(default_factory=list)
    now: float = NOW
    seconds: float = 0.0

    def replica(
        self,
        *,
        founds: bool = False,
        device: Device | None = None,
        measurement: Measurement = MEASUREMENT,
        policy: str | None = None,
        config: Mapping[str, Any] | None = None,
        **launch: Any,
    ) -> Group:
        told = EnclaveConfig(platform="sim", group_policy=policy or self.policy, **(config or {}))
        fields = {"owner_key": OWNER, "deployment": "acme-chat", "release": 1, "app": App("llm", "66" * 32)}
        content = LaunchConfig(
            **{**fields, "models": (MODEL,), "config_sha256": told.digest().hex(), **launch}
        ).encode()
        witness = Witness(self.chip(measurement, content, device or self.device), content)
        return Group(witness, told, ENGINE, founds=founds, clock=lambda: self.now, monotonic=lambda: self.seconds)

    def chip(self, measurement: Measurement, launch: bytes, device: Device | None = None) -> Chip:
        hardware = (device or self.device).launch(measurement, launch_digest(launch))
        self.started.append(hardware)
        return Chip(hardware)

    def close(self) -> None:
        for hardware in self.started:
            hardware.close()


def policy_text(device: Device, measurement: Measurement = MEASUREMENT, **more: str) -> str:
    root = "".join(line for line in device.root_pem.decode().splitlines() if "-----" not in line)
    components = ", ".join(f'{name} = "{value}"' for name, value in measurement.components().items())
    extra = "".join(f'{name} = "{value}"\n' for name, value in more.items())
    return f'version = 1\n{extra}dangerously_trust_simulator = "{root}"\n[measurements]\nsim = [{{ {components} }}]\n'


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Device, Device]:
    folder = Path(tmp_path_factory.mktemp("devices"))
    return Device.open(folder / "one", now=NOW), Device.open(folder / "two", now=NOW)


@pytest.fixture
def site(devices: tuple[Device, Device]) -> Iterator[Site]:
    one = Site(*devices, policy_text(devices[0]))
    yield one
    one.close()


def run(work: Awaitable[T]) -> T:
    async def awaited() -> T:
        return await work

    return asyncio.run(awaited())


async def founded(site: Site, **more: Any) -> Group:
    group = site.replica(founds=True, **more)
    await group.enter()
    return group


async def waiting(site: Site, **more: Any) -> tuple[Group, "asyncio.Task[GroupRing]"]:
    """A replica that asks to be let in."""
    group = site.replica(**more)
    asks = asyncio.Event()
    entering = asyncio.create_task(group.enter(asks.set))
    done, _ = await asyncio.wait({entering, asked := asyncio.create_task(asks.wait())}, return_when="FIRST_COMPLETED")
    if entering in done:
        asked.cancel()
        entering.result()
    return group, entering


async def join(joiner: Group, member: Group, change: Callable[[bytes], bytes] = lambda message: message) -> None:
    """The four messages; `change` is done to the request."""
    await joiner.accept(await member.admit(change(await joiner.request(member.challenge()))))


def test_a_replica_is_let_in_and_has_the_members_keys(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        assert (member.state, joiner.state, joiner.published()) == ("member", "joining", ())
        await join(joiner, member)
        ring = await entering
        assert ring is joiner.ring
        assert joiner.published() == member.published() != ()
        third, third_entering = await waiting(site)
        await join(third, joiner)  # who was let in lets others in
        await third_entering
        assert third.published() == member.published()

    run(play())


def test_nothing_that_passes_between_them_holds_the_secret(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        challenge = member.challenge()
        request = await joiner.request(challenge)
        admission = await member.admit(request)
        await joiner.accept(admission)
        await entering
        assert joiner.ring is not None
        for secret in joiner.ring.secrets:
            assert all(secret.secret not in message for message in (challenge, request, admission))

    run(play())


def test_two_join_at_once_each_with_keys_of_its_own(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        one, one_entering = await waiting(site)
        two, two_entering = await waiting(site)
        requests = [await group.request(member.challenge()) for group in (one, two)]
        first, second = await asyncio.gather(*(member.admit(request) for request in requests))
        for group, message in ((two, first), (one, second)):
            with pytest.raises(NotTrusted, match="no request"):
                await group.accept(message)
        await asyncio.gather(one.accept(first), two.accept(second))
        await asyncio.gather(one_entering, two_entering)
        assert one.published() == two.published() == member.published()

    run(play())


def test_statements_say_that_keys_are_shared_and_clients_verify_every_replica(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        await join(joiner, member)
        await entering
        keys = set()

        def runs() -> Runs:
            return Runs(ENGINE, (ModelStatement("m", MODEL, "q8_0"),))

        for group, hardware in zip((member, joiner), site.started, strict=True):
            assert group.ring is not None
            launch = group._witness.launch
            attestation = Attestation(
                Chip(hardware), group.ring, launch, runs, (),
                group_policy_sha256=group.policy_sha256, clock=lambda: NOW,
            )  # fmt: skip
            document = parse_document(await attestation.document(nonce := os.urandom(32)))
            policy = group_policy(EnclaveConfig(platform="sim", group_policy=site.policy), parse_launch(launch))
            assert policy is not None
            verified = verify(document, policy=policy, nonce=nonce, now=NOW)
            assert verified.statement.key_scope == "group"
            assert verified.statement.group_policy_sha256 == hashlib.sha256(site.policy.encode()).hexdigest()
            keys.add(verified.ohttp_keys)
        assert len(keys) == 1

    run(play())


# Who is not let in


@pytest.mark.parametrize(
    "change",
    [
        {"deployment": "another"},
        {"owner_key": OTHER_OWNER},
        {"release": 2},
        {"app": App("llm", "99" * 32)},
        {"config": {"padding": False}},
        {"config": {"slots": 4}},
        {"logs": "public"},
    ],
    ids=str,
)
def test_a_replica_of_another_deployment_lets_nobody_in_and_is_not_let_in(site: Site, change: dict[str, Any]) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site, **change)
        with pytest.raises(NotTrusted, match="another group") as caught:
            await join(joiner, member)
        assert caught.value.step == "launch"
        assert joiner.ring is None
        entering.cancel()
        other = await founded(site, **change)
        joiner, entering = await waiting(site)
        request = await joiner.request(other.challenge())
        with pytest.raises(NotTrusted, match="another group"):
            await other.admit(request)
        lent = await other._witness.document(bytes(32), other._statement(b"", None))
        with pytest.raises(NotTrusted, match="another group"):
            await joiner.accept(Admission(parse_request(request).joiner_nonce, b"", lent).encode())
        entering.cancel()

    run(play())


def test_the_launch_config_that_is_compared_is_the_hardwares(site: Site) -> None:
    """Another deployment's replica puts ours into its document, in the place of its own."""

    async def play() -> None:
        member = await founded(site)
        other = site.replica(deployment="another")
        other._witness = replace(other._witness, launch=member._witness.launch)
        other._launch_sha256, other._ready = member._launch_sha256, True
        with pytest.raises(VerificationFailed, match="launch"):
            await join(other, member)

    run(play())


def test_a_replica_that_names_another_policy_in_its_statement_is_not_let_in(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        of = joiner._join(member.challenge(), os.urandom(32))
        joiner.policy_sha256 = "99" * 32
        statement = joiner._statement(b"", generate(KEM_XWING, os.urandom).public)
        document = await joiner._witness.document(of.request_nonce, statement)
        with pytest.raises(NotTrusted, match="another group"):
            await member.admit(Request(of.member_nonce, of.joiner_nonce, document).encode())
        entering.cancel()

    run(play())


def test_other_code_lets_nobody_in_and_is_not_let_in(site: Site, devices: tuple[Device, Device]) -> None:
    """It must say the same policy, or it would be of another deployment; and then its own start fails, or is skipped."""
    other = replace(MEASUREMENT, code=f"sha256:{'99' * 32}")

    async def play() -> None:
        with pytest.raises(VerificationFailed, match="measurement"):
            await founded(site, measurement=other)
        evil = site.replica(measurement=other)
        evil._ready = True
        member = await founded(site)
        with pytest.raises(VerificationFailed, match="measurement"):
            await join(evil, member)
        evil._ring = GroupRing.found(NOW)
        joiner, entering = await waiting(site)
        with pytest.raises(VerificationFailed, match="measurement"):
            await join(joiner, evil)
        assert joiner.ring is None
        entering.cancel()

    run(play())


def test_other_hardware_lets_nobody_in_and_is_not_let_in(site: Site) -> None:
    """A simulator whose keys the host has, in the place of the one whose root the policy names."""

    async def play() -> None:
        with pytest.raises(VerificationFailed, match="chip-certificate"):
            await founded(site, device=site.other)
        evil = site.replica(device=site.other)
        evil._ready = True
        member = await founded(site)
        with pytest.raises(VerificationFailed, match="chip-certificate"):
            await join(evil, member)
        evil._ring = GroupRing.found(NOW)
        joiner, entering = await waiting(site)
        with pytest.raises(VerificationFailed, match="chip-certificate"):
            await join(joiner, evil)
        entering.cancel()

    run(play())


def test_another_policy_is_another_deployment(site: Site) -> None:
    """The host may hand over a policy that lets its own code in: its digest is in the configuration's, so in hardware."""
    others = policy_text(site.device, replace(MEASUREMENT, code="sha256:" + "ee" * 32)).partition("sim = [")[2]
    lax = site.policy.replace("sim = [", f"sim = [{others.partition(']')[0]}, ")

    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site, policy=lax)
        with pytest.raises(NotTrusted):
            await join(joiner, member)
        lax_member = await founded(site, policy=lax)
        strict, strict_entering = await waiting(site)
        with pytest.raises(NotTrusted):
            await join(strict, lax_member)
        entering.cancel()
        strict_entering.cancel()

    run(play())


def test_a_policy_that_lets_in_not_even_this_replica_is_noticed_at_its_start(site: Site) -> None:
    pins: tuple[dict[str, Any], ...] = (
        {"deployment": "another"},
        {"config": f"sha256:{'00' * 32}"},
        {"broker_key": OTHER_OWNER},
    )
    for pin in pins:
        text = policy_text(site.device, **pin)
        launch = {"broker_key": OWNER} if "broker_key" in pin else {}
        with pytest.raises(VerificationFailed):
            run(founded(site, policy=text, **launch))
    with pytest.raises(MalformedPolicy):
        site.replica(policy="no policy")


# What the one in the middle can do


def test_a_request_is_good_for_one_admission(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        request = await joiner.request(member.challenge())
        await member.admit(request)
        with pytest.raises(NotTrusted, match="nonce"):
            await member.admit(request)
        other = await founded(site)
        with pytest.raises(NotTrusted, match="nonce"):
            await other.admit(request)
        entering.cancel()

    run(play())


def test_a_recorded_request_does_not_answer_a_new_nonce(site: Site) -> None:
    """Stale evidence under a fresh nonce: it is over another."""

    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        recorded = parse_request(await joiner.request(member.challenge()))
        with pytest.raises(VerificationFailed, match="binding"):
            await member.admit(replace(recorded, member_nonce=member.challenge()).encode())
        with pytest.raises(VerificationFailed, match="binding"):
            await member.admit(replace(recorded, joiner_nonce=os.urandom(32)).encode())
        entering.cancel()

    run(play())


def test_a_nonce_is_too_old_after_a_minute(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        request = await joiner.request(member.challenge())
        site.seconds += 60.0
        with pytest.raises(NotTrusted, match="nonce"):
            await member.admit(request)
        entering.cancel()

    run(play())


def test_an_admission_that_was_held_back_for_two_minutes_is_none(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        admission = await member.admit(await joiner.request(member.challenge()))
        site.seconds += 120.0
        with pytest.raises(NotTrusted, match="no request"):
            await joiner.accept(admission)
        await join(joiner, member)
        await entering

    run(play())


def test_an_admission_is_taken_once_and_by_nobody_else(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        other, other_entering = await waiting(site)
        admission = await member.admit(await joiner.request(member.challenge()))
        await other.request(member.challenge())
        with pytest.raises(NotTrusted, match="no request"):
            await other.accept(admission)
        await joiner.accept(admission)
        with pytest.raises(NotTrusted, match="no request"):
            await joiner.accept(admission)
        await entering
        other_entering.cancel()

    run(play())


def test_a_middle_that_swaps_the_joiners_key_gets_nothing(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        request = parse_request(await joiner.request(member.challenge()))
        items = dict(parse_document(request.document).items)
        told = parse_statement(items["statement"].content)
        own = generate(KEM_XWING, os.urandom)
        items["statement"] = Item("application/json", replace(told, provision_key=own.public).encode())
        with pytest.raises(VerificationFailed, match="binding"):
            await member.admit(replace(request, document=Document(items).encode()).encode())
        entering.cancel()

    run(play())


async def forged(joiner: Group, member: Group, admission: bytes, request: bytes) -> bytes:
    """An admission whose secrets are the middle's own, sealed as well as anybody can."""
    asked, found = parse_request(request), parse_admission(admission)
    of = Join(
        launch_sha256=joiner._launch_sha256,
        group_policy_sha256=bytes.fromhex(joiner.policy_sha256),
        member_nonce=asked.member_nonce,
        joiner_nonce=asked.joiner_nonce,
    )
    peer = verify(
        parse_document(asked.document), policy=member._policy, nonce=of.request_nonce, now=NOW, purpose="key-join"
    )
    sealed = seal_secrets(GroupRing.found(NOW).secrets, peer, of, entropy=os.urandom)
    return Admission(asked.joiner_nonce, sealed, found.document).encode()


def test_a_middle_that_puts_secrets_of_its_own_in_is_refused_and_the_members_still_taken(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        request = await joiner.request(member.challenge())
        admission = await member.admit(request)
        with pytest.raises(VerificationFailed, match="binding"):
            await joiner.accept(await forged(joiner, member, admission, request))
        await joiner.accept(admission)
        await entering
        assert joiner.published() == member.published()

    run(play())


def test_evidence_of_one_that_asks_does_not_stand_for_a_members(site: Site) -> None:
    """The middle has another genuine replica make evidence over the very nonce that an admission would be over."""

    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        tool, tool_entering = await waiting(site)
        request = await joiner.request(member.challenge())
        fake = parse_admission(await forged(joiner, member, await member.admit(request), request))
        asked = parse_request(request)
        nonce = joiner._pending[asked.joiner_nonce].join.admission_nonce(
            joiner._pending[asked.joiner_nonce].statement_sha256, fake.sealed
        )
        lent = parse_request(await tool.request(nonce)).document
        with pytest.raises(VerificationFailed, match="binding"):
            await joiner.accept(replace(fake, document=lent).encode())
        # And if it made evidence over any nonce, its statement would still say that it asks:
        statement = tool._statement(b"", generate(KEM_XWING, os.urandom).public)
        lent = await tool._witness.document(nonce, statement)
        with pytest.raises(NotTrusted, match="asks to be let in itself"):
            await joiner.accept(replace(fake, document=lent).encode())
        # Nor does a member's statement about other keys than those that came:
        lent = await tool._witness.document(nonce, tool._statement(KeyRing(NOW).ohttp_keys, None))
        with pytest.raises(NotTrusted, match="does not have these keys"):
            await joiner.accept(replace(fake, document=lent).encode())
        for task in (entering, tool_entering):
            task.cancel()

    run(play())


def test_evidence_for_clients_does_not_stand_for_a_members(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        request = await joiner.request(member.challenge())
        fake = parse_admission(await forged(joiner, member, await member.admit(request), request))
        pending = joiner._pending[parse_request(request).joiner_nonce]
        nonce = pending.join.admission_nonce(pending.statement_sha256, fake.sealed)
        assert member.ring is not None
        attestation = Attestation(
            member._witness.source, member.ring, member._witness.launch, lambda: Runs(ENGINE), (),
            group_policy_sha256=member.policy_sha256, clock=lambda: NOW,
        )  # fmt: skip
        lent = await attestation.document(nonce)  # as any client may ask for
        with pytest.raises(VerificationFailed, match="purpose"):
            await joiner.accept(replace(fake, document=lent).encode())
        entering.cancel()

    run(play())


def test_one_that_is_no_member_lets_nobody_in(site: Site) -> None:
    async def play() -> None:
        no_member, entering = await waiting(site)
        joiner, joiner_entering = await waiting(site)
        with pytest.raises(EngineLoading):
            no_member.challenge()
        with pytest.raises(EngineLoading):
            await no_member.admit(await joiner.request(os.urandom(32)))
        with pytest.raises(EngineLoading):
            await site.replica().request(os.urandom(32))  # before it could serve
        for task in (entering, joiner_entering):
            task.cancel()

    run(play())


def test_a_member_that_asks_to_be_let_in_by_a_member_is_not_let_in_as_one(site: Site) -> None:
    """A member's own evidence offers no key to be let in with, and an admission is no request."""

    async def play() -> None:
        member = await founded(site)
        challenge = member.challenge()
        of = member._join(challenge, os.urandom(32))
        assert member.ring is not None
        document = await member._witness.document(of.request_nonce, member._statement(member.ring.ohttp_keys, None))
        with pytest.raises(NotTrusted, match="offers no key"):
            await member.admit(Request(challenge, of.joiner_nonce, document).encode())

    run(play())


def test_what_opens_to_nothing_is_refused(site: Site) -> None:
    """The member's evidence is genuine, and over a text that was never sealed to this joiner."""

    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        request = await joiner.request(member.challenge())
        found = parse_admission(await member.admit(request))
        pending = joiner._pending[found.joiner_nonce]
        junk = os.urandom(len(found.sealed))
        assert member.ring is not None
        statement = member._statement(member.ring.ohttp_keys, None)
        nonce = pending.join.admission_nonce(pending.statement_sha256, junk)
        document = await member._witness.document(nonce, statement)
        with pytest.raises(ChannelBroken):
            await joiner.accept(Admission(found.joiner_nonce, junk, document).encode())
        with pytest.raises(MalformedMessage):
            await joiner.accept(b"")
        with pytest.raises(MalformedMessage):
            await joiner.request(b"short")
        entering.cancel()

    run(play())


def test_a_member_that_dies_amid_a_join_leaves_the_joiner_asking(site: Site) -> None:
    async def play() -> None:
        dead, member = await founded(site), await founded(site)
        joiner, entering = await waiting(site)
        await joiner.request(dead.challenge())
        assert joiner.state == "joining"
        await join(joiner, member)
        await entering
        assert joiner.published() == member.published()

    run(play())


def test_the_keys_of_requests_that_are_too_old_are_dropped(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        for _ in range(3):
            await joiner.request(member.challenge())
        site.seconds += 120.0
        admission = await member.admit(await joiner.request(member.challenge()))
        assert len(joiner._pending) == 1
        site.seconds += 120.0
        with pytest.raises(NotTrusted, match="no request"):
            await joiner.accept(admission)
        assert not joiner._pending
        entering.cancel()

    run(play())


def test_requests_that_nobody_answers_do_not_pile_up(site: Site) -> None:
    async def play() -> None:
        member = await founded(site)
        joiner, entering = await waiting(site)
        first = await member.admit(await joiner.request(member.challenge()))
        for _ in range(8):
            await joiner.request(member.challenge())
        assert len(joiner._pending) == 8
        with pytest.raises(NotTrusted, match="no request"):
            await joiner.accept(first)
        for _ in range(300):
            member.challenge()
        assert len(member._challenges) == 256
        entering.cancel()

    run(play())


# The broker


def test_where_the_policy_names_a_broker_nobody_is_let_in_without_its_word(site: Site) -> None:
    site.policy = policy_text(site.device, broker_key=BROKER_NAME)

    async def play() -> None:
        member = await founded(site)

        def authorise(request: bytes, key: Ed25519PrivateKey = BROKER) -> bytes:
            asked = parse_request(request)
            statement = parse_document(asked.document).items["statement"].content
            of = member._join(asked.member_nonce, asked.joiner_nonce)
            word = key.sign(of.authorisation(hashlib.sha256(statement).digest()))
            return replace(asked, word=word).encode()

        joiner, entering = await waiting(site)
        with pytest.raises(NotTrusted, match="broker"):
            await join(joiner, member)
        with pytest.raises(NotTrusted, match="broker"):
            await join(joiner, member, lambda request: authorise(request, Ed25519PrivateKey.generate()))
        recorded = parse_request(authorise(await joiner.request(member.challenge())))
        with pytest.raises(NotTrusted, match="broker"):
            await join(joiner, member, lambda request: replace(parse_request(request), word=recorded.word).encode())
        await join(joiner, member, authorise)
        await entering
        assert joiner.published() == member.published()

    run(play())


# The door


async def knock(app: Any, method: str, path: str, body: bytes = b"", kind: str = "application/octet-stream") -> Any:
    sent: list[Any] = []
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return given.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", kind.encode())]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def behind(_ring: KeyRing) -> Any:
    async def gateway(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"gateway"})

    return gateway


def test_the_doors_carry_a_join_and_open_the_gateway_after_it(site: Site) -> None:
    async def play() -> None:
        member = Entrance(await founded(site), behind)
        group, entering = await waiting(site)
        joiner = Entrance(group, behind)
        assert await knock(joiner, "GET", "/readyz") == (503, b'{"status": "joining"}')
        assert (await knock(joiner, "GET", "/.well-known/ohttp-gateway"))[0] == 503
        assert (await knock(joiner, "POST", f"{GROUP_PATH}/challenge"))[0] == 503
        challenge = (await knock(member, "POST", f"{GROUP_PATH}/challenge"))[1]
        request = (await knock(joiner, "POST", f"{GROUP_PATH}/request", challenge))[1]
        admission = (await knock(member, "POST", f"{GROUP_PATH}/admit", request))[1]
        assert await knock(joiner, "POST", f"{GROUP_PATH}/accept", admission) == (200, b"")
        await entering
        assert await knock(joiner, "GET", "/anything") == (200, b"gateway")
        told = [json.loads((await knock(one, "GET", GROUP_PATH))[1]) for one in (member, joiner)]
        assert told[0] == told[1]
        assert told[0]["state"] == "member"
        assert set(told[0]) == {"state", "keys", "next"}

    run(play())


def test_a_door_tells_refusals_apart_and_takes_no_more_than_it_can(site: Site) -> None:
    async def play() -> None:
        member = Entrance(await founded(site), behind)
        status, body = await knock(member, "POST", f"{GROUP_PATH}/admit", b"junk")
        assert (status, json.loads(body)["type"].rpartition("/")[2]) == (400, "join-unfit")
        asked = Request(bytes(32), bytes(32), b"{}").encode()
        status, body = await knock(member, "POST", f"{GROUP_PATH}/admit", asked)
        assert (status, json.loads(body)["type"].rpartition("/")[2]) == (403, "join-refused")
        assert (await knock(member, "POST", f"{GROUP_PATH}/admit", b"", "text/plain"))[0] == 415
        assert (await knock(member, "POST", f"{GROUP_PATH}/admit", bytes(5 << 20)))[0] == 413
        assert (await knock(member, "GET", f"{GROUP_PATH}/admit"))[0] == 405
        assert (await knock(member, "DELETE", GROUP_PATH))[0] == 405
        assert (await knock(member, "POST", f"{GROUP_PATH}/other"))[0] == 403
        statuses = [(await knock(member, "POST", f"{GROUP_PATH}/challenge"))[0] for _ in range(40)]
        assert {200, 503} == set(statuses)

    run(play())


def test_a_policy_without_measurements_is_none_for_a_group(site: Site) -> None:
    """By it any code would be let in, and inside nobody reads what was not checked."""
    without = site.policy.partition("[measurements]")[0]
    assert without != site.policy
    with pytest.raises(MalformedPolicy, match="lists measurements"):
        site.replica(policy=without)


def test_messages_that_never_end_do_not_shut_the_door(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.enclave.runtime.bodies._LARGEST_AT_ONCE", 2)

    async def play() -> None:
        member = Entrance(await founded(site), behind)
        admit = f"{GROUP_PATH}/admit"
        idle, large = Slow(), Slow(bytes(MAX_MESSAGE))
        slow = [asyncio.create_task(idle.ask(member, admit)) for _ in range(5)]
        await asyncio.sleep(0)
        assert (await knock(member, "POST", admit, b"junk"))[0] == 400
        slow += [asyncio.create_task(large.ask(member, admit)) for _ in range(2)]
        await asyncio.sleep(0)
        assert (await knock(member, "POST", admit, b"junk"))[0] == 503
        assert (await knock(member, "POST", f"{GROUP_PATH}/challenge"))[0] == 200
        large.end()
        idle.end()
        await asyncio.gather(*slow)

    run(play())
