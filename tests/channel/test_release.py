import hashlib
import os
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.channel.hpke import KEM_XWING, generate
from cloister.channel.release import (
    PROVISION_KEY,
    ApiKeyHash,
    Context,
    Release,
    nonce_of,
    open_release,
    parse_release,
    seal_release,
)
from cloister.errors import ChannelBroken, CloisterError, MalformedEvidence, NotTrusted
from cloister.evidence.strict_json import b64url

KEY = generate(KEM_XWING, os.urandom)
OWNER = Ed25519PrivateKey.generate()
CONTEXT = Context(
    deployment="acme", launch_sha256=b"l" * 32, release=7, statement_sha256=b"s" * 32, nonce=bytes(range(32))
)
RELEASE = Release(
    time_floor=1_800_000_000,
    expires=1_800_003_600,
    keys={"code": bytes(32)},
    secrets={"API_TOKEN": "väl\nue"},
    settings={"GREETING": ""},
    api_keys=(ApiKeyHash("alice", "ab" * 32),),
)


def name_of(owner: Ed25519PrivateKey) -> str:
    return "ed25519:" + b64url(owner.public_key().public_bytes_raw())


def sealed(context: Context = CONTEXT, owner: Ed25519PrivateKey = OWNER) -> bytes:
    return seal_release(RELEASE, context, KEY.public, owner.sign, entropy=os.urandom)


def opened(message: bytes, context: Context = CONTEXT) -> Release:
    return open_release(message, context, KEY, name_of(OWNER))


def test_a_release_arrives_whole() -> None:
    message = sealed()
    assert nonce_of(message) == CONTEXT.nonce
    assert opened(message) == RELEASE
    assert len(KEY.public) == PROVISION_KEY


def test_nothing_of_it_can_be_read_on_the_way() -> None:
    message = sealed()
    assert b"API_TOKEN" not in message
    assert b64url("väl\nue".encode()).encode() not in message


@pytest.mark.parametrize(
    "other",
    [
        {"deployment": "acme2"},
        {"launch_sha256": b"L" * 32},
        {"release": 8},
        {"statement_sha256": b"S" * 32},
        {"nonce": bytes(32)},
        {"purpose": "serve"},
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_release_for_another_context_is_not_the_owners_word(other: dict[str, object]) -> None:
    with pytest.raises(NotTrusted, match="not its owner's"):
        opened(sealed(replace(CONTEXT, **other)))  # type: ignore[arg-type]


def test_another_owners_release_is_refused_before_it_is_opened() -> None:
    with pytest.raises(NotTrusted, match="not its owner's"):
        opened(sealed(owner=Ed25519PrivateKey.generate()))


def test_the_broker_that_the_launch_config_names_may_sign_too_and_no_other() -> None:
    broker = Ed25519PrivateKey.generate()
    for signer in (OWNER, broker):
        assert open_release(sealed(owner=signer), CONTEXT, KEY, name_of(OWNER), name_of(broker)) == RELEASE
    with pytest.raises(NotTrusted, match="not its owner's"):
        opened(sealed(owner=broker))
    with pytest.raises(NotTrusted, match="not its owner's"):
        open_release(sealed(owner=Ed25519PrivateKey.generate()), CONTEXT, KEY, name_of(OWNER), name_of(broker))


def test_another_text_beside_the_owners_signature_is_refused() -> None:
    """HPKE alone lets anybody seal."""
    genuine, strangers = sealed(), sealed(owner=Ed25519PrivateKey.generate())
    with pytest.raises(NotTrusted):
        opened(genuine[:96] + strangers[96:])


def test_another_enclaves_key_does_not_open_it() -> None:
    with pytest.raises(ChannelBroken):
        open_release(sealed(), CONTEXT, generate(KEM_XWING, os.urandom), name_of(OWNER))


def test_no_bit_may_be_another_and_nothing_be_missing() -> None:
    message = sealed()
    for at in [*range(0, 64, 5), *range(96, len(message), 97)]:  # the nonce is judged by its context
        with pytest.raises(NotTrusted):
            opened(message[:at] + bytes([message[at] ^ 4]) + message[at + 1 :])
    for length in (0, 63, 64, 95, 96, 200, len(message) - 1):
        with pytest.raises(CloisterError):
            opened(message[:length])


def test_the_owners_own_short_message_does_not_open() -> None:
    info = CONTEXT.encode()
    message = OWNER.sign(info + hashlib.sha256(b"short").digest()) + CONTEXT.nonce + b"short"
    with pytest.raises(ChannelBroken):
        opened(message)


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b'{"v":2}',
        RELEASE.encode().replace(b'"GREETING"', b'"GRE TING"'),
        RELEASE.encode().replace(b'"code"', b'"cade"'),
        RELEASE.encode().replace(b'"keys"', b'"kays"'),
        RELEASE.encode().replace(b64url(bytes(32)).encode(), b64url(bytes(31)).encode()),
        RELEASE.encode().replace(b64url("väl\nue".encode()).encode(), b64url(b"\xff").encode()),
        RELEASE.encode().replace(b64url("väl\nue".encode()).encode(), b64url(b"a\0b").encode()),
    ],
)
def test_what_is_no_release_is_refused_without_its_values(content: bytes) -> None:
    assert parse_release(RELEASE.encode()) == RELEASE
    with pytest.raises(MalformedEvidence) as caught:
        parse_release(content)
    assert b64url("väl\nue".encode()) not in str(caught.value)


def test_a_release_shows_no_value() -> None:
    assert "API_TOKEN" not in repr(RELEASE)
