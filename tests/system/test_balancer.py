"""A key group behind HAProxy, which knows of nothing: it hands every request to the next replica in turn."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from tests.end_to_end import conftest as ours
from tests.system.shell import free_port, tool

from cloister.cli.dialogue import Asking, Reply
from cloister.cli.local import LocalEnclave, Plan, group_policy_for, state_directory
from cloister.client import SealedTransport, Session
from cloister.enclave.llm.llama.library import library_dir
from cloister.errors import CloisterError, TruncatedResponse
from cloister.host.relay import Relay
from cloister.models.download import resolve
from cloister.sim import Device, measure

pytestmark = pytest.mark.system

state = ours.state

PROMPT = "canary-balancer-7741-zanzibar"

# Without http-no-delay a stream's first byte comes 200 ms late. A request that was sent is never sent again: `retries` is for connecting.
CONFIG = """
global
    maxconn 200
defaults
    mode http
    option http-no-delay
    option redispatch 1
    retries 2
    timeout connect 2s
    timeout check 5s
    timeout client 1h
    timeout server 1h
frontend door
    bind 127.0.0.1:{port}
    http-response set-header x-server %s
    default_backend replicas
backend replicas
    balance roundrobin
    option httpchk GET /readyz
{servers}
"""


@dataclass
class Balanced:
    """`hop` stands before HAProxy and records; `replicas` behind it, by HAProxy's name for them."""

    hop: Relay
    replicas: dict[str, LocalEnclave]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.hop.port}"

    def kill(self, name: str) -> None:
        process = self.replicas[name].process.process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def balanced(state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balanced]:
    policy = group_policy_for(measure(library_dir()), Device.open(state_directory() / "sim").root_pem)
    plan = Plan.make(resolve("default"), slots=4, group_policy=policy)
    replicas: dict[str, LocalEnclave] = {}
    folder = tmp_path_factory.mktemp("haproxy")
    balancer: subprocess.Popen[bytes] | None = None
    hop = Relay(free_port())
    try:
        replicas["one"] = LocalEnclave(plan)
        replicas["one"].start()
        replicas |= {name: LocalEnclave(plan, join=replicas["one"].url) for name in ("two", "three")}
        with ThreadPoolExecutor() as pool:
            list(pool.map(LocalEnclave.start, (replicas["two"], replicas["three"])))
        servers = "\n".join(
            f"    server {name} 127.0.0.1:{one.port} check inter 100ms fall 1 rise 1" for name, one in replicas.items()
        )
        (folder / "haproxy.cfg").write_text(CONFIG.format(port=hop.upstream_port, servers=servers))
        balancer = subprocess.Popen([tool("haproxy"), "-db", "-f", str(folder / "haproxy.cfg")])
        until_answers(hop.upstream_port)
        hop.start()
        yield Balanced(hop, replicas)
    finally:
        hop.stop()
        if balancer is not None:
            balancer.terminate()
            balancer.wait()
        for one in replicas.values():
            one.close()


def until_answers(port: int) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with suppress(httpx2.HTTPError):
            if httpx2.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("HAProxy does not answer")


@pytest.fixture
def client(balanced: Balanced) -> Iterator[httpx2.Client]:
    session = Session(balanced.url, policy=balanced.replicas["one"].policy)
    transport = SealedTransport(session)
    with httpx2.Client(transport=transport, base_url="http://enclave.invalid", timeout=60) as one:
        yield one


def ask(client: httpx2.Client) -> None:
    answer = client.post("/v1/completions", json={"model": "default", "prompt": PROMPT, "max_tokens": 3})
    assert answer.status_code == 200, answer.text


def servers_of(hop: Relay) -> tuple[list[str], bytes]:
    """Which replica each answer came from, and all that passed."""
    passed = b"".join(record.data for record in hop.take())
    return [name.decode() for name in re.findall(rb"x-server: (\w+)\r\n", passed)], passed


def test_requests_go_round_and_nothing_of_them_is_seen(balanced: Balanced, client: httpx2.Client) -> None:
    balanced.hop.take()
    for _ in range(6):
        ask(client)
    answered, passed = servers_of(balanced.hop)
    assert len(answered) == 7  # one piece of evidence, six answers: no replica sent anybody back to verify
    assert {name: answered[1:].count(name) for name in balanced.replicas} == dict.fromkeys(balanced.replicas, 2)
    assert passed.count(b"GET /.well-known/cloister-attestation") == 1
    for plain in (PROMPT, "/v1/", "completions", '"default"', "prompt"):
        assert plain.encode() not in passed


def first_piece(client: httpx2.Client) -> float:
    """Seconds until a stream's first words are there, the best of five: how busy the machine is shall not count."""
    best = 60.0
    for _ in range(5):
        body = {**Asking(max_tokens=3000, temperature=1.0).body(), "prompt": "Hello", "logit_bias": {"2": -100}}
        begun = time.monotonic()
        next(iter(Reply(client, "/v1/completions", body)))  # let go of at once, which stops it
        best = min(best, time.monotonic() - begun)
    return best


def test_a_streams_first_words_are_not_held_back(balanced: Balanced, client: httpx2.Client) -> None:
    one = balanced.replicas["one"]
    transport = SealedTransport(Session(one.url, policy=one.policy))
    with httpx2.Client(transport=transport, base_url="http://enclave.invalid", timeout=60) as direct:
        through, straight = first_piece(client), first_piece(direct)
    assert through < straight + 0.1, (through, straight)


def test_a_stream_whose_replica_is_killed_is_cut_and_said_to_be(balanced: Balanced, client: httpx2.Client) -> None:
    """And every request after it is answered, by those that are left, without verifying again."""
    ask(client)
    balanced.hop.take()
    body = {**Asking(max_tokens=3000, temperature=1.0).body(), "prompt": PROMPT, "logit_bias": {"2": -100}}
    killed = ""
    with pytest.raises(CloisterError) as caught:
        for _piece in Reply(client, "/v1/completions", body):
            if not killed:
                ((killed,), _) = servers_of(balanced.hop)
                balanced.kill(killed)
    assert isinstance(caught.value, TruncatedResponse), caught.value
    for _ in range(20):
        ask(client)
    answered, passed = servers_of(balanced.hop)
    assert len(answered) == 20
    assert set(answered) == set(balanced.replicas) - {killed}
    assert b"cloister-attestation" not in passed


def test_one_that_is_told_to_stop_costs_no_request(balanced: Balanced, client: httpx2.Client) -> None:
    alive = [name for name, one in balanced.replicas.items() if one.process.alive]
    ask(client)
    stopped = balanced.replicas[alive[0]].process.process
    assert stopped is not None
    stopped.send_signal(signal.SIGTERM)
    for _ in range(20):
        ask(client)
    stopped.wait(20)
    ask(client)
