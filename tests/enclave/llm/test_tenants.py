import hashlib
from base64 import urlsafe_b64encode

import pytest
from starlette.datastructures import Headers

from cloister.enclave.llm.envelope import Refused
from cloister.enclave.llm.tenants import ApiKey, Principal, Tenants, cache_scope, new_key
from cloister.errors import Unauthorized, WrongUse


def secret(byte: int) -> Headers:
    return Headers({"cloister-cache-secret": urlsafe_b64encode(bytes([byte]) * 32).decode().rstrip("=")})


def test_new_keys_are_recognisable_and_differ() -> None:
    (plain, digest), (other, _) = new_key(), new_key()
    assert plain.startswith("ck-")
    assert len(plain) == 46
    assert plain != other
    assert digest == hashlib.sha256(plain.encode()).hexdigest()


def test_each_key_is_its_own_principal() -> None:
    (ann, ann_hash), (bob, bob_hash) = new_key(), new_key()
    tenants = Tenants((ApiKey("ann", ann_hash), ApiKey("bob", bob_hash)), require_keys=True)
    assert tenants.identify(Headers({"authorization": f"Bearer {ann}"})) == Principal("ann", bytes.fromhex(ann_hash))
    assert tenants.identify(Headers({"authorization": f"bearer  {bob} "})).name == "bob"
    assert tenants.identify(Headers({"x-api-key": bob})).name == "bob"


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer "}, {"authorization": "Bearer ck-x"}, {"x-api-key": ""}, {"x-api-key": "\xff"}],
)
def test_others_are_unauthorized(headers: dict[str, str]) -> None:
    tenants = Tenants((ApiKey("ann", new_key()[1]),), require_keys=False)
    with pytest.raises(Unauthorized):
        tenants.identify(Headers(headers))


def test_the_hash_of_a_key_is_not_the_key() -> None:
    _, digest = new_key()
    with pytest.raises(Unauthorized):
        Tenants((ApiKey("ann", digest),), require_keys=True).identify(Headers({"x-api-key": digest}))


@pytest.mark.parametrize("digest", ["", "ab", "AB" * 32, "zz" * 32, "ab" * 33])
def test_only_digests_are_configured(digest: str) -> None:
    with pytest.raises(WrongUse):
        ApiKey("ann", digest)


def test_scopes_differ_by_key_and_by_secret() -> None:
    ann, bob = Principal("ann", b"\x01" * 32), Principal("bob", b"\x02" * 32)
    pairs = [(who, what) for who in (ann, bob, Principal()) for what in (1, 2)]
    scopes = [cache_scope(secret(what), who) for who, what in pairs]
    assert len(set(scopes)) == 6
    assert scopes == [cache_scope(secret(what), who) for who, what in pairs]
    assert (
        cache_scope(secret(1), ann)
        == hashlib.sha256(
            b"cloister/cache-scope/v1\0" + b"\0\0\0\x20" + b"\x01" * 32 + b"\0\0\0\x20" + b"\x01" * 32
        ).digest()
    )


def test_without_a_secret_nothing_is_reused() -> None:
    assert cache_scope(Headers({}), Principal("ann", b"\x01" * 32)) is None


@pytest.mark.parametrize("value", ["", "A" * 42, "A" * 44, "A" * 42 + "+", "A" * 43 + "==", " " + "A" * 43])
def test_a_malformed_secret_is_refused(value: str) -> None:
    with pytest.raises(Refused) as caught:
        cache_scope(Headers({"cloister-cache-secret": value}), Principal())
    assert caught.value.status == 400


def test_two_secrets_are_refused() -> None:
    raw = [(b"cloister-cache-secret", b"A" * 43), (b"cloister-cache-secret", b"B" * 43)]
    with pytest.raises(Refused):
        cache_scope(Headers(raw=raw), Principal())
