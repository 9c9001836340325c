import contextlib
import hashlib
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.channel.vectors import OHTTP

from cloister.channel.hpke import KEM_X25519, KEM_XWING, Entropy
from cloister.channel.keys import (
    GroupRing,
    KeyConfig,
    KeyRing,
    ReceiverKey,
    choose,
    encode_configs,
    epoch_configs,
    parse_configs,
    replica_of,
)
from cloister.errors import CloisterError, KeyUnknown, MalformedMessage, NotTrusted, Replayed

XWING_CONFIG = KeyConfig(0, KEM_XWING, b"x" * 1216, ((1, 2),))
X25519_CONFIG = KeyConfig(1, KEM_X25519, b"y" * 32, ((1, 2), (1, 1), (1, 3)))


def find(ring: KeyRing, now: float, *, index: int = 0, keys: bytes | None = None) -> ReceiverKey:
    config = parse_configs(ring.ohttp_keys if keys is None else keys)[index]
    return next(
        key for key in ring.find(config.key_id, config.kem_id, 1, 2, now) if key.private.public == config.public
    )


def from_epoch(number: int) -> Entropy:
    return lambda length: bytes([number]) if length == 1 else os.urandom(length)


def ring_from(epoch: int) -> KeyRing:
    return KeyRing(0.0, entropy=from_epoch(epoch))


def test_reads_and_writes_rfc9458s_config() -> None:
    encoded = bytes.fromhex(OHTTP["config"])
    (config,) = parse_configs(len(encoded).to_bytes(2, "big") + encoded)
    assert (config.key_id, config.kem_id, config.suites) == (1, KEM_X25519, ((1, 1), (1, 3)))
    assert config.encode() == encoded


def test_an_unknown_kem_is_passed_over() -> None:
    unknown = b"\x07\x99\x99whatever"
    data = len(unknown).to_bytes(2, "big") + unknown + encode_configs([X25519_CONFIG])
    assert parse_configs(data) == (X25519_CONFIG,)


def test_rejects_configs_cut_anywhere_or_too_long() -> None:
    data = encode_configs([XWING_CONFIG, X25519_CONFIG])
    middle = 2 + len(XWING_CONFIG.encode())
    for cut in range(1, len(data)):
        if cut != middle:
            with pytest.raises(MalformedMessage):
                parse_configs(data[:cut])
    with pytest.raises(MalformedMessage):
        parse_configs(data + b"\0")
    odd = X25519_CONFIG.encode()[:37].replace(b"\x00\x0c", b"\x00\x03") + b"abc"
    with pytest.raises(MalformedMessage):
        parse_configs(len(odd).to_bytes(2, "big") + odd)


@given(st.binary(max_size=200))
def test_parsing_configs_raises_nothing_foreign(data: bytes) -> None:
    with contextlib.suppress(CloisterError):
        parse_configs(data)


@pytest.mark.parametrize("offer", [(XWING_CONFIG, X25519_CONFIG), (X25519_CONFIG, XWING_CONFIG)])
def test_the_client_takes_the_strongest_in_whatever_order(offer: tuple[KeyConfig, ...]) -> None:
    assert choose(offer) == (XWING_CONFIG, 2)


def test_the_client_falls_back_unless_it_requires_post_quantum() -> None:
    assert choose([X25519_CONFIG]) == (X25519_CONFIG, 2)
    with pytest.raises(NotTrusted):
        choose([X25519_CONFIG], require_pq=True)
    with pytest.raises(NotTrusted):
        choose([KeyConfig(1, KEM_X25519, b"y" * 32, ((2, 2), (1, 9)))])


def test_publishes_xwing_first_with_ids_of_the_epoch() -> None:
    ring = ring_from(7)
    seen = []
    for turn in range(130):
        configs = parse_configs(ring.ohttp_keys)
        assert [config.kem_id for config in configs] == [KEM_XWING, KEM_X25519]
        epoch = (7 + turn) % 128
        assert [config.key_id for config in configs] == [2 * epoch, 2 * epoch + 1]
        seen.append(ring.ohttp_keys)
        assert ring.rotate(1800.0 * (turn + 1))
    assert len(set(seen)) == 130


def test_replica_is_the_start_of_the_keys_digest() -> None:
    assert replica_of(b"keys") == hashlib.sha256(b"keys").hexdigest()[:16]


def test_an_old_key_opens_until_it_expires_and_no_longer() -> None:
    ring = KeyRing(0.0, lifetime=100.0)
    old = ring.ohttp_keys
    assert not ring.rotate(49.9)
    assert ring.rotate(50.0)
    assert ring.ohttp_keys != old
    assert ring.expires_at == 150.0
    key = find(ring, 99.9, keys=old)
    with pytest.raises(KeyUnknown):
        find(ring, 100.0, keys=old)
    with pytest.raises(KeyUnknown):
        ring.remember(key, b"enc", 100.0)
    find(ring, 100.0)


def test_a_long_sleep_leaves_only_new_keys() -> None:
    ring = KeyRing(0.0, lifetime=100.0)
    old = ring.ohttp_keys
    assert ring.rotate(1e6)
    with pytest.raises(KeyUnknown):
        find(ring, 1e6, keys=old)
    find(ring, 1e6)


def test_time_never_runs_backwards() -> None:
    ring = KeyRing(0.0, lifetime=100.0)
    old = ring.ohttp_keys
    with pytest.raises(KeyUnknown):
        find(ring, 100.0)
    with pytest.raises(KeyUnknown):
        find(ring, 0.0)
    assert ring.rotate(0.0)
    assert ring.expires_at == 200.0
    assert ring.ohttp_keys != old


def test_a_replay_is_refused_until_the_key_dies() -> None:
    ring = KeyRing(0.0, lifetime=100.0)
    keys = ring.ohttp_keys
    ring.remember(find(ring, 0.0), b"enc", 0.0)
    ring.rotate(60.0)
    for now in (0.0, 60.0, 99.0):
        with pytest.raises(Replayed):
            ring.remember(find(ring, now, keys=keys), b"enc", now)
    with pytest.raises(Replayed):
        ring.remember(find(ring, 99.0, keys=keys, index=1), b"enc", 99.0)


def test_a_full_memory_stops_the_key_and_forces_rotation() -> None:
    ring = KeyRing(0.0, max_requests=3)
    keys = ring.ohttp_keys
    late = find(ring, 0.0)
    for number in range(3):
        assert not ring.rotate(0.0)
        ring.remember(find(ring, 0.0), bytes([number]), 0.0)
    with pytest.raises(KeyUnknown):
        ring.remember(late, b"one more", 0.0)
    with pytest.raises(Replayed):
        ring.remember(late, b"\0", 0.0)
    assert ring.rotate(0.0)
    with pytest.raises(KeyUnknown):
        find(ring, 0.0, keys=keys)
    find(ring, 0.0)


def test_epochs_ended_by_count_do_not_pile_up() -> None:
    ring = KeyRing(0.0, max_requests=1)
    for number in range(10):
        ring.remember(find(ring, 0.0), bytes([number]), 0.0)
        ring.rotate(0.0)
    assert len(ring._epochs) <= 4


def test_a_restarted_ring_does_not_know_what_was_sealed_to_the_last_one() -> None:
    before, after = ring_from(7), ring_from(8)
    with pytest.raises(KeyUnknown):
        find(after, 0.0, keys=before.ohttp_keys)
    assert len({parse_configs(KeyRing(0.0).ohttp_keys)[0].key_id for _ in range(20)}) > 1


def test_unknown_ids_and_algorithms_are_unknown_keys() -> None:
    ring = ring_from(0)
    ring.find(0, KEM_XWING, 1, 2, 0.0)
    ring.find(1, KEM_X25519, 1, 3, 0.0)
    for header in [
        (2, KEM_XWING, 1, 2),
        (0, KEM_X25519, 1, 2),
        (0, KEM_XWING, 1, 1),
        (1, KEM_X25519, 2, 2),
        (1, 16, 1, 2),
    ]:
        with pytest.raises(KeyUnknown):
            ring.find(*header, 0.0)


def test_all_randomness_enters_through_entropy() -> None:
    drawn = []

    def entropy(length: int) -> bytes:
        drawn.append(length)
        return bytes([len(drawn)]) * length

    ring = KeyRing(0.0, entropy=entropy)
    assert drawn == [1, 32, 32]
    drawn.clear()
    assert KeyRing(0.0, entropy=entropy).ohttp_keys == ring.ohttp_keys
    assert KeyRing(0.0, entropy=os.urandom).ohttp_keys != ring.ohttp_keys


def test_a_ring_has_no_key_for_ehbp_unless_asked() -> None:
    ring = KeyRing(0.0)
    assert (ring.ehbp_key, ring.ehbp_config, ring.find_ehbp(0.0)) == (None, None, ())


def test_publishes_ehbps_one_config_in_41_bytes_and_on_no_other_key() -> None:
    ring = KeyRing(0.0, ehbp=True)
    key = ring.ehbp_key
    assert key is not None
    assert ring.ehbp_config == bytes.fromhex("000020") + key + bytes.fromhex("000400010002")
    assert key not in ring.ohttp_keys
    assert [one.config.kem_id for one in ring.find_ehbp(0.0)] == [KEM_X25519]


def test_ehbps_key_lives_and_dies_with_its_epoch() -> None:
    ring = KeyRing(0.0, ehbp=True)
    first = ring.ehbp_key
    ring.rotate(1800.0)
    second = ring.ehbp_key
    assert first != second
    assert [one.private.public for one in ring.find_ehbp(3599.0)] == [second, first]
    assert [one.private.public for one in ring.find_ehbp(3600.0)] == [second]


def test_an_epoch_that_is_full_opens_nothing_of_ehbps() -> None:
    ring = KeyRing(0.0, ehbp=True, max_requests=1)
    (key,) = ring.find_ehbp(0.0)
    ring.remember(key, b"one", 0.0)
    assert ring.find_ehbp(0.0) == ()


# A key group's ring

HALF, DAY = 1800, 86400
BORN = 1_800_000_000


def group(now: float = BORN, **options: Any) -> GroupRing:
    return GroupRing.found(now, **options)


def joined(member: GroupRing, now: float, **options: Any) -> GroupRing:
    return GroupRing(member.secrets, now, **options)


def test_members_publish_the_same_keys_at_the_same_time_without_a_word() -> None:
    first = group(ehbp=True)
    second = joined(first, BORN + 700, ehbp=True)
    seen = set()
    for now in range(BORN + 700, BORN + DAY - HALF, 900):
        first.rotate(now)
        second.rotate(now)
        assert first.ohttp_keys == second.ohttp_keys
        assert (first.ehbp_key, first.next_keys, first.expires_at) == (
            second.ehbp_key,
            second.next_keys,
            second.expires_at,
        )
        seen.add(first.ohttp_keys)
    assert len(seen) == 47
    third = joined(second, BORN + DAY - 1)
    assert first.rotate(BORN + DAY - 1) == second.rotate(BORN + DAY - 1)
    third.rotate(BORN + DAY - 1)
    assert third.ohttp_keys == first.ohttp_keys


def test_a_request_opens_at_every_member_an_epoch_early_and_until_its_key_dies() -> None:
    first = group()
    second = joined(first, BORN)
    keys = first.ohttp_keys
    assert first.rotate(BORN + HALF)
    ahead = first.ohttp_keys
    find(second, BORN + HALF - 1, keys=ahead)  # its clock is behind
    assert second.ohttp_keys == keys
    find(first, BORN + 2 * HALF - 1, keys=keys)
    with pytest.raises(KeyUnknown):
        find(first, BORN + 2 * HALF, keys=keys)
    first.rotate(BORN + 2 * HALF)
    with pytest.raises(KeyUnknown):
        find(second, BORN + HALF - 1, keys=first.next_keys)


def test_who_joins_learns_nothing_of_what_was_before() -> None:
    first = group()
    keys = first.ohttp_keys
    first.rotate(BORN + HALF)
    find(first, BORN + HALF, keys=keys)
    with pytest.raises(KeyUnknown):
        find(joined(first, BORN + HALF), BORN + HALF, keys=keys)


def test_a_days_chain_is_followed_by_one_that_nobody_could_derive() -> None:
    first = group()
    second = joined(first, BORN)
    for ring in (first, second):
        ring.rotate(BORN + DAY - HALF)
    assert first.ohttp_keys == second.ohttp_keys
    assert first.next_keys != second.next_keys  # each has drawn its own
    second.install(first.secrets, BORN + DAY - HALF)
    for ring in (first, second):
        assert ring.rotate(BORN + DAY)
    assert first.ohttp_keys == second.ohttp_keys
    assert first.next_keys == second.next_keys


def test_a_member_that_goes_over_to_anothers_keys_still_opens_and_remembers_what_it_did() -> None:
    first, second = group(entropy=from_epoch(1)), group(entropy=from_epoch(50))
    keys = second.ohttp_keys
    second.remember(find(second, BORN, keys=keys), b"enc", BORN)
    second.install(first.secrets, BORN)
    assert second.ohttp_keys == first.ohttp_keys
    with pytest.raises(Replayed):
        second.remember(find(second, BORN + 1, keys=keys), b"enc", BORN + 1)
    first.remember(find(first, BORN), b"more", BORN)
    first.install(second.secrets, BORN)
    with pytest.raises(Replayed):
        first.remember(find(first, BORN + 1), b"more", BORN + 1)


def test_keys_that_a_member_gave_up_while_they_lived_are_never_taken_back() -> None:
    """What was opened under them is forgotten, and would open again."""
    early, late = group(now=BORN - 1000, entropy=from_epoch(1)), group(entropy=from_epoch(50))
    keys = late.ohttp_keys
    member = joined(late, BORN)
    member.remember(find(member, BORN, keys=keys), b"enc", BORN)
    early.rotate(BORN + 790)
    member.install(early.secrets, BORN + 790)
    for ring in (early, member):
        ring.rotate(BORN + 801)
    with pytest.raises(KeyUnknown):
        find(member, BORN + 801, keys=keys)
    with pytest.raises(NotTrusted, match="gave these keys up"):
        member.install(late.secrets, BORN + 810)
    assert member.ohttp_keys == early.ohttp_keys


def carried_back(**options: Any) -> tuple[GroupRing, GroupRing, bytes]:
    """A member that opened a request with the epoch after the next, and was then handed the pair before it; another whose
    clock is behind; the keys that the request was sealed to."""
    member = group(entropy=from_epoch(1), **options)
    behind = joined(member, BORN)
    member.rotate(BORN + HALF)
    keys = member.next_keys
    member.remember(find(member, BORN + HALF, keys=keys), b"enc", BORN + HALF)
    member.install(behind.secrets, BORN + HALF)
    return member, behind, keys


def test_an_epoch_that_comes_again_remembers_what_it_opened() -> None:
    member, _, keys = carried_back()
    assert member.rotate(BORN + HALF)
    assert member.next_keys == keys
    with pytest.raises(Replayed):
        member.remember(find(member, BORN + HALF, keys=keys), b"enc", BORN + HALF)


def test_a_full_epoch_that_comes_again_opens_nothing_more() -> None:
    member, _, keys = carried_back(max_requests=1)
    member.rotate(BORN + HALF)
    assert member.next_keys == keys
    with pytest.raises(KeyUnknown):
        find(member, BORN + HALF, keys=keys)


def test_a_chain_is_left_where_it_comes_to_an_epoch_that_was_given_up() -> None:
    member, behind, keys = carried_back()
    member.install(group(entropy=from_epoch(50)).secrets, BORN + HALF)
    member.install(behind.secrets, BORN + HALF)
    assert member.rotate(BORN + HALF)
    assert member.next_keys != keys
    with pytest.raises(KeyUnknown):
        find(member, BORN + HALF, keys=keys)
    behind.rotate(BORN + HALF)
    assert member.ohttp_keys == behind.ohttp_keys


def test_a_member_whose_memory_is_full_goes_one_epoch_ahead_and_no_further() -> None:
    first = group(max_requests=1)
    second = joined(first, BORN)
    first.remember(find(first, BORN), b"one", BORN)
    assert first.rotate(BORN)
    find(second, BORN, keys=first.ohttp_keys)
    first.remember(find(first, BORN), b"two", BORN)
    assert not first.rotate(BORN)
    with pytest.raises(KeyUnknown):
        find(first, BORN)
    assert first.rotate(BORN + HALF)
    find(first, BORN + HALF)


@pytest.mark.parametrize("drawn", [0, 123, 124, 125, 126, 127, 128, 252, 253, 254, 255])
def test_a_new_chains_keys_are_not_taken_for_those_before_them(drawn: int) -> None:
    """Key identifiers begin anew after 128 epochs."""
    ring = group(entropy=lambda length: bytes([drawn]) if length == 1 else os.urandom(length))
    last = BORN + DAY - HALF
    ring.rotate(last - HALF)
    before = parse_configs(ring.ohttp_keys)
    ring.rotate(last)
    configs = (*before, *parse_configs(ring.ohttp_keys), *parse_configs(ring.next_keys))
    assert len({config.key_id for config in configs}) == len(configs)


def test_after_a_long_sleep_a_chain_is_begun_anew_and_at_once() -> None:
    ring = group()
    keys = ring.ohttp_keys
    century = BORN + 100 * 365 * DAY
    assert ring.rotate(century)
    assert ring.ohttp_keys != keys
    assert century < ring.expires_at <= century + 2 * HALF
    find(ring, century)


def test_a_joiner_whose_clock_is_behind_takes_the_members_time() -> None:
    member = group()
    late = joined(member, BORN - 5000)
    late.rotate(BORN - 5000)
    assert late.ohttp_keys == member.ohttp_keys
    find(late, BORN - 5000)


def test_configs_of_a_secret_are_those_that_its_epoch_publishes() -> None:
    ring = group()
    assert encode_configs(epoch_configs(ring.secrets[0])) == ring.ohttp_keys
    assert encode_configs(epoch_configs(ring.secrets[1])) == ring.next_keys
