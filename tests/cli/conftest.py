"""A whole enclave on a loopback port, in a thread: simulated hardware, gateway and API; only the model is scripted."""

import asyncio
import hashlib
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from typer.testing import CliRunner, Result

from cloister.channel.keys import KeyRing
from cloister.cli.main import app
from cloister.enclave.attest.simulated import SimulatedTee
from cloister.enclave.attestation import Attestation
from cloister.enclave.gateway import Gateway
from cloister.enclave.llm.api import ApiConfig, create_api
from cloister.enclave.llm.engine import Delta, Done, Embedded, EngineInfo, Event, GenerateRequest, ModelInfo, Started
from cloister.enclave.llm.tenants import ApiKey
from cloister.evidence.launch import App, LaunchConfig, launch_digest
from cloister.host.process import listen
from cloister.sim.device import Device
from cloister.sim.measure import Measurement

MODEL = ModelInfo("toy", "ab" * 32, "q8_0", "llama", 1000, 1000, 4096, has_chat_template=True)
INFO = EngineInfo("cd" * 32, "plain", MODEL, 4)
OWNER = "ed25519:" + "A" * 43


@dataclass
class ScriptedModel:
    """`answer`: what it says, piece by piece, given the last thing asked. An exception in it is raised, and None waits
    until the client is gone."""

    answer: Callable[[str], Sequence[str | Exception | None]] = lambda asked: ["You said ", asked, "."]
    requests: list[GenerateRequest] = field(default_factory=list)
    running: int = 0
    ready: bool = True

    @property
    def info(self) -> EngineInfo:
        return INFO

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.running += 1
        messages = request.prompt.messages
        asked = messages[-1]["content"] if messages else request.prompt.text or ""
        try:
            yield Started(3, 0)
            for piece in self.answer(asked):
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    await asyncio.Event().wait()
                else:
                    yield Delta(piece, 1)
            yield Done("stop", 3, 2, 0)
        finally:
            self.running -= 1

    def asked(self) -> list[list[tuple[str, str]]]:
        """Role and content of each request's messages."""
        return [[(m["role"], m["content"]) for m in request.prompt.messages or ()] for request in self.requests]

    async def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        return list(text.encode())

    async def detokenize(self, tokens: Sequence[int]) -> bytes:
        return bytes(tokens)

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> list[Embedded]:
        raise AssertionError

    async def start(self) -> None: ...

    async def close(self) -> None: ...


@dataclass
class Enclave:
    url: str
    root: Path
    model: ScriptedModel
    gateway: "_Front"

    @property
    def trusted(self) -> list[str]:
        return ["--dangerously-trust-simulator", str(self.root)]


class _Front:
    """What stands between enclave and client. `change` alters attestation documents on their way; `cut`: after how many
    bytes of a sealed answer it ends."""

    def __init__(self, inner: Gateway) -> None:
        self.inner = inner
        self.change: Callable[[bytes], bytes] = bytes
        self.cut: int | None = None
        self.paths: list[str] = []

    async def __call__(self, scope: dict[str, object], receive: object, send: Callable[..., object]) -> None:
        if scope["type"] == "http":
            self.paths.append(f"{scope['method']} {scope['path']}")
        left = self.cut if scope.get("method") == "POST" else None

        async def through(message: dict[str, object]) -> None:
            nonlocal left
            if left is not None and message["type"] == "http.response.body":
                body = message.get("body", b"")
                assert isinstance(body, bytes)
                if left <= 0:
                    return  # it has ended already
                message = {**message, "body": body[:left], "more_body": message["more_body"] and len(body) < left}
                left -= len(body)
            await send(message)  # type: ignore[misc]

        await self.inner(scope, receive, through)  # type: ignore[arg-type]


LAUNCH = LaunchConfig(
    owner_key=OWNER,
    deployment="laptop",
    release=1,
    app=App("llm", "00" * 32),
    models=(MODEL.sha256,),
    config_sha256="11" * 32,
).encode()
MEASUREMENT = Measurement("sha256:" + "ee" * 32, "cpython 3.11", f"sha256:{INFO.sha256}")


@pytest.fixture
def start_enclave(tmp_path: Path) -> Iterator[Callable[..., Enclave]]:
    stops: list[Callable[[], None]] = []

    def start(*, api_key: str = "", insecure: tuple[str, ...] = ("api-keys-off",)) -> Enclave:
        device = Device.open(tmp_path / "device")
        launched = device.launch(MEASUREMENT, launch_digest(LAUNCH))
        tee = SimulatedTee(os.dup(launched.fd))
        ring = KeyRing(time.time(), ehbp="ehbp" in insecure)
        model = ScriptedModel()
        attestation = Attestation(tee, ring, LAUNCH, lambda: INFO, insecure)

        async def attest(nonce: bytes) -> bytes:
            return front.change(await attestation.document(nonce))

        keys = (ApiKey("me", hashlib.sha256(api_key.encode()).hexdigest()),) if api_key else ()
        api = create_api(model, ApiConfig(api_keys=keys, require_keys=bool(keys)))
        front = _Front(Gateway(api, ring, attest, receipt=attestation.receipt))
        sock = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(front, log_config=None, access_log=False, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()

        def stop() -> None:
            server.should_exit = server.force_exit = True
            thread.join()
            sock.close()
            tee.close()
            launched.close()

        stops.append(stop)
        root = tmp_path / "root.pem"
        root.write_bytes(device.root_pem)
        return Enclave(f"http://127.0.0.1:{sock.getsockname()[1]}", root, model, front)

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def enclave(start_enclave: Callable[..., Enclave]) -> Enclave:
    return start_enclave()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command line, with nobody's settings."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("CLOISTER_POLICY", "CLOISTER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def invoke(*arguments: str | Path, input: str = "") -> Result:  # noqa: A002
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)

    return invoke


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address at which nobody listens, nor can while the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def wait_for(condition: Callable[[], bool]) -> None:
    """Up to a minute: how fast is no business of these tests."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")
