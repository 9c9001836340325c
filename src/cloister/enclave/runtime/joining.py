"""A replica's part in its key group: it is its first member, or a member lets it in; then it lets others in.

The enclaves never speak to each other: whoever runs them carries four messages between their doors, and can lose them, or
carry them elsewhere, to no other end than that nobody is let in.

(1) a member gives a nonce, which it takes back once, within a minute
(2) the joiner makes a single-use key, and evidence over that nonce and one of its own: its request
(3) the member judges that evidence by the group's policy; it must be of the very same launch config. Where the policy names a
    broker, the broker's word must be there, for these two nonces. It seals the group's secrets to the joiner's key, and makes
    evidence of its own over both nonces, the joiner's statement and what it sealed: the admission
(4) the joiner judges that evidence by the same policy, opens the secrets, and holds the keys that come of them against those
    that the member's statement names

The policy stands in the configuration, and its digest with that in the launch config: a host can choose another only for
another deployment. What it leaves open of owner, deployment, app, models and configuration is filled in with this launch
config's own.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cloister.channel.group import (
    NONCE,
    Admission,
    Join,
    Request,
    check_word,
    open_secrets,
    parse_admission,
    parse_request,
    seal_secrets,
)
from cloister.channel.hpke import KEM_XWING, Entropy, PrivateKey, generate
from cloister.channel.keys import GroupRing, encode_configs, epoch_configs
from cloister.enclave.attestation import Witness
from cloister.enclave.boot import EnclaveConfig
from cloister.enclave.llm.llama.library import library_digest
from cloister.errors import EngineLoading, MalformedMessage, MalformedPolicy, NotTrusted, WrongUse
from cloister.evidence.document import parse_document
from cloister.evidence.launch import LaunchConfig, launch_digest, parse_launch
from cloister.evidence.manifest import manifest_digest
from cloister.evidence.statement import EngineStatement, Statement
from cloister.verify import Policy, VerifiedPeer, parse_policy, verify
from cloister.verify.roots import PINNED, Roots

__all__ = ["Group", "engine_statement", "group_policy"]

_CHALLENGE_SECONDS = 60.0
_ADMISSION_SECONDS = 120.0
"""For which a request waits for its admission: one that was held back brings keys of another time."""
_MOST_CHALLENGES = 256
_MOST_PENDING = 8
"""Requests of this replica that no admission has come for: the oldest one's key is dropped for a new one's."""
_LIFE = 3600
_WITH_KEYS = frozenset({"ehbp", "tls"})
"""Weakened settings that a statement names together with a key, which one of this purpose does not have."""


def engine_statement(engine_dir: str) -> EngineStatement:
    """Of the engine's libraries that lie here, as the hardware measures them; of nothing without any."""
    return EngineStatement(library_digest(Path(engine_dir)) if engine_dir else manifest_digest({}).hex(), "not loaded")


def group_policy(config: EnclaveConfig, launch: LaunchConfig) -> Policy | None:
    """The policy by which a group's replicas judge each other; None where keys are each replica's own.

    A group's policy is one text: its simulator's root, if it names one, stands in it as DER in base64, in the place of a
    path. What is weakened by the configuration, which all replicas share, is tolerated.

    Raises: MalformedPolicy.
    """
    if config.group_policy is None:
        return None
    policy = parse_policy(config.group_policy, read=_pem)
    if not policy.measurements and policy.measurements_signer is None:
        hint = "Without them any code would be let in."
        raise MalformedPolicy("A group's policy lists measurements.", step="measurements", hint=hint)
    return replace(
        policy,
        owner_key=policy.owner_key or launch.owner_key,
        deployment=policy.deployment or launch.deployment,
        app=policy.app or launch.app.sha256,
        config=policy.config or launch.config_sha256,
        models=policy.models or frozenset(launch.models) or None,
        logs=launch.logs,
        broker_key=policy.broker_key or launch.broker_key,
        tolerate_insecure=policy.tolerate_insecure | frozenset(config.insecure),
    )


def _pem(der: str) -> bytes:
    lines = (der[at : at + 64] for at in range(0, len(der), 64))
    return "\n".join(("-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", "")).encode()


@dataclass(frozen=True, slots=True)
class _Pending:
    """What a request of this replica was: its single-use key, the digest of the statement that offered it, and until when (on
    the monotonic clock) it may be answered."""

    join: Join
    key: PrivateKey
    statement_sha256: bytes
    until: float


class Group:
    """`founds`: this replica begins the group, and waits for nobody; the host's word, on which nothing rests but whether there is
    one group or several. `monotonic` is for the age of nonces. `roots` are the vendors' pinned ones: only tests name
    others.

    Raises: MalformedPolicy; WrongUse for a configuration without one.
    """

    def __init__(
        self,
        witness: Witness,
        config: EnclaveConfig,
        engine: EngineStatement,
        *,
        founds: bool,
        insecure: tuple[str, ...] = (),
        code: Literal["open", "sealed"] = "open",
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        entropy: Entropy = os.urandom,
        roots: Roots = PINNED,
    ) -> None:
        self._launch = parse_launch(witness.launch)
        policy = group_policy(config, self._launch)
        if policy is None or config.group_policy is None:
            raise WrongUse("This configuration names no group.", step="group")
        self.policy_sha256 = hashlib.sha256(config.group_policy.encode()).hexdigest()
        self._policy = policy
        self._broker = parse_policy(config.group_policy, read=_pem).broker_key
        self._witness = witness
        self._engine = engine
        self._founds = founds
        self._ehbp = config.ehbp
        self._insecure = insecure or config.insecure
        self._code: Literal["open", "sealed"] = code
        self._clock = clock
        self._monotonic = monotonic
        self._entropy = entropy
        self._roots = roots
        self._launch_sha256 = launch_digest(witness.launch)
        self._receipt_key = entropy(32)
        self._ring: GroupRing | None = None
        self._joined = asyncio.Event()
        self._ready = False
        self._challenges: dict[bytes, float] = {}
        self._pending: dict[bytes, _Pending] = {}

    @property
    def ring(self) -> GroupRing | None:
        """The group's keys, as this replica has them; None before it is a member."""
        return self._ring

    def published(self) -> tuple[bytes, ...]:
        """The key configs of now and of the time after; nothing before this replica is a member."""
        if self._ring is None:
            return ()
        self._ring.rotate(self._clock())
        return self._ring.ohttp_keys, self._ring.next_keys

    @property
    def state(self) -> str:
        if self._ring is not None:
            return "member"
        return "joining" if self._ready else "starting"

    async def enter(self, on_joining: Callable[[], None] = lambda: None) -> GroupRing:
        """Holds its own evidence against the policy, so that one which would let nobody in is noticed at once; then founds the
        group, or waits until a member lets it in, which `on_joining` is told. The ring.

        Raises: VerificationFailed, and what else judging and the hardware raise.
        """
        join = self._join(self._entropy(NONCE), self._entropy(NONCE))
        statement = self._statement(b"", generate(KEM_XWING, self._entropy).public)
        document = await self._witness.document(join.request_nonce, statement)
        await asyncio.to_thread(self._judge, document, join.request_nonce)
        self._ready = True
        if self._founds:
            self._ring = GroupRing.found(self._clock(), ehbp=self._ehbp, entropy=self._entropy)
            return self._ring
        on_joining()
        await self._joined.wait()
        return self._member()

    # As a member

    def challenge(self) -> bytes:
        """A nonce (32 bytes) for one request within a minute. Raises: EngineLoading while this is no member."""
        self._member()
        now = self._monotonic()
        self._challenges = {nonce: until for nonce, until in self._challenges.items() if until > now}
        if len(self._challenges) >= _MOST_CHALLENGES:
            self._challenges.pop(next(iter(self._challenges)))
        nonce = self._entropy(NONCE)
        self._challenges[nonce] = now + _CHALLENGE_SECONDS
        return nonce

    async def admit(self, data: bytes) -> bytes:
        """The admission of whoever made this request.

        Raises: EngineLoading while this is no member; MalformedMessage, MalformedEvidence; NotTrusted for a nonce that was
        not given out, was used or is too old, for evidence that the policy refuses, and without the broker's word where
        it is needed; what the hardware raises.
        """
        self._member()
        request = parse_request(data)
        if self._challenges.pop(request.member_nonce, 0.0) <= self._monotonic():
            hint = "A nonce is good for one request, within a minute. Begin again."
            raise NotTrusted("This nonce was not given out here, or is used up.", step="nonce", hint=hint)
        join = self._join(request.member_nonce, request.joiner_nonce)
        peer = await asyncio.to_thread(self._judge, request.document, join.request_nonce)
        if peer.join_key is None:
            raise NotTrusted("Who asks to be let in offers no key for it.", step="keys")
        statement_sha256 = bytes.fromhex(peer.statement_sha256)
        if self._broker is not None:
            check_word(request.word, join, statement_sha256, self._broker)
        ring = self._member()
        ring.rotate(self._clock())
        sealed = seal_secrets(ring.secrets, peer, join, entropy=self._entropy)
        statement = self._statement(ring.ohttp_keys, None)
        document = await self._witness.document(join.admission_nonce(statement_sha256, sealed), statement)
        return Admission(request.joiner_nonce, sealed, document).encode()

    # As a joiner

    async def request(self, challenge: bytes) -> bytes:
        """The request to be let in by the member that gave this nonce. A member may ask too: it goes over to the other's keys.

        Raises: EngineLoading before this replica could serve; MalformedMessage for no nonce; what the hardware raises.
        """
        if not self._ready:
            raise EngineLoading("This replica cannot be let in yet.", hint="Try again in a moment.")
        if len(challenge) != NONCE:
            raise MalformedMessage("A member's nonce has 32 bytes.", step="nonce")
        join = self._join(challenge, self._entropy(NONCE))
        key = generate(KEM_XWING, self._entropy)
        statement = self._statement(b"", key.public)
        document = await self._witness.document(join.request_nonce, statement)
        self._drop_late()
        if len(self._pending) >= _MOST_PENDING:
            self._pending.pop(next(iter(self._pending)))
        until = self._monotonic() + _ADMISSION_SECONDS
        self._pending[join.joiner_nonce] = _Pending(join, key, hashlib.sha256(statement).digest(), until)
        return Request(join.member_nonce, join.joiner_nonce, document).encode()

    async def accept(self, data: bytes) -> None:
        """Takes the keys in an admission. Each request is answered once, within two minutes; what is refused leaves it open.

        Raises: MalformedMessage, MalformedEvidence; NotTrusted for an answer to nothing that was asked, for evidence that the
        policy refuses, and for secrets that are not those of the keys which the member's statement names; ChannelBroken.
        """
        self._drop_late()
        admission = parse_admission(data)
        pending = self._pending.get(admission.joiner_nonce)
        if pending is None:
            raise NotTrusted("This answers no request of this replica.", step="nonce", hint="Begin again.")
        nonce = pending.join.admission_nonce(pending.statement_sha256, admission.sealed)
        peer = await asyncio.to_thread(self._judge, admission.document, nonce)
        if peer.join_key is not None:
            raise NotTrusted("Who lets this replica in asks to be let in itself.", step="keys")
        secrets = open_secrets(admission.sealed, pending.key, pending.join, pending.statement_sha256)
        if encode_configs(epoch_configs(secrets[0])) != peer.ohttp_keys:
            raise NotTrusted("Who let this replica in does not have these keys itself.", step="keys")
        if self._pending.pop(admission.joiner_nonce, None) is None:
            raise NotTrusted("This request was answered meanwhile.", step="nonce")
        now = self._clock()
        if self._ring is None:
            self._ring = GroupRing(secrets, now, ehbp=self._ehbp, entropy=self._entropy)
        else:
            self._ring.install(secrets, now)
        self._joined.set()

    def _drop_late(self) -> None:
        """The keys of requests that may be answered no more."""
        now = self._monotonic()
        self._pending = {nonce: pending for nonce, pending in self._pending.items() if pending.until > now}

    # Both

    def _member(self) -> GroupRing:
        if self._ring is None:
            raise EngineLoading("This replica is no member of its group yet.", hint="Ask one that is.")
        return self._ring

    def _join(self, member_nonce: bytes, joiner_nonce: bytes) -> Join:
        return Join(
            launch_sha256=self._launch_sha256,
            group_policy_sha256=bytes.fromhex(self.policy_sha256),
            member_nonce=member_nonce,
            joiner_nonce=joiner_nonce,
        )

    def _statement(self, ohttp_keys: bytes, join_key: bytes | None) -> bytes:
        now = int(self._clock())
        return Statement(
            purpose="key-join",
            aud=(),
            launch_sha256=self._launch_sha256.hex(),
            iat=now,
            exp=now + _LIFE,
            ohttp_keys=ohttp_keys,
            receipt_key=self._receipt_key,
            provision_key=join_key,
            engine=self._engine,
            models=(),
            egress=self._launch.egress,
            key_scope="group",
            group_policy_sha256=self.policy_sha256,
            code=self._code,
            insecure=tuple(name for name in self._insecure if name not in _WITH_KEYS),
        ).encode()

    def _judge(self, document: bytes, nonce: bytes) -> VerifiedPeer:
        """Of the very same launch config, whose digest the verification then holds against the hardware's: the same owner,
        deployment, release, app, models, configuration and so policy. Raises: NotTrusted, MalformedEvidence."""
        parsed = parse_document(document)
        launch = parsed.items.get("launch")
        got = "none" if launch is None else launch_digest(launch.content).hex()
        _same("launch", self._launch_sha256.hex(), got, "Another deployment, or another release of it.")
        peer = verify(
            parsed, policy=self._policy, nonce=nonce, now=self._clock(), roots=self._roots, purpose="key-join"
        )
        policy = peer.statement.group_policy_sha256 or "none"
        _same("group-policy", self.policy_sha256, policy, "It judges by another policy.")
        return peer


def _same(step: str, expected: str, got: str, hint: str) -> None:
    if got != expected:
        raise NotTrusted("This replica is of another group.", step=step, expected=expected, got=got, hint=hint)
