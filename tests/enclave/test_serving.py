import socket
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from cloister.enclave.boot import Boot, EnclaveConfig
from cloister.enclave.serving import TlsFront
from cloister.errors import WrongUse

pytestmark = pytest.mark.anyio
CONFIG = EnclaveConfig(platform="sim", tls=True)
BOOT = Boot(launch=b"", config=b"", listen_fd=0, model_path="", model_name="", engine_dir="")


async def app(scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"{scope['scheme']} {scope['client']}".encode()})


@pytest.fixture
async def front() -> AsyncIterator[tuple[TlsFront, int]]:
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    boot = replace(BOOT, tls_fd=sock.detach(), tls_origins=(f"https://localhost:{port}",))
    one = TlsFront.open(app, CONFIG, boot, time.time())
    assert one is not None
    yield one, port
    await one.close()


async def ask(port: int) -> str:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with httpx2.AsyncClient(verify=context, trust_env=False) as client:
        return (await client.get(f"https://127.0.0.1:{port}/")).text


async def test_it_answers_by_tls_once_it_is_started_and_no_more_when_it_is_closed(front: tuple[TlsFront, int]) -> None:
    one, port = front
    one.start()
    assert await ask(port) == "https None"
    await one.close()
    await one.close()
    with pytest.raises(httpx2.ConnectError):
        await ask(port)


async def test_it_takes_no_plain_http(front: tuple[TlsFront, int]) -> None:
    one, port = front
    one.start()
    async with httpx2.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx2.HTTPError):
            await client.get(f"http://127.0.0.1:{port}/")


async def test_it_can_be_closed_before_it_was_started(front: tuple[TlsFront, int]) -> None:
    await front[0].close()


async def test_there_is_none_unless_the_configuration_asks_for_it() -> None:
    assert TlsFront.open(app, replace(CONFIG, tls=False), BOOT, time.time()) is None


@pytest.mark.parametrize(("tls", "descriptor"), [(True, None), (False, 5)])
async def test_a_host_cannot_add_or_leave_out_the_listener(tls: bool, descriptor: int | None) -> None:
    boot = replace(BOOT, tls_fd=descriptor, tls_origins=("https://localhost:1",))
    with pytest.raises(WrongUse, match="disagree"):
        TlsFront.open(app, replace(CONFIG, tls=tls), boot, time.time())
