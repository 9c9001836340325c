from typing import Any

import pytest
from tests.serving import ENDLESS, HELD, LONG, SHORT, hold, overfill, serving

from cloister.host.serving import server

pytestmark = pytest.mark.anyio


async def app(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.mark.parametrize("name", ENDLESS)
async def test_what_does_not_end_is_cut(name: str) -> None:
    async with serving(server(app, patience=LONG)) as port:
        assert (await overfill(port, name)).sent < 1 << 20


@pytest.mark.parametrize("name", HELD)
async def test_a_connection_is_not_held_for_ever(name: str) -> None:
    async with serving(server(app, patience=SHORT)) as port:
        await hold(port, name)
