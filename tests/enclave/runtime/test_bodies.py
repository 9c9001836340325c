import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.enclave.runtime.slow import Slow

from cloister.enclave.gateway import problems
from cloister.enclave.gateway.problems import Problem
from cloister.enclave.runtime.bodies import Bodies

TOO_LARGE = Problem(413, "about:blank", "Too large.")
MOST = 1000


def of(*parts: bytes) -> Callable[[], Awaitable[Any]]:
    given = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    given[-1]["more_body"] = False

    async def receive() -> Any:
        return given.pop(0)

    return receive


def test_a_message_comes_whole_in_pieces_up_to_its_size() -> None:
    async def play() -> None:
        bodies = Bodies(MOST, TOO_LARGE)
        assert await bodies.read(of(b"a", b"", b"bc")) == b"abc"
        assert await bodies.read(of(bytes(MOST - 1), b"x")) == bytes(MOST - 1) + b"x"
        assert await bodies.read(of(bytes(MOST), b"x")) is TOO_LARGE

    asyncio.run(play())


def test_what_has_come_of_all_together_is_bounded_and_given_back() -> None:
    async def play() -> None:
        bodies = Bodies(MOST, TOO_LARGE)
        idle, large = Slow(), Slow(bytes(MOST))
        held = [asyncio.create_task(bodies.read(slow.receive)) for slow in [idle] * 100 + [large] * 16]
        await asyncio.sleep(0)
        assert await bodies.read(of(b"x")) is problems.BUSY
        assert await bodies.read(of(b"")) == b""
        large.end()
        idle.end()
        assert {*await asyncio.gather(*held)} == {problems.LATE}
        assert await bodies.read(of(bytes(MOST))) == bytes(MOST)

    asyncio.run(play())


def test_half_a_minute_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.enclave.runtime.bodies._SECONDS", 0.0)
    assert asyncio.run(Bodies(MOST, TOO_LARGE).read(Slow(b"x").receive)) is problems.LATE
