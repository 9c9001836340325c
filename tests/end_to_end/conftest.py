"""A real enclave process with the embedded model, started once: what `cloister serve --platform sim` starts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.end_to_end.tenants import ALICE_HASH, BOB_HASH

from cloister.cli.local import LocalEnclave, Plan
from cloister.client import Session
from cloister.enclave.boot import KeyHash
from cloister.models.download import resolve


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The owner's and the simulator's keys, away from this user's own."""
    folder = tmp_path_factory.mktemp("state")
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = before


@pytest.fixture(scope="session")
def plan(state: Path) -> Plan:
    return Plan.make(resolve("default"), slots=16)


@pytest.fixture(scope="session")
def enclave(plan: Plan) -> Iterator[LocalEnclave]:
    with LocalEnclave(plan) as running:
        running.start()
        yield running


@pytest.fixture(scope="session")
def plain_enclave(state: Path) -> Iterator[LocalEnclave]:
    """One that answers on loopback unsealed too."""
    with LocalEnclave(Plan.make(resolve("default"), slots=16, plaintext=True)) as running:
        running.start()
        yield running


@pytest.fixture
def session(enclave: LocalEnclave) -> Iterator[Session]:
    with Session(enclave.url, policy=enclave.policy) as one:
        yield one


@pytest.fixture(scope="session")
def keyed_enclave(state: Path) -> Iterator[LocalEnclave]:
    """One that asks for API keys: alice's and bob's."""
    plan = Plan.make(resolve("tiny"), slots=4, keys=(KeyHash("alice", ALICE_HASH), KeyHash("bob", BOB_HASH)))
    with LocalEnclave(plan) as running:
        running.start()
        yield running
