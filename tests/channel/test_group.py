import contextlib
import hashlib
import hmac
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from tests.verify.world import NONCE, NOW, World, make_device

from cloister.channel.group import (
    CHAIN_SECONDS,
    Admission,
    EpochSecret,
    Join,
    Request,
    begin_chain,
    check_word,
    open_secrets,
    parse_admission,
    parse_request,
    seal_secrets,
)
from cloister.channel.hpke import KEM_X25519, KEM_XWING, PrivateKey, X25519Key, XWingKey, generate
from cloister.errors import ChannelBroken, CloisterError, MalformedMessage, NotTrusted, WrongUse
from cloister.evidence.strict_json import b64url
from cloister.verify import VerifiedPeer, verify

SECRET = EpochSecret(bytes(range(32)), 7, 1_800_000_000, 1_800_000_000 + CHAIN_SECONDS)
AFTER = SECRET.next(1800)
LABEL = b"cloister/group/v1\0"
JOIN = Join(launch_sha256=b"l" * 32, group_policy_sha256=b"p" * 32, member_nonce=b"m" * 32, joiner_nonce=b"j" * 32)
BROKER = Ed25519PrivateKey.generate()
BROKER_NAME = "ed25519:" + b64url(BROKER.public_key().public_bytes_raw())


def derived(secret: bytes, word: bytes) -> bytes:
    """HKDF-Expand of 32 bytes (RFC 5869, section 2.3) in another hand than the code's."""
    return hmac.new(secret, LABEL + word + b"\1", "sha256").digest()


# Secrets and keys


def test_a_chain_and_its_keys_are_derived_as_written_down() -> None:
    assert AFTER is not None
    assert AFTER.secret == derived(SECRET.secret, b"ratchet")
    assert (AFTER.number, AFTER.starts, AFTER.until) == (8, SECRET.starts + 1800, SECRET.until)
    xwing, x25519 = SECRET.key(KEM_XWING), SECRET.key(KEM_X25519)
    assert xwing.public == XWingKey(derived(SECRET.secret, b"key\x64\x7a")).public
    assert x25519.public == X25519Key(derived(SECRET.secret, b"key\x00\x20")).public
    assert SECRET.ehbp_key().public == X25519Key(derived(SECRET.secret, b"ehbp")).public
    assert AFTER.secret.hex() == "bc2183c3731b4836270573e0dc3f8996c3990a97f1e201b6cecc3f5c6a33e11e"
    assert x25519.public.hex() == "e6a7ea9c47c7b0bef57d24cdaf876373eecd01693eb596816408fea02c852f28"


def test_a_chain_ends_after_a_day() -> None:
    at: EpochSecret | None = begin_chain(0, 1_800_000_000, os.urandom)
    seen = []
    while at is not None:
        seen.append(at)
        at = at.next(1800)
    assert len(seen) == 48
    assert len({one.secret for one in seen}) == 48
    assert seen[-1].starts == 1_800_000_000 + CHAIN_SECONDS - 1800


@pytest.mark.parametrize(
    "change",
    [{"secret": bytes(31)}, {"starts": 1_800_000_000 + CHAIN_SECONDS}, {"until": 1_800_000_001 + CHAIN_SECONDS}],
    ids=str,
)
def test_a_secret_for_the_wrong_time_or_of_the_wrong_size_is_none(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage):
        replace(SECRET, **change)


def test_a_secret_is_in_no_text_about_it() -> None:
    assert SECRET.secret.hex() not in repr(SECRET)
    assert repr(SECRET.secret) not in repr(SECRET)


# What evidence is over


def test_nonces_bind_the_group_both_ends_and_what_is_sealed() -> None:
    parts = b"l" * 32 + b"p" * 32 + b"m" * 32 + b"j" * 32
    statement, sealed = b"s" * 32, b"sealed"
    assert JOIN.request_nonce == hashlib.sha256(LABEL + b"request" + parts).digest()
    told = LABEL + b"admit" + parts + statement + hashlib.sha256(sealed).digest()
    assert JOIN.admission_nonce(statement, sealed) == hashlib.sha256(told).digest()
    assert JOIN.authorisation(statement) == LABEL + b"authorise" + parts + statement


@pytest.mark.parametrize("name", ["launch_sha256", "group_policy_sha256", "member_nonce", "joiner_nonce"])
def test_a_join_is_made_of_32_bytes_each(name: str) -> None:
    with pytest.raises(WrongUse):
        replace(JOIN, **{name: bytes(31)})


# Messages


def test_messages_come_back_as_they_were() -> None:
    for request in (Request(b"m" * 32, b"j" * 32, b"{}"), Request(b"m" * 32, b"j" * 32, b"{}", bytes(64))):
        assert parse_request(request.encode()) == request
    admission = Admission(b"j" * 32, b"sealed", b"{}")
    assert parse_admission(admission.encode()) == admission


def test_what_is_cut_or_framed_otherwise_is_no_message() -> None:
    request = Request(b"m" * 32, b"j" * 32, b"{}", bytes(64)).encode()
    admission = Admission(b"j" * 32, b"sealed", b"{}").encode()
    for cut in range(1 + 64 + 64):
        with pytest.raises(MalformedMessage):
            parse_request(request[: cut + 1])
    with pytest.raises(MalformedMessage):
        parse_request(b"\x20" + request[1:])
    for cut in range(32 + 4 + 6):
        with pytest.raises(MalformedMessage):
            parse_admission(admission[: cut + 1])


@given(st.binary(max_size=300))
def test_parsing_raises_nothing_foreign(data: bytes) -> None:
    for parse in (parse_request, parse_admission):
        with contextlib.suppress(CloisterError):
            parse(data)


# The sealed secrets


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield World(make_device(Path(tmp_path_factory.mktemp("group"))))


def peer(world: World, key: PrivateKey | None) -> VerifiedPeer:
    """A joiner with that key, or a member."""
    keys = {} if key is None else {"ohttp_keys": b"", "provision_key": key.public}
    one = world.with_statement(purpose="key-join", key_scope="group", group_policy_sha256="77" * 32, **keys)
    return verify(one.document(), policy=one.policy(), nonce=NONCE, now=NOW, purpose="key-join")


def test_the_joiner_alone_opens_the_secrets_and_for_this_join_alone(world: World) -> None:
    assert AFTER is not None
    key, other = generate(KEM_XWING, os.urandom), generate(KEM_XWING, os.urandom)
    joiner = peer(world, key)
    statement = bytes.fromhex(joiner.statement_sha256)
    sealed = seal_secrets((SECRET, AFTER), joiner, JOIN, entropy=os.urandom)
    assert SECRET.secret not in sealed
    assert open_secrets(sealed, key, JOIN, statement) == (SECRET, AFTER)
    with pytest.raises(ChannelBroken):
        open_secrets(sealed, other, JOIN, statement)
    with pytest.raises(ChannelBroken):
        open_secrets(sealed, key, JOIN, bytes(32))
    for name in ("launch_sha256", "group_policy_sha256", "member_nonce", "joiner_nonce"):
        with pytest.raises(ChannelBroken):
            open_secrets(sealed, key, replace(JOIN, **{name: bytes(32)}), statement)
    for at in (0, 500, 1120, len(sealed) - 1):
        flipped = sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]
        with pytest.raises(ChannelBroken):
            open_secrets(flipped, key, JOIN, statement)
    for cut in (0, 100, 1120, len(sealed) - 1):
        with pytest.raises(ChannelBroken):
            open_secrets(sealed[:cut], key, JOIN, statement)


def test_one_secret_or_three_are_no_groups(world: World) -> None:
    key = generate(KEM_XWING, os.urandom)
    joiner = peer(world, key)
    for count in (1, 3):
        sealed = seal_secrets((SECRET,) * count, joiner, JOIN, entropy=os.urandom)
        with pytest.raises(MalformedMessage):
            open_secrets(sealed, key, JOIN, bytes.fromhex(joiner.statement_sha256))


def test_nothing_is_sealed_to_a_member(world: World) -> None:
    with pytest.raises(WrongUse):
        seal_secrets((SECRET, SECRET), peer(world, None), JOIN, entropy=os.urandom)


# The broker's word


def test_a_word_is_the_brokers_and_for_one_join_of_one_replica() -> None:
    word = BROKER.sign(JOIN.authorisation(b"s" * 32))
    check_word(word, JOIN, b"s" * 32, BROKER_NAME)
    other = Ed25519PrivateKey.generate().sign(JOIN.authorisation(b"s" * 32))
    for bad, join, statement in (
        (other, JOIN, b"s" * 32),
        (b"", JOIN, b"s" * 32),
        (bytes(64), JOIN, b"s" * 32),
        (word, JOIN, b"t" * 32),
        *((word, replace(JOIN, **{name: bytes(32)}), b"s" * 32) for name in ("launch_sha256", "group_policy_sha256")),
        *((word, replace(JOIN, **{name: bytes(32)}), b"s" * 32) for name in ("member_nonce", "joiner_nonce")),
    ):
        with pytest.raises(NotTrusted) as caught:
            check_word(bad, join, statement, BROKER_NAME)
        assert caught.value.step == "broker"
