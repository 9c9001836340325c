"""`cloister connect URL`: verify, then an OpenAI-compatible endpoint on 127.0.0.1 that seals everything it forwards."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer

from cloister.cli import output
from cloister.cli.trust import ApiKey, PolicyFile, RequirePq, SimulatorRoot, Trust, summary
from cloister.client import AsyncSession
from cloister.host.process import listen
from cloister.proxy import ProxyConfig, create_proxy
from cloister.proxy.serving import server

__all__ = ["register"]

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


def register(app: typer.Typer) -> None:
    app.command()(_connect)


def _connect(
    url: Annotated[str, typer.Argument(metavar="URL", help="The enclave's address.", show_default=False)],
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="On 127.0.0.1; 0 takes a free one.")
    ] = 8484,
    policy: PolicyFile = None,
    dangerously_trust_simulator: SimulatorRoot = None,
    require_pq: RequirePq = False,
    api_key: ApiKey = "",
) -> None:
    """Offer a verified enclave to any OpenAI-compatible tool of this machine's user, until Ctrl+C.

    With --api-key that key is sent in place of the tool's own.
    """
    trust = Trust(policy, dangerously_trust_simulator, require_pq)
    session = trust.async_session(url, pin_measurement=True)
    with listen("127.0.0.1", port) as sock:
        asyncio.run(_serve(session, sock, api_key))


async def _serve(session: AsyncSession, sock: socket.socket, api_key: str) -> None:
    async with session:
        for part in summary(await session.verify()):
            output.note(part, hang=2)
        port = sock.getsockname()[1]
        proxy = create_proxy(session, ProxyConfig(port=port))
        app = _with_key(proxy, api_key) if api_key else proxy
        _announce(f"http://127.0.0.1:{port}/v1")
        await server(app).serve(sockets=[sock])


def _announce(base: str) -> None:
    """The socket listens already, so whoever reads this may ask."""
    body = '{"model":"default","messages":[{"role":"user","content":"Who are you?"}]}'
    output.line(f"ready {base}")
    output.line(f"curl {base}/chat/completions -H 'Content-Type: application/json' -d '{body}'")


def _with_key(app: App, api_key: str) -> App:
    authorization = (b"authorization", f"Bearer {api_key}".encode())

    async def keyed(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            others = [field for field in scope["headers"] if field[0] not in (b"authorization", b"x-api-key")]
            scope = {**scope, "headers": [*others, authorization]}
        await app(scope, receive, send)

    return keyed
