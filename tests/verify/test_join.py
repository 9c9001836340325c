"""How replicas of a key group judge each other: one that asks to be let in offers one key, a member the group's."""

from dataclasses import replace
from typing import Any

import pytest
from tests.verify.world import KEY_CONFIG, NONCE, NOW, World, failures

from cloister.errors import VerificationFailed
from cloister.verify import Verified, VerifiedPeer, VerifiedProvision, verify
from cloister.verify.key_configs import X_WING_PUBLIC

KEY = bytes(X_WING_PUBLIC)
GROUP: dict[str, Any] = {"purpose": "key-join", "key_scope": "group", "group_policy_sha256": "77" * 32, "models": ()}


def joiner(world: World, **changes: Any) -> World:
    return world.with_statement(**{**GROUP, "ohttp_keys": b"", "provision_key": KEY, **changes})


def member(world: World, **changes: Any) -> World:
    return world.with_statement(**{**GROUP, **changes})


def judge(world: World, *, nonce: bytes = NONCE, **pins: Any) -> VerifiedPeer:
    return verify(world.document(), policy=world.policy(**pins), nonce=nonce, now=NOW, purpose="key-join")


def test_a_joiner_and_a_member_verify_and_are_told_apart(world: World) -> None:
    asks, lets_in = judge(joiner(world)), judge(member(world))
    assert (asks.join_key, asks.ohttp_keys) == (KEY, b"")
    assert (lets_in.join_key, lets_in.ohttp_keys) == (None, KEY_CONFIG * 2)
    assert not isinstance(asks, Verified | VerifiedProvision)


@pytest.mark.parametrize("purpose", ["serve", "provision"])
def test_neither_clients_nor_owners_take_it_for_theirs_nor_it_theirs(world: World, purpose: Any) -> None:
    for one in (joiner(world), member(world)):
        with pytest.raises(VerificationFailed) as caught:
            verify(one.document(), policy=one.policy(), nonce=NONCE, now=NOW, purpose=purpose)
        assert "purpose" in failures(caught.value)
    other = joiner(world, purpose=purpose) if purpose == "provision" else member(world, purpose=purpose)
    with pytest.raises(VerificationFailed) as caught:
        judge(other)
    assert set(failures(caught.value)) == {"purpose"}


def test_a_key_to_be_let_in_with_means_nothing_to_a_client(world: World) -> None:
    assert world.with_statement(provision_key=KEY).verify().ohttp_keys == KEY_CONFIG * 2


@pytest.mark.parametrize("key", [bytes(32), bytes(X_WING_PUBLIC - 1), bytes(X_WING_PUBLIC + 1)])
def test_a_joiners_key_must_be_post_quantum(world: World, key: bytes) -> None:
    with pytest.raises(VerificationFailed) as caught:
        judge(joiner(world, provision_key=key))
    assert set(failures(caught.value)) == {"keys"}


def test_nobody_is_both(world: World) -> None:
    with pytest.raises(VerificationFailed) as caught:
        judge(joiner(world, ohttp_keys=KEY_CONFIG))
    assert set(failures(caught.value)) == {"keys"}


@pytest.mark.parametrize("keys", [b"", KEY_CONFIG[:-1]])
def test_a_member_names_its_keys(world: World, keys: bytes) -> None:
    with pytest.raises(VerificationFailed) as caught:
        judge(member(world, ohttp_keys=keys))
    assert set(failures(caught.value)) == {"keys"}


@pytest.mark.parametrize(
    "change", [{"key_scope": "replica"}, {"group_policy_sha256": None}], ids=["a policy alone", "a scope alone"]
)
def test_whether_keys_are_shared_and_by_which_policy_go_together(world: World, change: dict[str, Any]) -> None:
    with pytest.raises(VerificationFailed) as caught:
        judge(member(world, **change))
    assert set(failures(caught.value)) == {"statement.group"}


def test_a_client_is_told_that_keys_are_shared_and_by_which_policy(world: World) -> None:
    shared = world.with_statement(key_scope="group", group_policy_sha256="77" * 32)
    told = {factor.step: factor for factor in shared.verify().factors}
    assert (told["key-scope"].verdict, told["key-scope"].got) == ("not-checked", "77" * 32)
    assert told["statement.group"].verdict == "pass"
    replace(shared, pins={"config": None}).verify()  # a simulator's: nothing need be named there
    assert not {"key-scope", "statement.group"} & {factor.step for factor in world.verify().factors}


def test_everything_else_is_judged_as_for_a_client(world: World) -> None:
    for one in (joiner(world), member(world)):
        with pytest.raises(VerificationFailed) as caught:
            judge(one, nonce=bytes(32))
        assert set(failures(caught.value)) == {"binding"}
        with pytest.raises(VerificationFailed) as caught:
            judge(one, deployment="another")
        assert set(failures(caught.value)) == {"deployment"}
