"""`web/client` on a stage: in Node, or in a page of Chromium whose origin leads on to an enclave and a proxy."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from tests.client.deployment import Served
from tests.system.chat_stage import browsing
from tests.system.shell import ROOT, tool

__all__ = ["Ask", "Origin", "in_chromium", "in_node", "receiving_in_node"]

CLIENT = ROOT / "web" / "client"
Ask = Callable[..., dict[str, Any]]

_PAGE = """<!doctype html><title>cloister-client</title>
<script type="importmap">{"imports": {
  "openai": "/node_modules/openai/index.mjs", "hpke": "/node_modules/hpke/index.js",
  "@panva/hpke-noble": "/node_modules/@panva/hpke-noble/index.js", "@noble/": "/node_modules/@noble/"
}}</script>
<script type="module">
import { exchange } from '/test/exchange.mjs';
window.ask = ({ keys, ...options }) => exchange(keys ? { ...options, keys: Uint8Array.from(keys) } : options);
document.title = 'ready';
</script>"""


class Origin:
    """A page's own origin: the client's files, and what a page reaches through it. `/change` calls `change`."""

    def __init__(self) -> None:
        self.enclave = self.proxy = ""
        self.change: Callable[[], None] = lambda: None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        if path.startswith("/.well-known/"):
            await self._relay(self.enclave, scope, receive, send)
        elif path == "/verification":
            await self._relay(self.proxy, scope, receive, send)
        elif path == "/change":
            self.change()
            await _tell(send, b"text/plain", b"changed")
        elif path == "/":
            await _tell(send, b"text/html", _PAGE.encode())
        else:
            file = (CLIENT / path.removeprefix("/")).resolve()
            found = file.is_relative_to(CLIENT) and file.suffix in (".js", ".mjs") and file.is_file()
            await _tell(send, b"text/javascript", file.read_bytes() if found else b"", 200 if found else 404)

    async def _relay(self, base: str, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        body += message.get("body", b"")
        dropped = (b"host", b"origin", b"referer", b"connection", b"content-length", b"accept-encoding")
        kept = {name.decode(): value.decode() for name, value in scope["headers"] if name not in dropped}
        headers = {name: value for name, value in kept.items() if not name.startswith("sec-")}
        url = f"{base}{scope['path']}" + (f"?{scope['query_string'].decode()}" if scope["query_string"] else "")
        async with (
            httpx2.AsyncClient(trust_env=False, timeout=60) as client,
            client.stream(scope["method"], url, headers=headers, content=body) as answer,
        ):
            types = [(b"content-type", answer.headers.get("content-type", "").encode())]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": types})
            async for part in answer.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def _tell(send: Any, media_type: bytes, body: bytes, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", media_type)]})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def in_node(_origin: Served) -> Iterator[Ask]:
    def ask(*, keys: Path | None = None, **options: Any) -> dict[str, Any]:
        given = {**options, "keys": str(keys)} if keys else options
        command = [tool("node"), "test/ask.mjs", json.dumps(given)]
        ran = subprocess.run(command, cwd=CLIENT, capture_output=True, text=True, timeout=60, check=True)
        seen: dict[str, Any] = json.loads(ran.stdout)
        return seen

    yield ask


@contextmanager
def in_chromium(origin: Served) -> Iterator[Ask]:
    """A page reaches no other origin, so what it is told to ask is asked through its own."""
    with browsing() as browser, browser.new_page() as page:
        page.goto(origin.url)
        page.wait_for_function("document.title === 'ready'")

        def ask(*, keys: Path | None = None, **options: Any) -> dict[str, Any]:
            given = {**options, "keys": list(keys.read_bytes())} if keys else options
            if "proxy" in given:
                origin.app.proxy, given["proxy"] = given["proxy"], origin.url
                if "enclave" not in given:
                    given["enclave"] = _named_by(origin.app.proxy)
            if "enclave" in given:
                origin.app.enclave, given["enclave"] = given["enclave"], origin.url
            seen: dict[str, Any] = page.evaluate("(options) => window.ask(options)", given)
            return seen

        yield ask


def _named_by(proxy: str) -> str:
    with httpx2.Client(trust_env=False) as client:
        enclave: str = client.get(f"{proxy}/", timeout=60).json()["enclave"]
    return enclave


@contextmanager
def receiving_in_node(kem_id: int) -> Iterator[tuple[bytes, Ask]]:
    """npm's `hpke` with a key pair of its own: the public key, and what tells how it opens (`web/client/test/open.mjs`)."""
    command = [tool("node"), "test/open.mjs", str(kem_id)]
    with subprocess.Popen(command, cwd=CLIENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as node:
        asked, told = node.stdin, node.stdout
        assert asked is not None and told is not None

        def receive(**given: Any) -> dict[str, Any]:
            asked.write(f"{json.dumps(given)}\n")
            asked.flush()
            seen: dict[str, Any] = json.loads(told.readline())
            return seen

        yield bytes.fromhex(json.loads(told.readline())["public"]), receive
