import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from tests.host.stage import GIB, FakeBackend, Stage, close_stage, open_stage
from tests.system.shell import free_port

from cloister.host.access import ConsoleSessions
from cloister.host.api import Host, create_host
from cloister.host.process import listen
from cloister.host.resources import Capacity
from cloister.host.tokens import make_token

__all__ = ["Served", "backend", "served", "stage"]


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def stage(tmp_path: Path, backend: FakeBackend) -> Iterator[Stage]:
    first = free_port()
    one = open_stage(tmp_path, backend, [1000.0], (first, min(first + 50, 65535)))
    yield one
    close_stage(one)


@dataclass
class Served:
    stage: Stage
    app: Any
    client: httpx2.Client
    stranger: httpx2.Client
    now: list[float]
    token: str
    url: str


@pytest.fixture
def served(stage: Stage) -> Iterator[Served]:
    token, record = make_token("me", 0.0)
    stage.store.add_token(record)
    now = [0.0]
    sessions = ConsoleSessions(lambda: now[0])
    app = create_host(Host(stage.store, stage.bundles, stage.fleet, stage.backend, Capacity(4 * GIB, (0, 1)), sessions))
    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with (
        httpx2.Client(
            base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=60, trust_env=False
        ) as client,
        httpx2.Client(base_url=url, timeout=60, trust_env=False) as stranger,
    ):
        yield Served(stage, app, client, stranger, now, token, url)
    server.should_exit = server.force_exit = True
    thread.join()
    sock.close()
