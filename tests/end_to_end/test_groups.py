"""A key group of real enclaves, as `cloister serve --group FILE --join URL` starts them: any of them opens any request."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx2
import pytest

from cloister.channel.bhttp import Request
from cloister.channel.ohttp import seal_to
from cloister.cli.local import WAIT, LocalEnclave, Plan
from cloister.cli.serve import _read_group
from cloister.client import SealedTransport, Session
from cloister.enclave.boot import parse_boot
from cloister.errors import NotTrusted, WrongUse
from cloister.models.download import resolve
from cloister.owner.joining import carry, standing
from cloister.sim.adversary import Adversary, Exchange

PROMPT = "canary-group-7741-zanzibar"
GROUP_PATH = "/.well-known/cloister-group"


@dataclass
class Replicas:
    """`member` began the group; all are stopped in the end."""

    plan: Plan
    running: list[LocalEnclave] = field(default_factory=list)

    @property
    def member(self) -> LocalEnclave:
        return self.running[0]

    def start(self, join: str = "", plan: Plan | None = None) -> LocalEnclave:
        enclave = LocalEnclave(plan or self.plan, join=join)
        self.running.append(enclave)
        enclave.start()
        return enclave

    def kill(self, enclave: LocalEnclave) -> None:
        assert enclave.process.process is not None
        os.kill(enclave.process.process.pid, signal.SIGKILL)
        enclave.process.wait()
        self.running.remove(enclave)
        enclave.close()


@pytest.fixture(scope="module")
def replicas(state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    file = tmp_path_factory.mktemp("group") / "group.toml"
    policy = _read_group(file, "", simulated=True)
    assert policy == file.read_text() == _read_group(file, "http://127.0.0.1:1", simulated=False)
    group = Replicas(Plan.make(resolve("tiny"), slots=2, group_policy=policy))
    try:
        group.start()
        group.start(group.member.url)
        yield group
    finally:
        for enclave in group.running:
            enclave.close()


@pytest.fixture
def http() -> Iterator[httpx2.Client]:
    with httpx2.Client(timeout=30) as client:
        yield client


def ask(client: httpx2.Client) -> int:
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["completion_tokens"])


def test_what_is_verified_at_one_replica_is_answered_by_another(replicas: Replicas, http: httpx2.Client) -> None:
    first, second = replicas.running
    assert standing(http, first.url) == standing(http, second.url)
    with Adversary(first.port) as hop:
        session = Session(hop.url, policy=first.policy)
        assert session.verify().statement.key_scope == "group"
        transport = SealedTransport(session)
        with httpx2.Client(transport=transport, base_url="http://enclave.invalid", timeout=60) as client:
            for enclave in (first, second, first):
                hop.upstream_port = enclave.port
                assert ask(client) > 0
        assert [exchange.method for exchange in hop.seen] == ["GET", "POST", "POST", "POST"]  # verified once
        assert all(PROMPT.encode() not in exchange.request + exchange.response for exchange in hop.seen)


def test_every_replica_proves_itself_and_the_same_keys(replicas: Replicas) -> None:
    found = []
    for enclave in replicas.running:
        with Session(enclave.url, policy=enclave.policy) as session:
            found.append(session.verify())
    assert len({verified.ohttp_keys for verified in found}) == 1
    assert len({verified.statement_sha256 for verified in found}) == len(found)
    assert {verified.launch_sha256 for verified in found} == {found[0].launch_sha256}
    for verified in found:
        assert "key-scope" in {factor.step for factor in verified.factors if factor.verdict == "not-checked"}


def test_a_request_is_opened_once_by_each_replica(replicas: Replicas, http: httpx2.Client) -> None:
    """What sharing keys costs: one replica does not know what another one has opened."""
    one, two = replicas.running[-2:]
    with Session(one.url, policy=one.policy) as session:
        keys = session.verify().ohttp_keys
    sealed = seal_to(keys, Request("GET", "https", "enclave.invalid", "/v1/models", (), b""))
    kind = {"content-type": "message/ohttp-chunked-req"}
    statuses = [
        http.post(f"{url}/.well-known/ohttp-gateway", content=sealed.body, headers=kind).status_code
        for url in (one.url, one.url, two.url, two.url)
    ]
    assert statuses == [200, 400, 200, 400]


def test_what_befalls_a_group_costs_it_a_replica_and_no_more(replicas: Replicas, http: httpx2.Client) -> None:
    """kill -9 of the one that began it: another is let in by the one that is left. The host in between loses the first
    admission, and plays all that it recorded again. Then a second group is begun by mistake, and goes over to this one."""
    began, left = replicas.running
    recorded: list[Exchange] = []

    def host_does(exchange: Exchange) -> None:
        recorded.append(exchange)
        if exchange.path.endswith("/admit") and len(steps()) == 2:
            exchange.status, exchange.response = 503, b"{}"

    def steps() -> list[Exchange]:
        return [exchange for exchange in recorded if exchange.path.startswith(GROUP_PATH + "/")]

    with Adversary(left.port) as host:
        host.behave(on_response=host_does)
        replicas.kill(began)
        third = replicas.start(host.url)
    assert standing(http, third.url) == standing(http, left.url)
    assert [exchange.path.rpartition("/")[2] for exchange in steps()] == ["challenge", "admit"] * 2
    admit = steps()[-1]
    stray = replicas.start()
    assert standing(http, stray.url).keys != standing(http, left.url).keys
    for url, step, message in (
        (left.url, "admit", admit.request),
        (third.url, "accept", admit.response),
        (stray.url, "accept", admit.response),
    ):
        answer = http.post(f"{url}{GROUP_PATH}/{step}", content=message, headers=_kind())
        assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (403, "join-refused")
    with Adversary(left.port) as hop:
        transport = SealedTransport(Session(hop.url, policy=stray.policy))
        with httpx2.Client(transport=transport, base_url="http://enclave.invalid", timeout=60) as client:
            assert asked_for(client, hop) == ["GET", "POST"]
            hop.upstream_port = stray.port  # which has other keys: 422, verified anew, sent again
            assert asked_for(client, hop) == ["POST", "GET", "POST"]
            carry(http, joiner=stray.url, member=third.url)
            assert standing(http, stray.url) == standing(http, left.url)
            assert asked_for(client, hop) == ["POST"]  # it still opens what it opened before
            hop.upstream_port = third.port
            assert asked_for(client, hop) == ["POST", "GET", "POST"]
            hop.upstream_port = stray.port
            assert asked_for(client, hop) == ["POST"]


def asked_for(client: httpx2.Client, hop: Adversary) -> list[str]:
    """What went over the hop so that one request was answered: GET is for evidence."""
    hop.seen.clear()
    assert ask(client) > 0
    return [exchange.method for exchange in hop.seen]


def _kind() -> dict[str, str]:
    return {"content-type": "application/octet-stream"}


def test_a_replica_of_another_deployment_is_refused_and_says_why(replicas: Replicas) -> None:
    other = replace(replicas.plan, deployment="another")
    with (
        LocalEnclave(other, join=replicas.running[-1].url) as enclave,
        pytest.raises(NotTrusted, match="another group"),
    ):
        enclave.start()


def test_a_replica_may_wait_for_somebody_else_to_carry(replicas: Replicas) -> None:
    """Such as the broker that the policy names: `cloister serve --join wait`."""
    for join, founds in (("", True), (WAIT, False)):
        with LocalEnclave(replicas.plan, join=join) as enclave:
            assert parse_boot(enclave.process.boot).founds_group == founds
            assert enclave._joining is None


def test_a_policy_is_named_by_whoever_starts_a_replica(tmp_path: Path) -> None:
    """On hardware none is made up, and nobody joins a group without one."""
    with pytest.raises(WrongUse, match="cannot be read"):
        _read_group(tmp_path / "group.toml", "", simulated=False)
    with pytest.raises(WrongUse, match="--join"):
        _read_group(None, "http://127.0.0.1:1", simulated=True)
    assert _read_group(None, "", simulated=True) is None


def test_an_enclave_that_waits_to_be_let_in_ends_with_its_host(replicas: Replicas) -> None:
    enclave = LocalEnclave(replicas.running[0].plan, join=WAIT)
    try:
        enclave.process.start()
        events = enclave.process.events()
        assert any(event["event"] == "joining" for event in events)
        process = enclave.process.process
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()  # as the kernel does when a host dies
        process.wait(15)
    finally:
        enclave.close()
