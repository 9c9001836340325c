"""The owner's verification: of an enclave that waits, with one key for one release, and nobody else's."""

from dataclasses import replace

import pytest
from tests.verify.world import KEY_CONFIG, NONCE, NOW, World, failures

from cloister.channel.bhttp import Request
from cloister.channel.ohttp import seal_request
from cloister.errors import NotTrusted, VerificationFailed, WrongUse
from cloister.verify import Verified, VerifiedProvision, verify
from cloister.verify.key_configs import X_WING_PUBLIC

KEY = bytes(X_WING_PUBLIC)


def waiting(world: World, **changes: object) -> World:
    fields = {"purpose": "provision", "ohttp_keys": b"", "provision_key": KEY, "models": (), **changes}
    return world.with_statement(**fields)


def provision(world: World, *, nonce: bytes = NONCE) -> VerifiedProvision:
    return verify(world.document(), policy=world.policy(), nonce=nonce, now=NOW, purpose="provision")


def test_an_enclave_that_waits_for_its_owner_verifies(world: World) -> None:
    verified = provision(waiting(world))
    assert verified.provision_key == KEY
    assert verified.ohttp_keys == b""
    assert not isinstance(verified, Verified)


def test_a_client_refuses_an_enclave_that_waits(world: World) -> None:
    with pytest.raises(VerificationFailed) as caught:
        waiting(world).verify()
    assert "purpose" in failures(caught.value)


def test_an_owner_refuses_an_enclave_that_serves(world: World) -> None:
    with pytest.raises(VerificationFailed) as caught:
        provision(world.with_statement(provision_key=KEY, ohttp_keys=b""))
    assert set(failures(caught.value)) == {"purpose"}


@pytest.mark.parametrize("key", [None, bytes(32), bytes(X_WING_PUBLIC - 1), bytes(X_WING_PUBLIC + 1)])
def test_a_provision_key_must_be_there_and_post_quantum(world: World, key: bytes | None) -> None:
    with pytest.raises(VerificationFailed) as caught:
        provision(waiting(world, provision_key=key))
    assert set(failures(caught.value)) == {"keys"}


def test_an_enclave_that_waits_offers_no_keys_to_clients(world: World) -> None:
    with pytest.raises(VerificationFailed) as caught:
        provision(waiting(world, ohttp_keys=KEY_CONFIG))
    assert set(failures(caught.value)) == {"keys"}


def test_an_enclave_that_waits_may_say_that_it_will_end_tls_and_has_no_key_for_it_yet(world: World) -> None:
    tolerant = replace(world, pins={"tolerate_insecure": frozenset({"tls"})})
    assert provision(waiting(tolerant, insecure=("tls",))).statement.tls_spki is None
    with pytest.raises(VerificationFailed) as caught:
        provision(waiting(world, tls_spki="ff" * 32))
    assert set(failures(caught.value)) == {"statement.tls"}


def test_everything_else_is_judged_as_for_a_client(world: World) -> None:
    other = waiting(world)
    with pytest.raises(VerificationFailed) as caught:
        provision(other, nonce=bytes(32))
    assert "binding" in failures(caught.value)
    with pytest.raises(VerificationFailed) as caught:
        provision(replace(other, pins={"deployment": "another"}))
    assert set(failures(caught.value)) == {"deployment"}


def test_no_request_is_sealed_to_an_enclave_that_waits(world: World) -> None:
    request = Request("GET", "https", "enclave.invalid", "/", (), b"")
    with pytest.raises(NotTrusted):
        seal_request(provision(waiting(world)), request)  # type: ignore[arg-type]


def test_only_verify_makes_one(world: World) -> None:
    verified = provision(waiting(world))
    fields = {name: getattr(verified, name) for name in verified.__dataclass_fields__ if name != "made_by"}
    with pytest.raises(WrongUse, match="VerifiedProvision"):
        VerifiedProvision(**fields, made_by=object())
