import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.verify.world import NOW, World, make_device

from cloister.channel.group import MAX_MESSAGE, Join, Request, check_word, parse_request
from cloister.errors import (
    CloisterError,
    ConnectionFailed,
    MalformedEvidence,
    MalformedMessage,
    NotTrusted,
    VerificationFailed,
)
from cloister.evidence.document import Document, parse_document
from cloister.evidence.launch import launch_digest
from cloister.owner.deployment import owner_name
from cloister.owner.joining import Standing, carry, judge, keep_together, standing
from cloister.verify.key_configs import X_WING_PUBLIC

JOINER, MEMBER = "http://joiner", "http://member"
PATH = "/.well-known/cloister-group"
GROUP: dict[str, Any] = {"purpose": "key-join", "key_scope": "group", "group_policy_sha256": "77" * 32, "models": ()}
BROKER = Ed25519PrivateKey.generate()


@dataclass
class Replicas:
    """Two that answer as they are told; every step is noted. `stands`: what each says of itself."""

    stands: dict[str, dict[str, str]] = field(default_factory=dict)
    steps: list[tuple[str, str, bytes]] = field(default_factory=list)
    refuses: dict[str, httpx2.Response] = field(default_factory=dict)
    on_accept: Callable[[], None] = lambda: None

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        step = request.url.path.removeprefix(PATH).lstrip("/")
        if not step:
            told = self.stands.get(request.url.host)
            return httpx2.Response(200, json=told) if told else httpx2.Response(403)
        self.steps.append((request.url.host, step, request.read()))
        if step in self.refuses:
            return self.refuses[step]
        if step == "accept":
            self.on_accept()
        return httpx2.Response(200, content=step.encode() + b"'s answer")


@pytest.fixture
def replicas() -> Replicas:
    return Replicas({"joiner": {"state": "joining"}, "member": {"state": "member", "keys": "k", "next": "n"}})


@pytest.fixture
def client(replicas: Replicas) -> Iterator[httpx2.Client]:
    with httpx2.Client(transport=httpx2.MockTransport(replicas)) as one:
        yield one


def test_four_messages_are_carried_each_to_its_end(replicas: Replicas, client: httpx2.Client) -> None:
    carry(client, joiner=JOINER + "/", member=MEMBER)
    assert replicas.steps == [
        ("member", "challenge", b""),
        ("joiner", "request", b"challenge's answer"),
        ("member", "admit", b"request's answer"),
        ("joiner", "accept", b"admit's answer"),
    ]


def test_a_broker_puts_its_word_in_or_stops_the_join(replicas: Replicas, client: httpx2.Client) -> None:
    carry(client, joiner=JOINER, member=MEMBER, authorise=lambda request: b"word+" + request)
    assert replicas.steps[2] == ("member", "admit", b"word+request's answer")
    replicas.steps.clear()

    def refuse(_request: bytes) -> bytes:
        raise NotTrusted("no")

    with pytest.raises(NotTrusted, match="no"):
        carry(client, joiner=JOINER, member=MEMBER, authorise=refuse)
    assert [step for _, step, _ in replicas.steps] == ["challenge", "request"]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (httpx2.Response(403, json={"title": "Not let in. Because."}), NotTrusted, "admit: Not let in. Because"),
        (httpx2.Response(400, content=b"junk"), NotTrusted, "does not say why"),
        (httpx2.Response(503), ConnectionFailed, "now"),
        (httpx2.Response(404), MalformedMessage, "No replica"),
        (httpx2.Response(200, content=bytes(MAX_MESSAGE + 1)), MalformedMessage, "more than"),
    ],
    ids=str,
)
def test_a_refusal_says_where_and_why(
    replicas: Replicas, client: httpx2.Client, answer: httpx2.Response, error: type[CloisterError], words: str
) -> None:
    replicas.refuses["admit"] = answer
    with pytest.raises(error, match=words):
        carry(client, joiner=JOINER, member=MEMBER)
    assert replicas.steps[-1][1] == "admit"


def test_what_is_no_replica_has_no_standing(replicas: Replicas, client: httpx2.Client) -> None:
    assert standing(client, MEMBER) == Standing("member", "k", "n")
    replicas.stands.clear()
    with pytest.raises(MalformedMessage):
        standing(client, MEMBER)


def kept(replicas: Replicas, client: httpx2.Client, rounds: int) -> tuple[list[float], list[str]]:
    """What it waited for, and what was refused."""
    waits: list[float] = []
    refused: list[str] = []

    def stopped(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) > rounds

    keep_together(
        client,
        joiner=JOINER,
        member=MEMBER,
        stopped=stopped,
        on_refusal=lambda error: refused.append(error.message),
        pause=30.0,
    )
    return waits[1:], refused


def test_keys_are_kept_the_same_now_and_next(replicas: Replicas, client: httpx2.Client) -> None:
    replicas.on_accept = lambda: replicas.stands.update(joiner=dict(replicas.stands["member"]))
    assert kept(replicas, client, 3) == ([30.0] * 3, [])
    assert len(replicas.steps) == 4
    replicas.stands["member"]["next"] = "another day's"
    assert kept(replicas, client, 3) == ([30.0] * 3, [])
    assert len(replicas.steps) == 8
    replicas.stands["joiner"] = {"state": "joining"}
    kept(replicas, client, 1)
    assert len(replicas.steps) == 12


def test_who_cannot_yet_is_asked_again_soon(replicas: Replicas, client: httpx2.Client) -> None:
    replicas.stands["joiner"] = {"state": "starting"}
    assert kept(replicas, client, 2)[0] == [0.2, 0.2]
    replicas.stands["joiner"] = {"state": "joining"}
    replicas.stands["member"] = {"state": "joining"}
    assert kept(replicas, client, 2)[0] == [0.2, 0.2]
    assert replicas.steps == []
    replicas.stands["member"] = {"state": "member", "keys": "k", "next": "n"}
    replicas.refuses["challenge"] = httpx2.Response(503)
    assert kept(replicas, client, 2) == ([0.2, 0.2], [])
    replicas.refuses["challenge"] = httpx2.Response(403, content=json.dumps({"title": "No."}).encode())
    waits, refused = kept(replicas, client, 9)
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0], "a refusal that stands is not asked for ever"
    assert refused == ["The replica refuses at challenge: No."] * 9


def test_malformed_evidence_of_a_joiner_ends_nothing(replicas: Replicas, client: httpx2.Client) -> None:
    waits: list[float] = []

    def stopped(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) > 3

    def judged(_request: bytes) -> bytes:
        raise MalformedEvidence("Junk.", step="document")

    replicas.stands["joiner"] = {"state": "joining"}
    keep_together(client, joiner=JOINER, member=MEMBER, stopped=stopped, authorise=judged)
    assert waits == [0.2, 0.2, 0.4, 0.8]


# What a broker judges


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(make_device(tmp_path_factory.mktemp("joining")))


def asks(world: World, **changes: Any) -> tuple[World, bytes]:
    """A replica that asks to be let in, and its request."""
    fields = {**GROUP, "ohttp_keys": b"", "provision_key": bytes(X_WING_PUBLIC), **changes}
    one = world.with_statement(**fields)
    join = Join(
        launch_sha256=launch_digest(one.launch.encode()),
        group_policy_sha256=bytes.fromhex("77" * 32),
        member_nonce=b"m" * 32,
        joiner_nonce=b"j" * 32,
    )
    return one, Request(join.member_nonce, join.joiner_nonce, one.document(join.request_nonce).encode()).encode()


def test_a_replica_that_verifies_is_authorised_for_this_join_alone(world: World) -> None:
    one, message = asks(world)
    found = judge(message, policy=one.policy(), now=NOW)
    request = parse_request(found.authorised(BROKER.sign))
    statement = bytes.fromhex(found.replica.statement_sha256)
    check_word(request.word, found.join, statement, owner_name(BROKER))
    assert replace(request, word=b"").encode() == message


def test_what_does_not_verify_is_not_authorised(world: World) -> None:
    one, message = asks(world)
    asked = parse_request(message)
    with pytest.raises(VerificationFailed, match="deployment"):
        judge(message, policy=one.policy(deployment="another"), now=NOW)
    for name in ("member_nonce", "joiner_nonce"):
        with pytest.raises(VerificationFailed, match="binding"):
            judge(replace(asked, **{name: bytes(32)}).encode(), policy=one.policy(), now=NOW)
    for change in ({"purpose": "provision"}, {"key_scope": "replica", "group_policy_sha256": None}):
        other, message = asks(world, **change)
        with pytest.raises(VerificationFailed):
            judge(message, policy=other.policy(), now=NOW)


def test_a_members_evidence_and_half_a_document_are_no_request(world: World) -> None:
    member, message = asks(world, ohttp_keys=world.statement.ohttp_keys, provision_key=None)
    with pytest.raises(NotTrusted, match="no key"):
        judge(message, policy=member.policy(), now=NOW)
    one, message = asks(world)
    asked = parse_request(message)
    for label in ("statement", "launch"):
        items = dict(parse_document(asked.document).items)
        del items[label]
        half = replace(asked, document=Document(items).encode()).encode()
        with pytest.raises(MalformedEvidence, match=label):
            judge(half, policy=one.policy(), now=NOW)
