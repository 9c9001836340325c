"""What an owner's machine sends, to whom, and when: against an enclave that is played by a transport."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.verify.world import MEASUREMENT, NOW, World, make_device

from cloister.channel.hpke import KEM_XWING, generate
from cloister.channel.release import Context, Release, open_release
from cloister.errors import (
    CloisterError,
    ConnectionFailed,
    MalformedEvidence,
    MalformedMessage,
    NotTrusted,
    VerificationFailed,
)
from cloister.evidence.document import MAX_DOCUMENT
from cloister.evidence.strict_json import from_b64url
from cloister.owner.appfile import AppFile
from cloister.owner.deployment import owner_name
from cloister.owner.provision import contents, provision
from cloister.verify import Policy, VerifiedProvision

OWNER = Ed25519PrivateKey.generate()
KEY = generate(KEM_XWING, lambda length: bytes(range(length)))
RELEASE = Release(time_floor=5, keys={"code": bytes(32)}, secrets={"TOKEN": "canary"})
URL = "http://127.0.0.1:8484"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base = World(make_device(tmp_path_factory.mktemp("device"))).with_launch(owner_key=owner_name(OWNER))
    return base.with_statement(purpose="provision", ohttp_keys=b"", provision_key=KEY.public, models=())


class Enclave:
    """`document` makes evidence for a nonce; `posted` is all that it was sent. `busy`, `full`: so many times it gives no
    evidence, and takes no release."""

    def __init__(self, document: Callable[[bytes], bytes], *, status: int = 204, busy: int = 0, full: int = 0) -> None:
        self.document = document
        self.status = status
        self.busy = busy
        self.full = full
        self.nonce = b""
        self.posted: list[bytes] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if request.method == "POST":
            self.posted.append(request.content)
            assert request.url.path == "/.well-known/cloister-release"
            if self.full:
                self.full -= 1
                return httpx2.Response(503)
            return httpx2.Response(self.status, json={"title": "as the enclave says"} if self.status != 204 else None)
        if self.busy:
            self.busy -= 1
            return httpx2.Response(503)
        self.nonce = from_b64url(request.url.params["nonce"], what="nonce")
        return httpx2.Response(200, content=self.document(self.nonce), headers={"content-type": "application/cmw+json"})

    def client(self) -> httpx2.Client:
        return httpx2.Client(transport=httpx2.MockTransport(self))


def policy(world: World, **pins: Any) -> Policy:
    return world.policy(owner_key=owner_name(OWNER), **pins)


def hand_over(world: World, enclave: Enclave, *, url: str = URL, owner: Ed25519PrivateKey = OWNER, **pins: Any) -> None:
    with enclave.client() as client:
        settings: dict[str, Any] = {"client": client, "patience": 0.0, "clock": lambda: NOW}
        provision(url, policy=policy(world, **pins), owner=owner, release=RELEASE, **settings)


def genuine(world: World) -> Callable[[bytes], bytes]:
    return lambda nonce: world.document(nonce).encode()


def test_a_verified_enclave_gets_the_release_sealed_and_signed(world: World) -> None:
    enclave = Enclave(genuine(world))
    with enclave.client() as client:
        verified = provision(URL, policy=policy(world), owner=OWNER, release=RELEASE, client=client, clock=lambda: NOW)
    (message,) = enclave.posted
    context = Context(
        deployment=world.launch.deployment,
        launch_sha256=bytes.fromhex(verified.launch_sha256),
        release=world.launch.release,
        statement_sha256=bytes.fromhex(verified.statement_sha256),
        nonce=enclave.nonce,
    )
    assert open_release(message, context, KEY, owner_name(OWNER)) == RELEASE
    assert b"canary" not in message


def test_each_time_the_nonce_is_another(world: World) -> None:
    nonces = []
    for _ in range(2):
        enclave = Enclave(genuine(world))
        hand_over(world, enclave)
        nonces.append(enclave.nonce)
    assert nonces[0] != nonces[1]


@pytest.mark.parametrize(
    "what", ["stale", "forged", "another deployment", "another app", "another owner's", "other code", "serving"]
)
def test_to_an_enclave_that_does_not_verify_nothing_is_sent(world: World, tmp_path: Path, what: str) -> None:
    forger = replace(world, device=make_device(tmp_path))
    other_code = replace(world, measurement=replace(MEASUREMENT, code=f"sha256:{'99' * 32}"))
    documents = {
        "stale": lambda _nonce: world.document(bytes(32)).encode(),
        "forged": genuine(forger),
        "another deployment": genuine(world.with_launch(deployment="another")),
        "another app": genuine(world.with_launch(app=replace(world.launch.app, sha256="99" * 32))),
        "another owner's": genuine(world.with_launch(owner_key="ed25519:" + "A" * 43)),
        "other code": genuine(other_code),
        "serving": genuine(world.with_statement(purpose="serve")),
    }
    enclave = Enclave(documents[what])
    with pytest.raises(VerificationFailed):
        hand_over(world, enclave)
    assert enclave.posted == []


def test_a_simulator_on_another_machine_gets_nothing(world: World) -> None:
    enclave = Enclave(genuine(world))
    with pytest.raises(NotTrusted, match="simulated"):
        hand_over(world, enclave, url="http://192.0.2.1:8484")
    assert enclave.posted == []


def test_another_owners_key_signs_nothing_for_this_enclave(world: World) -> None:
    enclave = Enclave(genuine(world))
    with pytest.raises(NotTrusted, match="another owner"):
        hand_over(world, enclave, owner=Ed25519PrivateKey.generate())
    assert enclave.posted == []


def test_the_broker_of_the_launch_config_signs_and_what_decides_is_asked_after_the_verification(world: World) -> None:
    broker = Ed25519PrivateKey.generate()
    served = world.with_launch(broker_key=owner_name(broker))
    asked: list[VerifiedProvision] = []

    def decide(verified: VerifiedProvision) -> Release:
        asked.append(verified)
        return RELEASE

    def run(at: World, **pins: Any) -> Enclave:
        enclave = Enclave(genuine(at))
        settings: dict[str, Any] = {"patience": 0.0, "clock": lambda: NOW}
        with enclave.client() as client:
            provision(URL, policy=policy(at, **pins), owner=broker, release=decide, client=client, **settings)
        return enclave

    assert len(run(served, broker_key=owner_name(broker)).posted) == 1
    assert [one.launch.broker_key for one in asked] == [owner_name(broker)]
    for at, pins, error in ((served, {}, VerificationFailed), (world, {"broker_key": owner_name(broker)}, NotTrusted)):
        with pytest.raises(error):
            run(at, **pins)
    assert len(asked) == 2  # not of the one that did not verify


@pytest.mark.parametrize(("state", "posts"), [({"busy": 3}, 1), ({"full": 3}, 4)], ids=["starting", "full"])
def test_an_enclave_that_starts_still_or_reads_others_releases_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch, state: dict[str, int], posts: int
) -> None:
    monkeypatch.setattr("cloister.owner.provision._PAUSE", 0.0)
    enclave = Enclave(genuine(world), **state)
    with enclave.client() as client:
        provision(
            URL, policy=policy(world), owner=OWNER, release=RELEASE, client=client, patience=30.0, clock=lambda: NOW
        )
    assert len(enclave.posted) == posts
    assert len(set(enclave.posted)) == 1  # the same one each time
    with pytest.raises(ConnectionFailed) as caught:
        hand_over(world, Enclave(genuine(world), **state))
    assert ("did not get through" in caught.value.message) == (posts > 1)


@pytest.mark.parametrize(
    ("status", "error"), [(403, NotTrusted), (400, NotTrusted), (409, NotTrusted), (502, ConnectionFailed)]
)
def test_a_release_that_was_not_taken_is_told(world: World, status: int, error: type[CloisterError]) -> None:
    enclave = Enclave(genuine(world), status=status)
    with pytest.raises(error) as caught:
        hand_over(world, enclave)
    assert len(enclave.posted) == 1
    assert "release" in caught.value.step


def test_a_refusal_without_end_is_not_read_to_its_end(world: World) -> None:
    """Whoever stands between lets the evidence through, and answers the release."""
    enclave, read = Enclave(genuine(world)), 0

    def flood() -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 1
            assert read < 100
            yield bytes(1024)

    def between(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(403, content=flood()) if request.method == "POST" else enclave(request)

    with httpx2.Client(transport=httpx2.MockTransport(between)) as client, pytest.raises(NotTrusted):
        provision(URL, policy=policy(world), owner=OWNER, release=RELEASE, client=client, clock=lambda: NOW)
    assert 0 < read < 10


def test_what_is_no_evidence_is_told(world: World) -> None:
    with pytest.raises(MalformedEvidence):
        hand_over(world, Enclave(lambda _nonce: b"{}}"))
    page = httpx2.MockTransport(lambda request: httpx2.Response(200, text="<html>"))
    flood = Enclave(lambda _nonce: bytes(MAX_DOCUMENT + 1))
    for transport in (page, httpx2.MockTransport(flood)):
        with httpx2.Client(transport=transport) as client, pytest.raises(MalformedMessage):
            provision(URL, policy=policy(world), owner=OWNER, release=RELEASE, client=client, clock=lambda: NOW)


def test_what_is_handed_over_is_the_apps_own_word_and_the_time() -> None:
    app = AppFile(folder=Path(), name="a", kind="wsgi", expiry=60, settings={"A": "b"})
    release = contents(app, {"code": bytes(32)}, secrets={"S": "t"}, now=1000.9)
    assert (release.time_floor, release.expires) == (1000, 1060)
    assert (release.keys, release.secrets, release.settings) == ({"code": bytes(32)}, {"S": "t"}, {"A": "b"})
