"""The channel's keys: the published configs (RFC 9458, section 3), the client's choice, and the receiver's key ring."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from cloister.channel.group import EpochSecret, begin_chain
from cloister.channel.hpke import (
    AEAD_AES_128_GCM,
    AEAD_AES_256_GCM,
    AEAD_CHACHA20_POLY1305,
    KDF_HKDF_SHA256,
    KEM_X25519,
    KEM_XWING,
    KEMS,
    Entropy,
    PrivateKey,
    generate,
)
from cloister.errors import KeyUnknown, MalformedMessage, NotTrusted, Replayed

__all__ = [
    "GroupRing",
    "KeyConfig",
    "KeyRing",
    "ReceiverKey",
    "choose",
    "encode_configs",
    "epoch_configs",
    "parse_configs",
    "replica_of",
]

_KEMS_STRONGEST_FIRST = (KEM_XWING, KEM_X25519)
_AEADS_STRONGEST_FIRST = (AEAD_AES_256_GCM, AEAD_AES_128_GCM, AEAD_CHACHA20_POLY1305)
_OFFERED_AEADS = {KEM_XWING: (AEAD_AES_256_GCM,), KEM_X25519: _AEADS_STRONGEST_FIRST}
_MAX_EPOCHS = 4
"""Held at once. Rotation by count could otherwise pile up replay sets, some 100 MB each when full."""
_KEY_NUMBERS = 128
"""Of epochs, before their key identifiers begin anew: one byte, for two keys each."""


@dataclass(frozen=True, slots=True)
class KeyConfig:
    """One key as published: `suites` are (KDF, AEAD) identifiers in the publisher's order."""

    key_id: int
    kem_id: int
    public: bytes
    suites: tuple[tuple[int, int], ...]

    def encode(self) -> bytes:
        """RFC 9458, section 3.1."""
        suites = b"".join(kdf.to_bytes(2, "big") + aead.to_bytes(2, "big") for kdf, aead in self.suites)
        head = bytes([self.key_id]) + self.kem_id.to_bytes(2, "big")
        return head + self.public + len(suites).to_bytes(2, "big") + suites


def encode_configs(configs: Sequence[KeyConfig]) -> bytes:
    """`application/ohttp-keys`: each config behind its length (RFC 9458, section 3.2)."""
    encoded = [config.encode() for config in configs]
    return b"".join(len(config).to_bytes(2, "big") + config for config in encoded)


def parse_configs(data: bytes) -> tuple[KeyConfig, ...]:
    """Reads `application/ohttp-keys`. A config of an unknown KEM is passed over. Public keys are not checked yet.

    Raises: MalformedMessage.
    """
    configs = []
    while data:
        length = int.from_bytes(data[:2], "big")
        config, data = data[2 : 2 + length], data[2 + length :]
        if len(config) != length or length < 3:
            raise _malformed("a config is cut off")
        if int.from_bytes(config[1:3], "big") in KEMS:
            configs.append(_parse_config(config))
    return tuple(configs)


def _parse_config(data: bytes) -> KeyConfig:
    kem_id = int.from_bytes(data[1:3], "big")
    end = 3 + KEMS[kem_id].public_length
    suites = data[end + 2 :]
    if len(data) < end + 2 or len(suites) != int.from_bytes(data[end : end + 2], "big") or not suites:
        raise _malformed("a config has the wrong length")
    if len(suites) % 4:
        raise _malformed("a list of algorithms has the wrong length")
    numbers = [int.from_bytes(suites[i : i + 2], "big") for i in range(0, len(suites), 2)]
    return KeyConfig(data[0], kem_id, data[3:end], tuple(zip(numbers[::2], numbers[1::2], strict=True)))


def _malformed(what: str) -> MalformedMessage:
    return MalformedMessage(f"Not a list of key configs: {what}.", step="key config")


def choose(configs: Sequence[KeyConfig], *, require_pq: bool = False) -> tuple[KeyConfig, int]:
    """The strongest config that is offered, and the AEAD to use with it. The order of the offer has no say.

    What is chosen from must be attested bytes, or somebody in between could strip the strongest.

    Raises: NotTrusted when nothing (or with `require_pq` nothing post-quantum) is offered.
    """
    for kem_id in _KEMS_STRONGEST_FIRST[:1] if require_pq else _KEMS_STRONGEST_FIRST:
        for config in configs:
            for aead_id in _AEADS_STRONGEST_FIRST:
                if config.kem_id == kem_id and (KDF_HKDF_SHA256, aead_id) in config.suites:
                    return config, aead_id
    kind = "post-quantum key" if require_pq else "key of a known kind"
    raise NotTrusted(f"The enclave offers no {kind} to seal to.", step="key config")


def replica_of(ohttp_keys: bytes) -> str:
    """The value of `Cloister-Replica`: 16 hexadecimal digits that any balancer can match."""
    return hashlib.sha256(ohttp_keys).hexdigest()[:16]


@dataclass(slots=True, eq=False)
class _Epoch:
    """Keys that live together, EHBP's among them if it is spoken, and every request that was opened with them."""

    number: int
    made_at: float
    expires_at: float
    keys: tuple[PrivateKey, ...]
    configs: tuple[KeyConfig, ...]
    ehbp: PrivateKey | None
    seen: set[bytes] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class ReceiverKey:
    """A live key of the ring, as `KeyRing.find` or `KeyRing.find_ehbp` gave it."""

    private: PrivateKey
    config: KeyConfig
    epoch: _Epoch = field(repr=False)


class KeyRing:
    """The receiver's keys: made here, published, replaced, forgotten.

    An epoch's keys are published for half of `lifetime` and accepted for all of it, so that whoever verified them a
    moment before a rotation can still use them. `max_requests` opened requests end an epoch early: its memory of them
    is full, so it opens no more (KeyUnknown sends the client to attest again) and `rotate` publishes the next. The first
    epoch's number is drawn, so that a restarted enclave's key seldom has the identifier of one that was lost.

    With `ehbp` each epoch has a third key, for EHBP alone: its requests share the epoch's life, limit and memory.

    `now` is Unix seconds and never runs backwards: the latest one seen counts. Not for several threads at once.
    Dropped keys are unreferenced, not erased: CPython cannot promise that.
    """

    def __init__(
        self,
        now: float,
        *,
        lifetime: float = 3600.0,
        max_requests: int = 1 << 20,
        ehbp: bool = False,
        entropy: Entropy = os.urandom,
    ) -> None:
        self.entropy = entropy
        self._now = now
        self._lifetime = lifetime
        self._max_requests = max_requests
        self._ehbp = ehbp
        self._epochs = self._begin()

    def _begin(self) -> list[_Epoch]:
        return [self._make(self.entropy(1)[0])]

    @property
    def _published(self) -> _Epoch:
        return self._epochs[-1]

    @property
    def ohttp_keys(self) -> bytes:
        """What is published now: X-Wing first, X25519 second."""
        return encode_configs(self._published.configs)

    @property
    def ehbp_key(self) -> bytes | None:
        """The public key (32 bytes) for EHBP that is published now; None where EHBP is off."""
        key = self._published.ehbp
        return None if key is None else key.public

    @property
    def ehbp_config(self) -> bytes | None:
        """The same as EHBP publishes it: 41 bytes, without the length that stands before an OHTTP config."""
        key = self._published.ehbp
        return None if key is None else _ehbp_config(key).encode()

    @property
    def expires_at(self) -> float:
        """When the published keys are dropped."""
        return self._published.expires_at

    def rotate(self, now: float) -> bool:
        """Drops dead keys and makes new ones when it is time. True when `ohttp_keys` changed: publish a new statement."""
        self._advance(now)
        current = self._published
        due = self._now >= current.made_at + self._lifetime / 2 or self._full(current)
        if due:
            self._epochs = [*self._epochs, self._make(current.number + 1)][-_MAX_EPOCHS:]
        self._drop_dead()
        return due

    def _drop_dead(self) -> None:
        self._epochs = [epoch for epoch in self._epochs if epoch.expires_at > self._now]

    def find(self, key_id: int, kem_id: int, kdf_id: int, aead_id: int, now: float) -> tuple[ReceiverKey, ...]:
        """Every live key that a request may mean with its header, newest first: one, unless chains share an identifier.

        Raises: KeyUnknown for keys never made, dead or full, and for algorithms that the key's config does not list.
        """
        self._advance(now)
        found = tuple(
            ReceiverKey(private, config, epoch)
            for epoch in reversed(self._epochs)
            if self._alive(epoch)
            for private, config in zip(epoch.keys, epoch.configs, strict=True)
            if (config.key_id, config.kem_id) == (key_id, kem_id) and (kdf_id, aead_id) in config.suites
        )
        if not found:
            raise _unknown()
        return found

    def find_ehbp(self, now: float) -> tuple[ReceiverKey, ...]:
        """Every live key for EHBP, newest first: its requests do not name theirs. Empty where EHBP is off."""
        self._advance(now)
        alive = [epoch for epoch in reversed(self._epochs) if self._alive(epoch)]
        return tuple(ReceiverKey(epoch.ehbp, _ehbp_config(epoch.ehbp), epoch) for epoch in alive if epoch.ehbp)

    def remember(self, key: ReceiverKey, enc: bytes, now: float) -> None:
        """Marks an encapsulated secret as used, until its key dies. Call it once the first chunk has opened.

        Raises: Replayed, KeyUnknown when the key died or filled up meanwhile.
        """
        self._advance(now)
        digest = hashlib.sha256(enc).digest()
        if digest in key.epoch.seen:
            raise Replayed("This request was seen before.", step="replay")
        if not self._alive(key.epoch):
            raise _unknown()
        key.epoch.seen.add(digest)

    def _advance(self, now: float) -> None:
        self._now = max(self._now, now)

    def _full(self, epoch: _Epoch) -> bool:
        return len(epoch.seen) >= self._max_requests

    def _alive(self, epoch: _Epoch) -> bool:
        return epoch in self._epochs and epoch.expires_at > self._now and not self._full(epoch)

    def _make(self, number: int) -> _Epoch:
        keys = tuple(generate(kem_id, self.entropy) for kem_id in _KEMS_STRONGEST_FIRST)
        ehbp = generate(KEM_X25519, self.entropy) if self._ehbp else None
        return self._epoch(number, self._now, keys, ehbp)

    def _epoch(self, number: int, made_at: float, keys: tuple[PrivateKey, ...], ehbp: PrivateKey | None) -> _Epoch:
        return _Epoch(number, made_at, made_at + self._lifetime, keys, _configs(number, keys), ehbp)


class GroupRing(KeyRing):
    """The ring of one replica in a key group: its keys come from a chain of secrets that it shares with the others, so that
    all publish the same keys at the same time without a word between them.

    The epoch whose time it is, is published; the one after it opens requests already, so that clocks may differ by as much, and
    a replica whose memory of an epoch is full goes on to it alone. A secret is dropped with its epoch's time. A chain goes
    on for a day; its last epoch is followed by a new chain's, which each replica draws for itself unless it is handed another's
    (`secrets` has both) before.

    Each replica remembers the requests that it opened itself: what was sent to one can be played once to each of the others,
    and to each that joins while the keys live.
    """

    def __init__(
        self,
        secrets: tuple[EpochSecret, EpochSecret],
        now: float,
        *,
        lifetime: float = 3600.0,
        max_requests: int = 1 << 20,
        ehbp: bool = False,
        entropy: Entropy = os.urandom,
    ) -> None:
        """`secrets`: of the epoch that is published and of the one after it, as `secrets` gives them at a member."""
        self._secret, self._following = secrets
        self._given_up: dict[tuple[KeyConfig, ...], float] = {}
        """Of epochs that made room for others while they lived: when they die. What was opened under them is forgotten."""
        super().__init__(now, lifetime=lifetime, max_requests=max_requests, ehbp=ehbp, entropy=entropy)

    @classmethod
    def found(
        cls,
        now: float,
        *,
        lifetime: float = 3600.0,
        max_requests: int = 1 << 20,
        ehbp: bool = False,
        entropy: Entropy = os.urandom,
    ) -> "GroupRing":
        """That of a group's first member, with a secret that nobody else has. Its first epoch's number is drawn."""
        first = begin_chain(entropy(1)[0], int(now), entropy)
        secrets = first, _after(first, int(lifetime / 2), entropy)
        return cls(secrets, now, lifetime=lifetime, max_requests=max_requests, ehbp=ehbp, entropy=entropy)

    @property
    def secrets(self) -> tuple[EpochSecret, EpochSecret]:
        """What lets another replica in."""
        return self._secret, self._following

    @property
    def next_keys(self) -> bytes:
        """What `ohttp_keys` will be next: the same at all members, unless a chain's end is near."""
        return encode_configs(self._epochs[-1].configs)

    def install(self, secrets: tuple[EpochSecret, EpochSecret], now: float) -> None:
        """Goes over to another member's chain. What opened before still does until it dies, and is remembered; of what had to
        make room nothing opens again.

        Raises: NotTrusted for keys that this replica gave up while they lived: it no longer knows what it opened with them.
        """
        self._advance(now)
        self._given_up = {configs: at for configs, at in self._given_up.items() if at > self._now}
        if any(epoch_configs(secret) in self._given_up for secret in secrets):
            hint = "Wait until the group has its next ones."
            raise NotTrusted("This replica gave these keys up, and takes them no more.", step="keys", hint=hint)
        self._secret, self._following = secrets
        self._put_last(*secrets)

    def _put_last(self, *secrets: EpochSecret) -> None:
        """Their epochs, with all that they remember where they are held already, become the newest."""
        held = {epoch.configs: epoch for epoch in self._epochs}
        taken = [held.get(epoch.configs, epoch) for epoch in map(self._derive, secrets)]
        epochs = [*(epoch for epoch in self._epochs if epoch not in taken), *taken]
        self._given_up |= {epoch.configs: epoch.expires_at for epoch in epochs[:-_MAX_EPOCHS]}
        self._epochs = epochs[-_MAX_EPOCHS:]

    def rotate(self, now: float) -> bool:
        self._advance(now)
        before = self._published
        while self._due():
            if self._now >= self._following.until:  # it slept for longer than a chain goes on
                self._following = _another_chain(self._following.number, int(self._now), self.entropy)
                self._given_up[self._epochs[-1].configs] = self._epochs[-1].expires_at
                self._epochs = [*self._epochs[:-1], self._derive(self._following)]
            self._secret = self._following
            self._following = self._follow(self._secret)
            self._put_last(self._following)
        self._drop_dead()
        return self._published is not before

    def _begin(self) -> list[_Epoch]:
        return [self._derive(self._secret), self._derive(self._following)]

    @property
    def _published(self) -> _Epoch:
        return self._epochs[-2]

    def _due(self) -> bool:
        """Ahead of its time by one epoch at most: further the others could not follow."""
        is_ahead = self._now < self._secret.starts
        return self._now >= self._following.starts or (self._full(self._published) and not is_ahead)

    def _follow(self, secret: EpochSecret) -> EpochSecret:
        """The chain's next one; a new chain's where this replica gave that one up, for it forgot what it opened with it."""
        following = _after(secret, int(self._lifetime / 2), self.entropy)
        if self._given_up.get(epoch_configs(following), 0.0) <= self._now:
            return following
        return _another_chain(following.number, following.starts, self.entropy)

    def _derive(self, secret: EpochSecret) -> _Epoch:
        keys = _keys_of(secret)
        return self._epoch(secret.number, secret.starts, keys, secret.ehbp_key() if self._ehbp else None)


def _after(secret: EpochSecret, seconds: int, entropy: Entropy) -> EpochSecret:
    return secret.next(seconds) or _another_chain(secret.number + 1, secret.starts + seconds, entropy)


def _another_chain(number: int, starts: int, entropy: Entropy) -> EpochSecret:
    """With a number from there on that is drawn, so that two replicas' new chains seldom share key identifiers, and that is
    none of an epoch before it which still lives: no request need be tried with two keys of one replica's own."""
    return begin_chain(number + entropy(1)[0] % (_KEY_NUMBERS - _MAX_EPOCHS), starts, entropy)


def epoch_configs(secret: EpochSecret) -> tuple[KeyConfig, ...]:
    """What is published of the epoch that a group's secret is for."""
    return _configs(secret.number, _keys_of(secret))


def _keys_of(secret: EpochSecret) -> tuple[PrivateKey, ...]:
    return tuple(secret.key(kem_id) for kem_id in _KEMS_STRONGEST_FIRST)


def _configs(number: int, keys: tuple[PrivateKey, ...]) -> tuple[KeyConfig, ...]:
    return tuple(
        KeyConfig(
            2 * (number % _KEY_NUMBERS) + index,
            key.kem_id,
            key.public,
            tuple((KDF_HKDF_SHA256, aead_id) for aead_id in _OFFERED_AEADS[key.kem_id]),
        )
        for index, key in enumerate(keys)
    )


def _ehbp_config(key: PrivateKey) -> KeyConfig:
    """EHBP knows one suite and one key identifier (its SPEC.md, section 3.2)."""
    return KeyConfig(0, key.kem_id, key.public, ((KDF_HKDF_SHA256, AEAD_AES_256_GCM),))


def _unknown() -> KeyUnknown:
    return KeyUnknown(
        "The request is sealed to a key that this enclave does not hold.", hint="Verify the enclave again.", step="key"
    )
