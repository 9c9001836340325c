import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.enclave.runtime.slow import Slow
from tests.enclave.runtime.world import Hardware, Owned, owned, statement_of

from cloister.channel.release import MAX_RELEASE, Release
from cloister.enclave.attestation import Witness
from cloister.enclave.runtime.waiting import Door, Waiting
from cloister.errors import ChannelBroken, MalformedEvidence, NotTrusted
from cloister.evidence.binding import report_data
from cloister.evidence.bundle import parse_bundle_head
from cloister.evidence.document import parse_document
from cloister.evidence.statement import EngineStatement
from cloister.evidence.strict_json import b64url
from cloister.owner.deployment import owner_name

NONCE, OTHER = bytes(range(32)), bytes(range(1, 33))
NOW = 1_800_000_000.0


def waiting(own: Owned, clock: Callable[[], float] = lambda: NOW) -> Waiting:
    witness = Witness(Hardware(own.launch), own.launch)
    manifest = parse_bundle_head(own.content).manifest
    return Waiting(witness, manifest, EngineStatement("ee" * 32, "not loaded"), ("app-unconfined",), clock=clock)


def document(one: Waiting, nonce: bytes = NONCE) -> bytes:
    return asyncio.run(one.document(nonce))


@pytest.fixture
def own() -> Owned:
    return owned(secrets=("TOKEN",))


@pytest.fixture
def release(own: Owned) -> Release:
    return Release(time_floor=int(NOW), keys=own.keys, secrets={"TOKEN": "value"})


def test_evidence_is_over_the_nonce_and_a_statement_with_one_key(own: Owned) -> None:
    items = parse_document(found := document(waiting(own))).items
    statement = statement_of(found)
    assert items["cpu"].content == report_data(NONCE, items["statement"].content)
    assert (statement.purpose, statement.ohttp_keys, statement.models) == ("provision", b"", ())
    assert statement.insecure == ("app-unconfined",)
    assert statement.exp - statement.iat == 3600
    assert statement.code == "sealed"


def test_the_owners_release_is_taken(own: Owned, release: Release) -> None:
    one = waiting(own)
    assert one.accept(own.message(document(one), NONCE, release)) == release


def test_only_the_first_is_taken(own: Owned, release: Release) -> None:
    one = waiting(own)
    first = document(one)
    second = own.message(document(one, OTHER), OTHER, release)
    message = own.message(first, NONCE, release)
    one.accept(message)
    for played in (message, second):
        with pytest.raises(NotTrusted) as caught:
            one.accept(played)
        assert caught.value.step == "released"
    with pytest.raises(NotTrusted):
        document(one)


def test_a_message_that_was_recorded_does_nothing_to_the_next_start(own: Owned, release: Release) -> None:
    """Same owner, launch config, bundle and nonce: another key, so another statement."""
    before, after = waiting(own), waiting(own)
    message = own.message(document(before), NONCE, release)
    document(after)
    with pytest.raises(NotTrusted, match="not its owner's"):
        after.accept(message)


@pytest.mark.parametrize(
    "other",
    [
        {"owner": Ed25519PrivateKey.generate()},
        {"deployment": "another"},
        {"release": 2},
        {"launch_sha256": bytes(32)},
        {"statement_sha256": bytes(32)},
        {"purpose": "serve"},
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_strangers_word_is_refused_and_the_owners_still_taken(
    own: Owned, release: Release, other: dict[str, Any]
) -> None:
    one = waiting(own)
    found = document(one)
    with pytest.raises(NotTrusted):
        one.accept(own.message(found, NONCE, release, **other))
    assert one.accept(own.message(found, NONCE, release)) == release


def test_the_broker_of_the_launch_config_may_release_too(own: Owned, release: Release) -> None:
    broker = Ed25519PrivateKey.generate()
    for named in (owner_name(broker), None):
        served = replace(own, broker_key=named)
        one = waiting(served)
        message = served.message(document(one), NONCE, release, owner=broker)
        if named:
            assert one.accept(message) == release
        else:
            with pytest.raises(NotTrusted):
                one.accept(message)


def test_a_nonce_that_no_evidence_was_made_for_is_refused(own: Owned, release: Release) -> None:
    one = waiting(own)
    with pytest.raises(NotTrusted, match="nonce"):
        one.accept(own.message(document(one), OTHER, release))
    for message in (b"", bytes(40), bytes(200)):
        with pytest.raises(NotTrusted):
            one.accept(message)


def test_a_message_sealed_to_another_key_does_not_open(own: Owned, release: Release) -> None:
    one, other = waiting(own), waiting(own)
    found = parse_document(document(one)).items["statement"].content
    swapped = own.message(document(other), NONCE, release, statement_sha256=hashlib.sha256(found).digest())
    with pytest.raises(ChannelBroken):
        one.accept(swapped)


@pytest.mark.parametrize(
    "change",
    [
        {"keys": {}},
        {"keys": {"code": bytes(32), "model": bytes(32)}},
        {"secrets": {}},
        {"secrets": {"TOKEN": "value", "MORE": "value"}},
        {"expires": int(NOW)},
        {"expires": int(NOW) + 5, "time_floor": int(NOW) + 5},
    ],
    ids=str,
)
def test_a_release_that_does_not_fit_the_app_leaves_the_owner_another_try(
    own: Owned, release: Release, change: dict[str, Any]
) -> None:
    one = waiting(own)
    found = document(one)
    with pytest.raises(MalformedEvidence):
        one.accept(own.message(found, NONCE, replace(release, **change)))
    assert one.accept(own.message(found, NONCE, release)) == release


def test_a_statement_is_made_anew_before_it_expires_and_the_old_one_still_counts(own: Owned, release: Release) -> None:
    now = [NOW]
    one = waiting(own, lambda: now[0])
    first = document(one)
    now[0] += 1801
    second = document(one, OTHER)
    assert statement_of(second).iat == statement_of(first).iat + 1801
    assert one.accept(own.message(first, NONCE, release)) == release


# The door


async def knock(
    door: Door, method: str, path: str, body: bytes = b"", media_type: bytes = b"application/octet-stream"
) -> tuple[int, bytes]:
    asked = [{"type": "http.request", "body": body, "more_body": False}]
    found: list[Any] = []

    async def receive() -> Any:
        return asked.pop() if asked else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        found.append(message)

    path, _, query = path.partition("?")
    headers = [(b"content-type", media_type)]
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": headers}
    await door(scope, receive, send)
    return found[0]["status"], b"".join(message.get("body", b"") for message in found[1:])


EVIDENCE = f"/.well-known/cloister-attestation?nonce={b64url(NONCE)}"
RELEASE = "/.well-known/cloister-release"


def answer(door: Door, *args: Any) -> tuple[int, bytes]:
    return asyncio.run(knock(door, *args))


def test_the_door_gives_evidence_takes_the_release_and_says_nothing_else(own: Owned, release: Release) -> None:
    taken: list[Release] = []
    door = Door("waiting", waiting(own), taken.append)
    assert answer(door, "GET", "/healthz")[0] == 200
    assert answer(door, "GET", "/readyz") == (503, b'{"status": "waiting"}')
    status, found = answer(door, "GET", EVIDENCE)
    assert status == 200
    for path, expected in (
        ("/.well-known/cloister-attestation", 400),
        ("/.well-known/cloister-attestation?nonce=AAAA", 400),
        ("/.well-known/ohttp-gateway", 503),
        ("/v1/models", 403),
        ("/", 403),
    ):
        assert answer(door, "GET", path)[0] == expected, path
    assert answer(door, "POST", "/.well-known/ohttp-gateway", b"x")[0] == 503
    assert answer(door, "GET", RELEASE)[0] == 405
    assert taken == []
    assert answer(door, "POST", RELEASE, own.message(found, NONCE, release)) == (204, b"")
    assert taken == [release]


def test_the_door_tells_the_ways_of_being_refused_apart_and_no_secret(own: Owned, release: Release) -> None:
    door = Door("waiting", waiting(own))
    found = answer(door, "GET", EVIDENCE)[1]
    good = own.message(found, NONCE, release)
    unfit = own.message(found, NONCE, replace(release, secrets={}))
    foreign = own.message(found, NONCE, release, owner=Ed25519PrivateKey.generate())
    assert answer(door, "POST", RELEASE, good, b"text/plain")[0] == 415
    assert answer(door, "POST", RELEASE, bytes(MAX_RELEASE + 1))[0] == 413
    for message, status, kind in ((b"junk", 403, "release-refused"), (foreign, 403, "release-refused"),
                                  (unfit, 400, "release-unfit"), (good, 204, ""), (good, 409, "released")):  # fmt: skip
        got, body = answer(door, "POST", RELEASE, message)
        assert got == status
        assert not kind or json.loads(body)["type"].endswith("/" + kind)
        assert b"value" not in body


def test_half_a_release_is_none(own: Owned) -> None:
    door = Door("waiting", waiting(own))

    async def half() -> int:
        found: list[Any] = []
        asked: list[Any] = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return asked.pop(0)

        async def send(message: Any) -> None:
            found.append(message)

        headers = [(b"content-type", b"application/octet-stream")]
        scope = {"type": "http", "method": "POST", "path": RELEASE, "query_string": b"", "headers": headers}
        await door(scope, receive, send)
        return int(found[0]["status"])

    assert asyncio.run(half()) == 408


def test_releases_that_never_end_fill_no_memory_and_the_owners_is_taken_after_them(
    own: Owned, release: Release
) -> None:
    taken: list[Release] = []
    door = Door("waiting", waiting(own), taken.append)

    async def play() -> None:
        message = own.message((await knock(door, "GET", EVIDENCE))[1], NONCE, release)
        large = Slow(bytes(MAX_RELEASE))
        slow = [asyncio.create_task(large.ask(door, RELEASE)) for _ in range(16)]
        await asyncio.sleep(0)
        status, body = await knock(door, "POST", RELEASE, message)
        assert (status, json.loads(body)["type"].rpartition("/")[2]) == (503, "busy")
        assert (await knock(door, "GET", "/readyz"))[0] == 503
        large.end()
        idle = Slow()
        slow += [asyncio.create_task(idle.ask(door, RELEASE)) for _ in range(100)]
        await asyncio.gather(*slow[:16])
        assert (await knock(door, "POST", RELEASE, message))[0] == 204  # who sends nothing keeps nobody out
        idle.end()
        await asyncio.gather(*slow)

    asyncio.run(play())
    assert taken == [release]


def test_evidence_is_not_made_without_end(own: Owned) -> None:
    door = Door("waiting", waiting(own))
    statuses = [answer(door, "GET", EVIDENCE)[0] for _ in range(40)]
    assert statuses[:20] == [200] * 20
    assert 503 in statuses


@pytest.mark.parametrize(("state", "status"), [("starting", 503), ("opening", 409), ("expired", 409)])
def test_a_door_behind_which_nobody_waits_is_shut(state: str, status: int) -> None:
    door = Door(state)
    assert answer(door, "GET", "/readyz") == (503, json.dumps({"status": state}).encode())
    assert answer(door, "GET", EVIDENCE)[0] == 503
    assert answer(door, "POST", RELEASE, b"x")[0] == status
    assert answer(door, "POST", "/.well-known/ohttp-gateway", b"x")[0] == 503
    assert answer(door, "GET", "/anything")[0] == 403
