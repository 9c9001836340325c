"""What a broker releases, to whom, and what its log says: against enclaves that are played by a transport."""

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.verify.world import MEASUREMENT, NOW, World, make_device

from cloister.channel.hpke import KEM_XWING, PrivateKey, generate
from cloister.channel.release import Context, Release, nonce_of, open_release
from cloister.errors import NotFound, NotTrusted, WrongUse
from cloister.evidence.launch import launch_digest
from cloister.evidence.strict_json import from_b64url
from cloister.owner.broker import Broker, Watch
from cloister.owner.broker_log import Entry, read_entries
from cloister.owner.broker_state import BrokerKeys, Record, Records
from cloister.owner.deployment import owner_name
from cloister.verify import Policy

OWNER = Ed25519PrivateKey.generate()
KEYS = BrokerKeys.derive(bytes(range(32)))
URL = "http://127.0.0.1:8484"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base = World(make_device(tmp_path_factory.mktemp("device")))
    return base.with_launch(owner_key=owner_name(OWNER), broker_key=KEYS.name, release=3)


@dataclass
class Enclave:
    """One start of an enclave that waits, until it has taken a release. `seen`: what the broker's log held at each post."""

    world: World
    log: Path
    status: int = 204
    key: PrivateKey = field(default_factory=lambda: generate(KEM_XWING, os.urandom))
    state: str = "waiting"
    taken: list[Release] = field(default_factory=list)
    posted: list[bytes] = field(default_factory=list)
    seen: list[list[Entry]] = field(default_factory=list)

    @property
    def offering(self) -> World:
        return self.world.with_statement(purpose="provision", ohttp_keys=b"", provision_key=self.key.public, models=())

    @property
    def key_sha256(self) -> str:
        return hashlib.sha256(self.key.public).hexdigest()

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/readyz":
            return httpx2.Response(503, json={"status": self.state})
        if request.method == "GET":
            nonce = from_b64url(request.url.params["nonce"], what="nonce")
            content = self.offering.document(nonce).encode()
            return httpx2.Response(200, content=content, headers={"content-type": "application/cmw+json"})
        self.posted.append(request.content)
        self.seen.append(lines(self.log))
        if self.status == 0:
            raise httpx2.ReadError("gone")
        if self.status == 204:
            self.taken.append(self.open(request.content))
            self.state = "opening"
        return httpx2.Response(self.status, json=None if self.status == 204 else {"title": "as it says"})

    def open(self, message: bytes) -> Release:
        launch = self.world.launch
        context = Context(
            deployment=launch.deployment,
            launch_sha256=launch_digest(launch.encode()),
            release=launch.release,
            statement_sha256=hashlib.sha256(self.offering.statement.encode()).digest(),
            nonce=nonce_of(message),
        )
        return open_release(message, context, self.key, launch.owner_key, launch.broker_key)


def lines(path: Path) -> list[Entry]:
    return list(read_entries(path.read_bytes(), KEYS.signing.public_key()))


@dataclass
class Place:
    """A broker's folder, and who watches from it."""

    folder: Path
    world: World
    now: float = NOW

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def record(self) -> Record:
        app = self.world.launch.app.sha256
        return Record(deployment="acme-chat", app=app, keys={"code": bytes(32)}, secrets={"TOKEN": "canary-secret"})

    def broker(self) -> Broker:
        records = Records(self.folder / "records", KEYS.records)
        return Broker(KEYS, records, self.log, clock=lambda: self.now)

    def enclave(self, world: World | None = None, **more: Any) -> Enclave:
        return Enclave(world or self.world, self.log, **more)

    def policy(self, **pins: Any) -> Policy:
        return self.world.policy(owner_key=owner_name(OWNER), **pins)

    def look(self, enclave: Callable[[httpx2.Request], httpx2.Response], broker: Broker | None = None) -> Watch:
        one = broker or self.broker()
        with httpx2.Client(transport=httpx2.MockTransport(enclave)) as client:
            return one.look(URL, policy=one.fit(self.policy()), client=client)

    def events(self) -> list[str]:
        return [entry.event for entry in lines(self.log)]


@pytest.fixture
def place(tmp_path: Path, world: World) -> Place:
    one = Place(tmp_path, world)
    broker = one.broker()
    broker.begin()
    broker.add(one.record)
    return one


def test_a_verified_enclave_gets_its_release_signed_by_the_broker(place: Place) -> None:
    enclave = place.enclave()
    assert place.look(enclave) == Watch("released", "acme-chat")
    assert enclave.taken == [place.record.release(NOW)]
    assert b"canary" not in enclave.posted[0]
    assert b"canary" not in place.log.read_bytes()
    assert place.events() == ["init", "added", "releasing", "released"]


def test_what_is_released_stands_in_the_log_before_it_is_sent(place: Place) -> None:
    enclave = place.enclave()
    place.look(enclave)
    last = enclave.seen[0][-1]
    assert last.event == "releasing"
    assert (last.details["grant"], last.details["release"], last.details["deployment"]) == (1, 3, "acme-chat")
    assert last.details["key_sha256"] == enclave.key_sha256
    assert last.details["statement_sha256"] == hashlib.sha256(enclave.offering.statement.encode()).hexdigest()


def test_each_start_is_released_anew_under_a_number_of_its_own(place: Place) -> None:
    broker = place.broker()
    for _ in range(3):
        assert place.look(place.enclave(), broker).outcome == "released"
    assert [one.details["grant"] for one in lines(place.log) if one.event == "releasing"] == [1, 2, 3]


def test_nothing_is_done_where_nobody_waits(place: Place) -> None:
    for state in ("ready", "opening", "x" * 5000):
        enclave = place.enclave(state=state)
        assert place.look(enclave).outcome in ("nothing", "unreachable")
        assert enclave.posted == []
    page = place.look(lambda request: httpx2.Response(200, text="<html>"))
    assert (page.outcome, place.events()) == ("unreachable", ["init", "added"])


REFUSED: dict[str, tuple[Callable[[World], World], str]] = {
    "other code": (lambda w: replace(w, measurement=replace(MEASUREMENT, code=f"sha256:{'99' * 32}")), "measurement"),
    "another deployment": (lambda w: w.with_launch(deployment="another"), "deployment"),
    "another owner's": (lambda w: w.with_launch(owner_key="ed25519:" + "A" * 43), "owner"),
    "another app": (lambda w: w.with_launch(app=replace(w.launch.app, sha256="99" * 32)), "app"),
    "another broker's": (lambda w: w.with_launch(broker_key="ed25519:" + "A" * 43), "broker"),
    "no broker's": (lambda w: w.with_launch(broker_key=None), "broker"),
    "logs": (lambda w: w.with_launch(logs="app"), "logs"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_enclave_that_is_not_the_one_gets_nothing_and_is_logged(place: Place, what: str) -> None:
    change, step = REFUSED[what]
    enclave = place.enclave(change(place.world))
    assert place.look(enclave).outcome == "refused"
    assert enclave.posted == []
    last = lines(place.log)[-1]
    assert last.event == "refused"
    assert step in f"{last.details['step']} {last.details['reason']}"
    assert b"canary" not in place.log.read_bytes()


def test_forged_evidence_gets_nothing(place: Place, tmp_path: Path) -> None:
    enclave = place.enclave(replace(place.world, device=make_device(tmp_path / "forger")))
    assert place.look(enclave).outcome == "refused"
    assert (enclave.posted, place.events()[-1]) == ([], "refused")


def test_what_its_owner_revoked_is_refused_and_forgotten_until_it_is_handed_over_again(place: Place) -> None:
    place.broker().revoke("acme-chat")
    enclave = place.enclave()
    assert place.look(enclave).outcome == "refused"
    assert enclave.posted == []
    assert lines(place.log)[-1].details["step"] == "revoked"
    kept = Records(place.folder / "records", KEYS.records).load("acme-chat")
    assert (kept.keys, kept.secrets) == ({}, {})
    place.broker().add(place.record)
    assert place.look(enclave).outcome == "released"


def test_an_old_record_that_comes_back_undoes_no_revocation(place: Place) -> None:
    """From a backup, say; also where a broker watches already, and where the record is gone when it is revoked."""
    watching, enclave, file = place.broker(), place.enclave(), place.folder / "records" / "acme-chat.record"
    old = file.read_bytes()
    for before in (old, b"damaged", b""):
        file.write_bytes(before) if before else file.unlink(missing_ok=True)
        place.broker().revoke("acme-chat")
        file.write_bytes(old)
        for broker in (watching, place.broker()):
            assert place.look(enclave, broker).outcome == "refused"
            place.now += 3600  # what is refused again is logged again
            enclave.world = enclave.world.with_statement(iat=int(place.now), exp=int(place.now) + 3600)
        file.unlink()
        assert place.look(enclave).outcome == "refused"
        assert lines(place.log)[-1].details["step"] == "revoked"
    assert enclave.posted == []
    place.broker().add(place.record)
    assert place.look(enclave, watching).outcome == "released"


@pytest.mark.parametrize("left", ["an older one", "none", "one of a log that is lost"])
def test_what_is_not_what_was_handed_over_last_is_refused_until_it_is_again(place: Place, left: str) -> None:
    file = place.folder / "records" / "acme-chat.record"
    older = file.read_bytes()
    if left == "one of a log that is lost":
        place.log.unlink()
        place.broker().begin()
    else:
        place.broker().add(replace(place.record, app="77" * 32))
        file.write_bytes(older) if left == "an older one" else file.unlink()
    enclave = place.enclave()
    assert place.look(enclave).outcome == "refused"
    last = lines(place.log)[-1].details
    assert (enclave.posted, last["step"], "handed over last" in str(last["reason"])) == ([], "record", True)
    place.broker().add(place.record)
    assert place.look(enclave).outcome == "released"


@pytest.mark.parametrize("writes", ["log", "record"])
@pytest.mark.parametrize("doing", ["add", "revoke"])
def test_a_kill_between_line_and_record_releases_nothing_old_and_repeating_mends_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, doing: str, writes: str
) -> None:
    """`writes`: what the kill comes before. An app is replaced by another, or revoked; then the old record is put back."""
    file = place.folder / "records" / "acme-chat.record"
    old = file.read_bytes()
    other = replace(place.record, app="77" * 32)

    def do() -> None:
        place.broker().add(other) if doing == "add" else place.broker().revoke("acme-chat")

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", crash) if writes == "log" else patched.setattr(Records, "save", crash)
        with pytest.raises(Crash):
            do()
    if writes == "record":
        file.write_bytes(old)
        assert place.look(place.enclave()).outcome == "refused"
    do()
    file.write_bytes(old)
    assert place.look(place.enclave()).outcome == "refused"


def test_what_cannot_be_kept_is_not_logged_and_what_was_handed_over_before_stands(place: Place) -> None:
    before = place.events()
    large = replace(place.record, app="cd" * 32, secrets={f"S{number}": "x" * 60_000 for number in range(20)})
    with pytest.raises(WrongUse, match="1 MiB"):
        place.broker().add(large)
    with pytest.raises(WrongUse, match="no deployment's name"):
        place.broker().add(replace(place.record, deployment="../acme"))
    assert place.events() == before
    assert place.look(place.enclave()).outcome == "released"


def test_a_revocation_holds_though_the_log_cannot_be_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(WrongUse, match="cannot be written"):
            place.broker().revoke("acme-chat")
    assert Records(place.folder / "records", KEYS.records).load("acme-chat").keys == {}
    enclave = place.enclave()
    assert place.look(enclave).outcome == "refused"
    assert lines(place.log)[-1].details["step"] == "revoked"
    place.broker().revoke("acme-chat")
    assert place.events()[-1] == "revoked"


def test_a_release_whose_last_line_cannot_be_written_is_told_as_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def full(descriptor: int, data: bytes, at: int) -> int:
        if b'"released"' in data:
            raise OSError(28, "No space left on device")
        return write(descriptor, data, at)

    enclave = place.enclave()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        seen = place.look(enclave)
    assert (seen.outcome, seen.deployment) == ("released", "acme-chat")
    assert isinstance(seen.error, WrongUse)
    assert (len(enclave.posted), place.events()[-1]) == (1, "releasing")


def test_a_deployment_that_was_not_handed_over_is_refused(tmp_path: Path, world: World) -> None:
    place = Place(tmp_path, world)
    place.broker().begin()
    enclave = place.enclave()
    assert place.look(enclave).outcome == "refused"
    assert (enclave.posted, lines(place.log)[-1].details["step"]) == ([], "record")
    with pytest.raises(NotFound):
        place.broker().revoke("acme-chat")


def test_keys_go_to_the_app_that_they_belong_to_also_under_a_policy_without_one(place: Place) -> None:
    place.broker().add(replace(place.record, app="77" * 32))
    enclave = place.enclave()
    assert place.look(enclave).outcome == "refused"
    assert (enclave.posted, lines(place.log)[-1].details["step"]) == ([], "app")


def test_a_deployment_whose_time_is_over_is_refused(place: Place) -> None:
    place.broker().add(replace(place.record, expires=int(NOW) + 10))
    place.now = NOW + 10
    enclave = place.enclave()
    assert place.look(enclave).outcome == "refused"
    assert lines(place.log)[-1].details["step"] == "expired"
    place.now = NOW + 9
    assert place.look(enclave).outcome == "released"
    assert enclave.taken[0].expires == int(NOW) + 10


def test_an_older_release_than_before_is_refused(place: Place) -> None:
    place.look(place.enclave())
    older = place.enclave(place.world.with_launch(release=2))
    assert place.look(older).outcome == "refused"
    assert (older.posted, lines(place.log)[-1].details["step"]) == ([], "release")
    assert place.look(place.enclave(place.world.with_launch(release=4))).outcome == "released"


def test_an_enclave_that_has_taken_its_release_gets_no_other(place: Place) -> None:
    enclave = place.enclave()
    place.look(enclave)
    enclave.state = "waiting"
    assert place.look(enclave).outcome == "refused"
    assert len(enclave.posted) == 1
    assert lines(place.log)[-1].details["step"] == "released"


@pytest.mark.parametrize(("status", "outcome"), [(0, "unsure"), (502, "unsure"), (403, "declined"), (409, "declined")])
def test_what_was_not_taken_is_logged_and_tried_again_under_the_same_number(
    place: Place, status: int, outcome: str
) -> None:
    enclave = place.enclave(status=status)
    assert place.look(enclave).outcome == outcome
    assert place.events()[-2:] == ["releasing", outcome]
    enclave.status = 204
    assert place.look(enclave).outcome == "released"
    assert [one.details["grant"] for one in lines(place.log) if "grant" in one.details] == [1, 1, 1, 1]


def test_a_refusal_that_repeats_itself_is_logged_once_an_hour(place: Place) -> None:
    broker, enclave = place.broker(), place.enclave(place.world.with_launch(logs="app"))
    for _ in range(5):
        assert place.look(enclave, broker).outcome == "refused"
    assert place.events().count("refused") == 1
    place.now += 3600
    enclave.world = enclave.world.with_statement(iat=int(place.now), exp=int(place.now) + 3600)
    place.look(enclave, broker)
    assert place.events().count("refused") == 2


def test_two_who_watch_the_same_enclave_use_one_number(place: Place) -> None:
    """Through different addresses, say: the second one learns from the log what the first one did."""
    one, other, enclave = place.broker(), place.broker(), place.enclave(status=0)
    place.look(enclave, one)
    place.look(enclave, other)
    place.look(place.enclave(), one)
    assert [entry.details["grant"] for entry in lines(place.log) if entry.event == "releasing"] == [1, 1, 2]


def test_without_its_log_a_broker_releases_nothing(place: Place) -> None:
    broker, enclave = place.broker(), place.enclave()
    place.log.unlink()
    with pytest.raises(NotTrusted, match="not there"):
        place.look(enclave, broker)
    assert enclave.posted == []


def test_with_a_log_that_was_changed_a_broker_releases_nothing(place: Place) -> None:
    place.log.write_bytes(place.log.read_bytes().replace(b"acme-chat", b"acme-chut"))
    enclave = place.enclave()
    with pytest.raises(NotTrusted):
        place.look(enclave)
    assert enclave.posted == []


@pytest.mark.parametrize("pins", [{"owner_key": None}, {"deployment": None}, {"broker_key": "ed25519:" + "A" * 43}])
def test_a_policy_that_leaves_open_whose_enclaves_it_is_for_is_refused(place: Place, pins: dict[str, Any]) -> None:
    with pytest.raises(WrongUse):
        place.broker().fit(replace(place.policy(), **pins))


class Crash(BaseException):
    """As kill -9: nobody catches it, and nothing is tidied up by who does not get to run."""


@pytest.mark.parametrize("seed", range(50))
def test_a_kill_at_any_moment_leaves_all_whole_and_releases_nothing_twice(
    place: Place, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The broker ends in the midst of a write, before or after a sync, before or after the enclave took its release."""
    chance = random.Random(seed)
    left = chance.randrange(1, 24)

    def step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Crash

    write, sync, swap = os.pwrite, os.fsync, Path.replace

    def torn(descriptor: int, data: bytes, at: int) -> int:
        if left == 1:
            write(descriptor, data[: chance.randrange(len(data))], at)
        step()
        return write(descriptor, data, at)

    def synced(descriptor: int) -> None:
        step()
        sync(descriptor)

    def swapped(path: Path, target: Path) -> Path:
        step()
        return swap(path, target)

    enclaves = [place.enclave() for _ in range(3)]

    def played(enclave: Enclave) -> Callable[[httpx2.Request], httpx2.Response]:
        def answer(request: httpx2.Request) -> httpx2.Response:
            if request.method == "POST":
                step()
            response = enclave(request)
            if request.method == "POST":
                step()
            return response

        return answer

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", torn)
        patched.setattr(os, "fsync", synced)
        patched.setattr(Path, "replace", swapped)
        broker = place.broker()
        try:
            for enclave in enclaves:
                broker.add(replace(place.record, secrets={"TOKEN": "another"}))
                place.look(played(enclave), broker)
        except Crash:
            pass
    assert left == 0
    again = place.broker()
    for enclave in enclaves:
        if enclave.state == "waiting":
            place.look(enclave, again)
    assert [len(enclave.taken) for enclave in enclaves] == [1, 1, 1]
    assert {one.secrets["TOKEN"] for enclave in enclaves for one in enclave.taken} <= {"canary-secret", "another"}
    found = lines(place.log)
    numbers = {(one.details["key_sha256"], one.details["grant"]) for one in found if one.event == "releasing"}
    assert sorted(number for _, number in numbers) == [1, 2, 3]
    assert len({key for key, _ in numbers}) == 3
    for enclave in enclaves:
        for seen in enclave.seen:
            assert seen[-1].event == "releasing"
            assert seen[-1].details["key_sha256"] == enclave.key_sha256
