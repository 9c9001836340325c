"""Many at once through the local proxy, as one person's tools may ask."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import httpx2
import pytest
from tests.cli import conftest as scripted
from tests.cli.conftest import INFO, Enclave, ScriptedModel
from tests.client.deployment import Served
from tests.end_to_end.proxying import running_proxy

from cloister.cli.local import LocalEnclave, Plan
from cloister.client import AsyncSession
from cloister.enclave.llm.engine import Delta, Done, EngineInfo, Event, GenerateRequest, Started
from cloister.models.download import resolve
from cloister.proxy import ProxyConfig, create_proxy
from cloister.verify import Policy

STREAMS = 200

start_enclave = scripted.start_enclave


def test_two_hundred_requests_at_once_are_answered(state: object) -> None:
    """Sixteen at a time, by a real engine; each ends with its own usage."""
    plan = Plan.make(resolve("tiny"), slots=16, max_waiting=STREAMS)
    with LocalEnclave(plan) as enclave:
        enclave.start()
        with running_proxy(enclave) as port:
            counts = asyncio.run(_ask_at_once(f"http://127.0.0.1:{port}"))
    assert len(counts) == STREAMS
    assert all(count <= 8 for count in counts)
    assert sum(counts) > 4 * STREAMS, "a toy may end at once now and then"


async def _ask_at_once(base: str) -> list[int]:
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=base, limits=limits, timeout=90, trust_env=False) as client:
        return await asyncio.gather(*(_ask(client, number) for number in range(STREAMS)))


async def _ask(client: httpx2.AsyncClient, number: int) -> int:
    body = {"prompt": f"Number {number}", "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    tokens: int = json.loads(lines[-2][6:])["usage"]["completion_tokens"]
    return tokens


@dataclass
class Holding(ScriptedModel):
    """Has a slot for each, begins every answer, and ends none before `release`."""

    released: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop | None = None

    @property
    def info(self) -> EngineInfo:
        return replace(INFO, slots=STREAMS)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.loop = asyncio.get_running_loop()
        self.running += 1
        try:
            yield Started(3, 0)
            yield Delta("first", 1)
            await self.released.wait()
            yield Delta(f" {request.prompt.text}", 1)
            yield Done("stop", 3, 2, 0)
        finally:
            self.running -= 1

    def release(self) -> None:
        """From any thread."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.released.set)


def test_two_hundred_streams_are_open_together(
    start_enclave: Callable[..., Enclave], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its first piece before any gets its second, and then its own."""
    monkeypatch.setattr(scripted, "ScriptedModel", Holding)
    enclave = start_enclave()
    policy = Policy(simulator_root=enclave.root.read_bytes(), tolerate_insecure=frozenset({"api-keys-off"}))
    session = AsyncSession(enclave.url, policy=policy)
    with Served(None, port_of=lambda port: create_proxy(session, ProxyConfig(port=port))) as served:
        running, gauge = asyncio.run(_hold_all(served.url, enclave.model))
    assert running == STREAMS
    assert gauge == STREAMS + 1, "and the one that asks for the gauge"


async def _hold_all(base: str, model: ScriptedModel) -> tuple[int, float]:
    """How many the model answers, and the proxy, while all are open."""
    assert isinstance(model, Holding)
    begun = asyncio.Barrier(STREAMS + 1)
    async with (
        httpx2.AsyncClient(
            base_url=base, limits=httpx2.Limits(max_connections=None), timeout=60, trust_env=False
        ) as client,
        asyncio.timeout(90),
        asyncio.TaskGroup() as group,
    ):
        for number in range(STREAMS):
            group.create_task(_hold(client, begun, number))
        await begun.wait()
        told = (await client.get("/metrics")).text.splitlines()
        running = model.running
        model.release()
    return running, next(float(line.split()[1]) for line in told if line.startswith("cloister_proxy_running "))


async def _hold(client: httpx2.AsyncClient, begun: asyncio.Barrier, number: int) -> None:
    body = {"prompt": f"Number {number}", "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        texts = _texts(answer)
        assert await anext(texts) == "first"
        await begun.wait()
        assert "".join([text async for text in texts]) == f" Number {number}"


async def _texts(answer: httpx2.Response) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                yield choice["text"]
