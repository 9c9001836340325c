import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.datastructures import Headers

from cloister.enclave.llm.connection import ClientGone, WhileConnected, read_json_body
from cloister.enclave.llm.envelope import Refused

pytestmark = pytest.mark.anyio

JSON = Headers({"content-type": "application/json"})


def incoming(*messages: dict[str, Any]) -> Callable[[], Awaitable[Any]]:
    """What a server hands over; after the last message nothing more comes."""
    queued = list(messages)

    async def receive() -> dict[str, Any]:
        if not queued:
            await asyncio.Event().wait()
        return queued.pop(0)

    return receive


def part(body: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


async def test_a_body_in_parts_is_joined() -> None:
    assert await read_json_body(JSON, incoming(part(b"{", more=True), part(b"}", more=False)), 2) == b"{}"


async def test_a_body_is_refused_as_soon_as_it_is_too_long() -> None:
    with pytest.raises(Refused) as caught:
        await read_json_body(JSON, incoming(part(b"xxx", more=True), GONE), 2)
    assert caught.value.status == 413


async def test_a_body_cut_short_is_nobodys() -> None:
    with pytest.raises(ClientGone):
        await read_json_body(JSON, incoming(part(b"{", more=True), GONE), 9)


async def test_a_disconnect_cancels_what_runs_and_leaves_the_task_alive() -> None:
    cleaned = False
    with pytest.raises(ClientGone):
        async with WhileConnected(incoming(part(b"", more=False), GONE)):
            try:
                await asyncio.sleep(10)
            finally:
                cleaned = True
    assert cleaned
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def test_without_a_disconnect_nothing_is_cancelled() -> None:
    async with WhileConnected(incoming()):
        await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_a_disconnect_after_the_end_harms_nothing() -> None:
    over = asyncio.Event()

    async def receive() -> Any:
        await over.wait()
        return GONE

    async with WhileConnected(receive):
        await asyncio.sleep(0)
        over.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_a_cancellation_from_outside_stays_one() -> None:
    async def run() -> None:
        async with WhileConnected(incoming()):
            await asyncio.sleep(10)

    task = asyncio.create_task(run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
