from typing import Any

import pytest

from cloister.enclave.runtime.inner import wait_healthy
from cloister.errors import EngineDied

pytestmark = pytest.mark.anyio


async def test_an_app_that_does_not_become_healthy_may_do_so_at_another_start() -> None:
    class Ill:
        async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 503, "headers": []})

    ill: Any = Ill()
    with pytest.raises(EngineDied, match="healthy") as caught:
        await wait_healthy(ill, "/well", 0.05)
    assert caught.value.got == "status 503"
