"""A host without enclaves: a backend whose enclaves say what the test tells them to."""

import hashlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cloister.evidence.bundle import Manifest, Section, encode_head
from cloister.evidence.launch import App as LaunchApp
from cloister.evidence.launch import LaunchConfig
from cloister.host.backend import Event, RunningEnclave, Spawn
from cloister.host.bundles import Bundles, UploadLimits
from cloister.host.fleet import Deployment, Fleet, FleetSettings
from cloister.host.resources import Capacity, Resources
from cloister.host.store import Store
from cloister.host.supervisor import Backoff
from cloister.verify import Policy

OWNER = "ed25519:" + "A" * 43
STRANGER = "ed25519:" + "B" * 42 + "A"
CONFIG = json.dumps({"platform": "sim"}).encode()
WITH_TLS = json.dumps({"platform": "sim", "tls": True}).encode()
GIB = 1 << 30


class FakeEnclave:
    def __init__(self, spawn: Spawn, port: int, tls_port: int, events: list[Event]) -> None:
        self.spawn = spawn
        self.port, self.tls_port = port, tls_port
        self.pid: int | None = None
        self.stopped = threading.Event()
        self._said: queue.Queue[Event | None] = queue.Queue()
        for event in events:
            self.say(**event)

    def say(self, **event: object) -> None:
        self._said.put(dict(event))

    def die(self) -> None:
        self._said.put(None)

    def events(self) -> Iterator[Event]:
        while (event := self._said.get()) is not None:
            yield event

    def stop(self) -> None:
        self.stopped.set()
        self.die()


@dataclass
class FakeBackend:
    """`script`: what an enclave says at its start."""

    name: str = "fake"
    platform: str = "sim"
    bounds_memory: bool = False
    offers_tls: bool = True
    port: int = 9
    tls_port: int = 0
    script: Callable[[Spawn], list[Event]] = lambda spawn: [{"event": "ready"}]
    error: Exception | None = None
    started: list[FakeEnclave] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def start(self, spawn: Spawn) -> RunningEnclave:
        if self.error is not None:
            raise self.error
        enclave = FakeEnclave(spawn, self.port, self.tls_port, self.script(spawn))
        self.started.append(enclave)
        return enclave

    def forget(self, name: str) -> None:
        assert all(enclave.stopped.is_set() for enclave in self.started if enclave.spawn.name == name)
        self.forgotten.append(name)

    def policy(self, launch: LaunchConfig) -> Policy:
        return Policy(owner_key=launch.owner_key)

    @property
    def last(self) -> FakeEnclave:
        return self.started[-1]


def launch_of(
    *,
    owner: str = OWNER,
    deployment: str = "one",
    release: int = 1,
    logs: str = "none",
    app: str = "ab" * 32,
    config: bytes = CONFIG,
) -> bytes:
    return LaunchConfig(
        owner_key=owner,
        deployment=deployment,
        release=release,
        app=LaunchApp("llm", app),
        models=("cd" * 32,),
        config_sha256=hashlib.sha256(config).hexdigest(),
        logs=logs,
    ).encode()


def bundle_of(words: str) -> tuple[bytes, str]:
    """A bundle's bytes, as far as a host looks at them, and the digest that its launch config names."""
    section = Section("code", hashlib.sha256(words.encode()).hexdigest(), 100)
    manifest = Manifest(name="one", kind="asgi", entry="app:app", sections=(section,))
    return encode_head(manifest, "00" * 16) + bytes(section.sealed_size), manifest.sha256


def asked(name: str = "one", *, launch: bytes | None = None, **more: object) -> Deployment:
    wanted: dict[str, object] = {
        "name": name,
        "launch": launch_of() if launch is None else launch,
        "config": CONFIG,
        "bundle": None,
        "model": "tiny",
        "resources": Resources(GIB, 1),
    }
    return Deployment(**{**wanted, **more})  # type: ignore[arg-type]


@dataclass
class Stage:
    """A fleet on a folder; `again` is what a restart of the daemon does."""

    folder: Path
    backend: FakeBackend
    store: Store
    bundles: Bundles
    fleet: Fleet
    time: list[float]


def open_stage(
    folder: Path,
    backend: FakeBackend,
    time_: list[float],
    ports: tuple[int, int],
    address: str = "http://127.0.0.1:{port}",
) -> Stage:
    store = Store(folder / "host.db")
    bundles = Bundles(folder / "bundles", UploadLimits(most=GIB, quota=GIB, reserve=0))
    settings = FleetSettings(
        capacity=Capacity(4 * GIB, (0, 1)),
        ports=ports,
        address=address,
        tick=0.01,
        sample=0.01,
        sweep=0.01,
        backoff=Backoff(first=0.01, most=0.02),
    )
    fleet = Fleet(folder, store, bundles, backend, settings, clock=lambda: time_[0])
    fleet.start()
    return Stage(folder, backend, store, bundles, fleet, time_)


def close_stage(stage: Stage) -> None:
    stage.fleet.close()
    stage.store.close()


def eventually(condition: Callable[[], object]) -> None:
    """Up to half a minute: how fast is no business of these tests."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")
