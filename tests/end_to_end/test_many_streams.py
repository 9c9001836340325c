"""Many at once through the local proxy, as one person's tools may ask."""

import asyncio
import json

import httpx2
from tests.end_to_end.proxying import running_proxy

from cloister.cli.local import LocalEnclave, Plan
from cloister.models.download import resolve

STREAMS = 200


def test_two_hundred_open_streams_hold(state: object) -> None:
    """All are open at once (an answer begins when a slot is free), and each ends with its own usage."""
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
