"""`cloister connect URL`: verify, then an OpenAI-compatible endpoint and a web chat on 127.0.0.1, and all of it sealed."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer

from cloister.cli import output
from cloister.cli.trust import ApiKey, PolicyFile, RequirePq, SimulatorRoot, Trust, summary
from cloister.client import AsyncSession
from cloister.host.process import listen
from cloister.proxy import Chat, ProxyConfig, create_proxy
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
    """Offer a verified enclave to any OpenAI-compatible tool of this machine's user, and to a browser, until Ctrl+C.

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
        chat = Chat(port, on_begin=lambda: output.note(f"web chat, for another browser: {chat.address()}", "dim"))
        proxy = create_proxy(session, ProxyConfig(port=port), chat)
        app = _with_key(proxy, api_key) if api_key else proxy
        _announce(f"http://127.0.0.1:{port}/v1", chat.address())
        await server(app).serve(sockets=[sock])


def _announce(base: str, chat: str) -> None:
    """The socket listens already, so whoever reads this may ask. The chat's address is good for one browser."""
    body = '{"model":"default","messages":[{"role":"user","content":"Who are you?"}]}'
    output.line(f"ready {base}")
    output.line(f"curl {base}/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    output.line(f"web chat {chat}")


def _with_key(app: App, api_key: str) -> App:
    authorization = (b"authorization", f"Bearer {api_key}".encode())

    async def keyed(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            others = [field for field in scope["headers"] if field[0] not in (b"authorization", b"x-api-key")]
            scope = {**scope, "headers": [*others, authorization]}
        await app(scope, receive, send)

    return keyed
