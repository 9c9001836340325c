"""A key group: replicas that derive the same keys from one chain of secrets, and how one of them lets another in.

    secret        = 32 random bytes, drawn inside an enclave; the chain's next one = expand(secret, "ratchet")
    key of a KEM  = made from expand(secret, "key" || u16(KEM)); EHBP's from expand(secret, "ehbp")
    expand(s, w)  = HKDF-Expand-SHA256(s, LABEL || w, 32)                    LABEL = "cloister/group/v1" || 00

    join          = launch_sha256 || group_policy_sha256 || member's nonce || joiner's nonce          32 bytes each
    request       = u8(len word) || word || member's nonce || joiner's nonce || joiner's document
                    whose evidence is over SHA-256(LABEL || "request" || join)
    sealed        = enc || Seal(aad "", secrets)           HPKE base mode to the joiner's single-use key: X-Wing,
                    HKDF-SHA256, AES-256-GCM; info = LABEL || "secrets" || join || SHA-256(joiner's statement)
    admission     = joiner's nonce || u32(len sealed) || sealed || member's document
                    whose evidence is over SHA-256(LABEL || "admit" || join || SHA-256(joiner's statement) || SHA-256(sealed))
    word          = Ed25519(broker_key, LABEL || "authorise" || join || SHA-256(joiner's statement)); none where no broker is
    secrets       = { secret || u64(number) || u64(starts) || u64(until) } twice: of now, and of the time after

The hardware's own signature is over the sealed secrets: HPKE says nothing about who sealed, and anybody could have. No
enclave makes such evidence over a nonce that somebody else chose, so nobody's document can stand for another's.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloister.channel.hpke import (
    AEAD_AES_256_GCM,
    KEM_XWING,
    KEMS,
    Entropy,
    PrivateKey,
    X25519Key,
    broken,
    expand,
    generate,
    setup_receiver,
    setup_sender,
)
from cloister.errors import MalformedMessage, NotTrusted, WrongUse
from cloister.evidence.document import MAX_DOCUMENT
from cloister.evidence.strict_json import from_b64url
from cloister.verify import VerifiedPeer

__all__ = [
    "CHAIN_SECONDS",
    "MAX_MESSAGE",
    "NONCE",
    "Admission",
    "EpochSecret",
    "Join",
    "Request",
    "begin_chain",
    "check_word",
    "open_secrets",
    "parse_admission",
    "parse_request",
    "seal_secrets",
]

CHAIN_SECONDS = 86400
"""For how long one chain goes on: whoever learned a secret of it reads no further than this."""

NONCE = 32
MAX_MESSAGE = MAX_DOCUMENT + 4096
"""Bytes of a request or an admission."""

_LABEL = b"cloister/group/v1\0"
_SECRET, _WORD = 32, 64
_HANDED = 2
_ENCODED = _SECRET + 3 * 8


@dataclass(frozen=True, slots=True)
class EpochSecret:
    """What an epoch's keys are derived from, and with them those of all later ones of its chain.

    `number` names the epoch, `starts` is when it is first published, `until` when its chain ends (whole Unix seconds).
    """

    secret: bytes = field(repr=False)
    number: int
    starts: int
    until: int

    def __post_init__(self) -> None:
        if len(self.secret) != _SECRET or not self.starts < self.until <= self.starts + CHAIN_SECONDS:
            raise MalformedMessage("A group's secret is of the wrong size, or for the wrong time.", step="group")

    def next(self, seconds: int) -> "EpochSecret | None":
        """That of the epoch after this one, `seconds` later; None where the chain ends. It does not lead back to this one."""
        starts = self.starts + seconds
        if starts >= self.until:
            return None
        return EpochSecret(expand(self.secret, _LABEL + b"ratchet", _SECRET), self.number + 1, starts, self.until)

    def key(self, kem_id: int) -> PrivateKey:
        """The private key of this epoch for one KEM."""
        seed = expand(self.secret, _LABEL + b"key" + kem_id.to_bytes(2, "big"), _SECRET)
        return generate(kem_id, lambda _length: seed)

    def ehbp_key(self) -> PrivateKey:
        return X25519Key(expand(self.secret, _LABEL + b"ehbp", _SECRET))

    def encode(self) -> bytes:
        return self.secret + b"".join(value.to_bytes(8, "big") for value in (self.number, self.starts, self.until))


def begin_chain(number: int, starts: int, entropy: Entropy) -> EpochSecret:
    """The first secret of a new chain. `entropy` gives 32 bytes that nobody outside the enclave knows."""
    return EpochSecret(entropy(_SECRET), number, starts, starts + CHAIN_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """One join: into which group, and over which nonces. 32 raw bytes each."""

    launch_sha256: bytes
    group_policy_sha256: bytes
    member_nonce: bytes
    joiner_nonce: bytes

    def __post_init__(self) -> None:
        if any(len(part) != NONCE for part in self._parts()):
            raise WrongUse("A join's digests and nonces have 32 bytes.", step="group")

    def _parts(self) -> tuple[bytes, ...]:
        return self.launch_sha256, self.group_policy_sha256, self.member_nonce, self.joiner_nonce

    def _words(self, purpose: bytes, *more: bytes) -> bytes:
        return b"".join((_LABEL, purpose, *self._parts(), *more))

    @property
    def request_nonce(self) -> bytes:
        """What the joiner's evidence is over."""
        return hashlib.sha256(self._words(b"request")).digest()

    def admission_nonce(self, statement_sha256: bytes, sealed: bytes) -> bytes:
        """What the member's evidence is over: the joiner's statement and the sealed secrets among it."""
        return hashlib.sha256(self._words(b"admit", statement_sha256, hashlib.sha256(sealed).digest())).digest()

    def info(self, statement_sha256: bytes) -> bytes:
        """HPKE's `info`."""
        return self._words(b"secrets", statement_sha256)

    def authorisation(self, statement_sha256: bytes) -> bytes:
        """What a broker signs to let this joiner in."""
        return self._words(b"authorise", statement_sha256)


@dataclass(frozen=True, slots=True)
class Request:
    """A joiner's. `word`: the broker's signature, put in on the way; b"" without."""

    member_nonce: bytes
    joiner_nonce: bytes
    document: bytes
    word: bytes = b""

    def encode(self) -> bytes:
        return bytes([len(self.word)]) + self.word + self.member_nonce + self.joiner_nonce + self.document


@dataclass(frozen=True, slots=True)
class Admission:
    """A member's."""

    joiner_nonce: bytes
    sealed: bytes
    document: bytes

    def encode(self) -> bytes:
        return self.joiner_nonce + len(self.sealed).to_bytes(4, "big") + self.sealed + self.document


def parse_request(data: bytes) -> Request:
    """Its frame alone. Raises: MalformedMessage."""
    length = data[0] if data else -1
    document = 1 + length + 2 * NONCE
    if length not in (0, _WORD) or not document < len(data) <= MAX_MESSAGE:
        raise _malformed("request")
    word, rest = data[1 : 1 + length], data[1 + length :]
    return Request(rest[:NONCE], rest[NONCE : 2 * NONCE], rest[2 * NONCE :], word)


def parse_admission(data: bytes) -> Admission:
    """Its frame alone. Raises: MalformedMessage."""
    length = int.from_bytes(data[NONCE : NONCE + 4], "big")
    sealed, document = data[NONCE + 4 : NONCE + 4 + length], data[NONCE + 4 + length :]
    if not document or len(data) > MAX_MESSAGE:
        raise _malformed("admission")
    return Admission(data[:NONCE], sealed, document)


def _malformed(what: str) -> MalformedMessage:
    return MalformedMessage(f"This is no {what} of a key group.", step="group")


def seal_secrets(secrets: Sequence[EpochSecret], joiner: VerifiedPeer, join: Join, *, entropy: Entropy) -> bytes:
    """To the single-use key of a joiner that was verified over `join.request_nonce`.

    Raises: WrongUse for a peer that offers no such key; MalformedMessage for a key that is none.
    """
    if joiner.join_key is None:
        raise WrongUse("Who is a member already offers no key to be let in with.", step="group")
    info = join.info(bytes.fromhex(joiner.statement_sha256))
    enc, sealer = setup_sender(KEM_XWING, AEAD_AES_256_GCM, joiner.join_key, info, entropy=entropy)
    return enc + sealer.seal(b"", b"".join(secret.encode() for secret in secrets))


def open_secrets(
    sealed: bytes, key: PrivateKey, join: Join, statement_sha256: bytes
) -> tuple[EpochSecret, EpochSecret]:
    """The secrets of now and of the time after. `statement_sha256`: of the joiner's own statement, which offered `key`.

    That they open says nothing about who sealed them: the member's evidence over `join.admission_nonce` does.

    Raises: ChannelBroken; MalformedMessage for something else than two secrets.
    """
    length = KEMS[KEM_XWING].enc_length
    if len(sealed) < length:
        raise broken()
    opener = setup_receiver(key, AEAD_AES_256_GCM, sealed[:length], join.info(statement_sha256))
    content = opener.open(b"", sealed[length:])
    if len(content) != _HANDED * _ENCODED:
        raise MalformedMessage("A group's secrets come in twos.", step="group")
    return _decode(content[:_ENCODED]), _decode(content[_ENCODED:])


def _decode(data: bytes) -> EpochSecret:
    numbers = [int.from_bytes(data[at : at + 8], "big") for at in range(_SECRET, _ENCODED, 8)]
    return EpochSecret(data[:_SECRET], *numbers)


def check_word(word: bytes, join: Join, statement_sha256: bytes, broker_key: str) -> None:
    """Whether the broker lets this joiner in, by this member, over these nonces. `broker_key` as in a policy.

    Raises: NotTrusted.
    """
    public = Ed25519PublicKey.from_public_bytes(from_b64url(broker_key.removeprefix("ed25519:"), what="broker_key"))
    try:
        public.verify(word, join.authorisation(statement_sha256))
    except InvalidSignature as error:
        raise NotTrusted(
            "The group's broker has not authorised this join.",
            step="broker",
            expected=broker_key,
            got="another word" if word else "no word",
            hint="`cloister broker join` carries a join and authorises it.",
        ) from error
