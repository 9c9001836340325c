"""The engine dies or the process goes: typed errors at the client, and the next request is answered."""

import os
import signal
import threading
import time
from pathlib import Path

import httpx2
import pytest

from cloister.cli.dialogue import Asking, Reply
from cloister.cli.local import LocalEnclave, Plan
from cloister.client import SealedTransport, Session
from cloister.errors import CloisterError, EngineDied


@pytest.fixture
def lonely(plan: Plan) -> LocalEnclave:
    return LocalEnclave(plan)


def _engine_pid(enclave: LocalEnclave) -> int:
    assert enclave.process.process is not None
    front = enclave.process.process.pid
    children = [
        int(child)
        for thread in Path(f"/proc/{front}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]
    assert len(children) == 1
    return children[0]


def _client(enclave: LocalEnclave) -> httpx2.Client:
    transport = SealedTransport(Session(enclave.url, policy=enclave.policy))
    return httpx2.Client(transport=transport, base_url="http://enclave.invalid", timeout=60)


def test_kill_9_of_the_engine_during_eight_streams(lonely: LocalEnclave) -> None:
    outcomes: list[object] = []
    running = threading.Semaphore(0)

    def stream(client: httpx2.Client, number: int) -> None:
        body = {
            **Asking(max_tokens=3000, temperature=1.0).body(),
            "prompt": f"{number} once",
            "logit_bias": {"2": -100},
        }
        try:
            for count, _piece in enumerate(Reply(client, "/v1/completions", body)):
                if count == 0:
                    running.release()
            outcomes.append("ended as if whole")
        except CloisterError as error:
            outcomes.append(error)

    with lonely as enclave, _client(enclave) as client:
        enclave.start()
        threads = [threading.Thread(target=stream, args=(client, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert running.acquire(timeout=30)
        os.kill(_engine_pid(enclave), signal.SIGKILL)
        for thread in threads:
            thread.join(30)
        assert [type(outcome) for outcome in outcomes] == [EngineDied] * 8, outcomes
        killed = time.monotonic()
        while True:
            answer = client.post("/v1/completions", json={"model": "default", "prompt": "Hello", "max_tokens": 4})
            if answer.status_code == 200:
                break
            assert answer.status_code == 503
            assert time.monotonic() - killed < 10
            time.sleep(0.1)
        assert enclave.process.alive
