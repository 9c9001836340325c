"""A scripted engine, and the API around it: reached in memory, streaming, or over a loopback port."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import httpx2
import openai
import pytest
import uvicorn

from cloister.enclave.llm.api import Api, ApiConfig, create_api
from cloister.enclave.llm.engine import Delta, Done, Embedded, EngineInfo, Event, GenerateRequest, ModelInfo, Started
from cloister.errors import EngineLoading

MODEL = ModelInfo(
    name="acme/toy",
    sha256="ab" * 32,
    quantization="q8_0",
    architecture="llama",
    parameters=5_800_000,
    size=6_200_000,
    context_length=4096,
    has_chat_template=True,
    created=1_700_000_000,
    embedding=2,
)
INFO = EngineInfo(sha256="cd" * 32, variant="amx", model=MODEL, slots=4)

Step: TypeAlias = Event | Exception | asyncio.Event


def says(*texts: str, prompt: int = 7, cached: int = 0, reason: Any = "stop") -> list[Step]:
    deltas = [Delta(text, 1) for text in texts]
    return [Started(prompt, cached), *deltas, Done(reason, prompt, len(deltas), cached)]


@dataclass
class ScriptedEngine:
    """Plays `script` for every request, or the next of `scripts`; an `asyncio.Event` in it is waited for."""

    script: list[Step] = field(default_factory=lambda: says("Hel", "lo"))
    scripts: list[list[Step]] = field(default_factory=list)
    model: EngineInfo = INFO
    loaded: bool = True
    ready: bool = True
    requests: list[GenerateRequest] = field(default_factory=list)
    tokenized: list[tuple[str, bool, bool]] = field(default_factory=list)
    running: int = 0
    peak: int = 0
    closed: int = 0
    failure: Exception | None = None
    """What becomes of embeddings."""

    @property
    def info(self) -> EngineInfo:
        if not self.loaded:
            raise EngineLoading("loading", progress=0.42)
        return self.model

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        if not self.ready:
            raise EngineLoading("restarting", progress=0.0)
        self.requests.append(request)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            for step in self.scripts.pop(0) if self.scripts else self.script:
                await asyncio.sleep(0)
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
        finally:
            self.running -= 1
            self.closed += 1

    async def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        self.tokenized.append((text, add_special, parse_special))
        return ([1] if add_special else []) + list(text.encode())

    async def detokenize(self, tokens: Sequence[int]) -> bytes:
        return bytes(token % 256 for token in tokens)

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> list[Embedded]:
        """Of each its length, and a half."""
        if self.failure is not None:
            raise self.failure
        return [Embedded(struct.pack("<2f", len(one), 0.5), len(one)) for one in inputs]

    async def start(self) -> None:
        self.loaded = self.ready = True

    async def close(self) -> None:
        self.ready = False

    def without_template(self) -> None:
        self.model = replace(INFO, model=replace(MODEL, has_chat_template=False))


class _Body(httpx2.AsyncByteStream):
    def __init__(self, chunks: "asyncio.Queue[bytes | BaseException | None]", task: "asyncio.Task[None]") -> None:
        self._chunks = chunks
        self._task = task
        self.disconnected = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (chunk := await self._chunks.get()) is not None:
            if isinstance(chunk, BaseException):
                raise httpx2.RemoteProtocolError("the server aborted the response") from chunk
            yield chunk

    async def aclose(self) -> None:
        self.disconnected.set()
        with contextlib.suppress(Exception):
            await self._task


class StreamingTransport(httpx2.AsyncBaseTransport):
    """Like httpx2's own ASGI transport, but it streams, and closing a response is a disconnect."""

    def __init__(self, app: Api) -> None:
        self.app = app

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = await request.aread()
        started: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        chunks: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            await stream.disconnected.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                started.set_result(message)
                return
            chunks.put_nowait(message["body"])
            if not message.get("more_body"):
                chunks.put_nowait(None)

        async def run() -> None:
            try:
                await self.app(scope_of(request), receive, send)
            except Exception as error:
                chunks.put_nowait(error)
                if not started.done():
                    started.set_exception(error)
                raise

        task = asyncio.create_task(run())
        stream = _Body(chunks, task)
        try:
            head = await started
        except asyncio.CancelledError:
            await stream.aclose()
            raise
        return httpx2.Response(head["status"], headers=list(head["headers"]), stream=stream)


def scope_of(request: httpx2.Request) -> dict[str, Any]:
    return {
        "type": "http",
        "method": request.method,
        "path": request.url.path,
        "query_string": request.url.query,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
    }


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def api(engine: ScriptedEngine) -> Api:
    return create_api(engine, ApiConfig(require_keys=False, restart_wait=0))


def client_of(api: Api, **headers: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        transport=StreamingTransport(api), base_url="http://enclave.invalid", headers=headers, timeout=10
    )


def sdk_of(api: Api, key: str = "none", retries: int = 0) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://enclave.invalid/v1", api_key=key, http_client=client_of(api), max_retries=retries
    )


@pytest.fixture
def http(api: Api) -> httpx2.AsyncClient:
    return client_of(api)


@pytest.fixture
def sdk(api: Api) -> openai.AsyncOpenAI:
    return sdk_of(api)


async def eventually(condition: Any) -> None:
    """Usually within a few turns of the loop; the limit only ends a test that hangs."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - whatever it asks has no event
            await asyncio.sleep(0.001)


@pytest.fixture
def loopback(api: Api) -> Iterator[str]:
    """The API behind a real server; its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(api, lifespan="off", log_level="critical", access_log=False))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(5)
    listener.close()
