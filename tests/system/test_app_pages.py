"""The pages of somebody's own app in a browser (Debian's chromium), through the proxy and the sealed channel."""

import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx2
import pytest
from playwright.sync_api import Browser, expect
from tests.client.deployment import Deployment, Served
from tests.system.chat_stage import Window, browsing, window

from cloister.client import AsyncSession
from cloister.evidence.launch import App
from cloister.host.relay import Relay
from cloister.proxy import ProxyConfig, create_proxy
from cloister.sim import Device

pytestmark = pytest.mark.system

MARKED = "marked-secret-entry"
PAGE = """<!doctype html><title>own</title><link rel=stylesheet href=/style.css>
<h1>Notes of NAME</h1><form method=post action=/notes><input name=note aria-label=Note><button>Keep</button></form>
<ul>NOTES</ul><p id=live></p>
<script>fetch("/live").then(a => a.text()).then(t => { document.getElementById("live").textContent = t; });</script>
<script src="http://127.0.0.1:FOREIGN/evil.js"></script>"""
ATTACKS = """async () => {
  const told = {};
  const attempt = async (name, what) => { try { told[name] = await what(); } catch (error) { told[name] = error.name; } };
  await attempt("foreign fetch", () => fetch("http://127.0.0.1:FOREIGN/take", {mode: "no-cors"}).then(() => "sent"));
  await attempt("beacon image", () => new Promise((done) => {
    const image = new Image(); image.onload = () => done("sent"); image.onerror = () => done("blocked");
    image.src = "http://127.0.0.1:FOREIGN/take.png"; }));
  await attempt("proxy fetch", () => fetch("http://127.0.0.1:PROXY/v1/models", {mode: "no-cors"}).then(() => "sent"));
  await attempt("worker", () => navigator.serviceWorker.register("/style.css").then(() => "installed"));
  return told;
}"""


class Notes:
    """Keeps notes per session, in a cookie's name; pages, a form, a style, and a stream."""

    def __init__(self) -> None:
        self.notes: dict[str, list[str]] = {}
        self.foreign = 0
        self.asked: list[str] = []

    def asked_pages(self) -> list[str]:
        """Without what a browser asks by itself."""
        return [one for one in self.asked if not one.endswith("/favicon.ico")]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive()).get("body", b"")
        fields = dict(scope["headers"])
        cookie = fields.get(b"cookie", b"").decode().removeprefix("session=")
        self.asked.append(f"{scope['method']} {scope['path']}")
        session = cookie or secrets.token_hex(8)
        notes = self.notes.setdefault(session, [])
        head = [(b"set-cookie", f"session={session}; HttpOnly; Secure; SameSite=Lax".encode())]
        status, kind, text = 200, b"text/html", ""
        if scope["path"] == "/notes":
            assert fields[b"origin"] == b"https://enclave.invalid"
            notes.append(parse_qs(body.decode())["note"][0])
            status, head = 303, [*head, (b"location", b"https://enclave.invalid/")]
        elif scope["path"] == "/style.css":
            kind, text = b"text/css", "h1 { color: rgb(1, 2, 3); }"
        elif scope["path"] == "/live":
            kind, text = b"text/plain", "fetched"
        else:
            shown = "".join(f"<li>{note}</li>" for note in notes)
            text = PAGE.replace("NAME", session).replace("NOTES", shown).replace("FOREIGN", str(self.foreign))
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *head]})
        await send({"type": "http.response.body", "body": text.encode()})


class Foreign:
    """Another server of this machine: another site."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.page = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        self.asked.append(scope["path"])
        head = [(b"content-type", b"text/html"), (b"access-control-allow-origin", b"*")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": self.page.encode()})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as one:
        yield one


@pytest.fixture
def own(browser: Browser) -> Iterator[Window]:
    with window(browser) as one:
        yield one


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def foreign(notes: Notes) -> Iterator[tuple[Foreign, Served]]:
    app = Foreign()
    with Served(app) as served:
        notes.foreign = served.port
        yield app, served


@pytest.fixture
def relay(notes: Notes, tmp_path: Path) -> Iterator[tuple[Relay, Deployment]]:
    deployment = Deployment(Device.open(tmp_path / "sim"), notes)
    deployment.launch = replace(deployment.launch, app=App("wsgi", "66" * 32))
    with Served(deployment.gateway) as gateway:
        relay = Relay(gateway.port)
        relay.start()
        yield relay, deployment
        relay.stop()


@pytest.fixture
def proxy(relay: tuple[Relay, Deployment]) -> Iterator[Served]:
    way, deployment = relay

    def make(port: int) -> object:
        session = AsyncSession(f"http://127.0.0.1:{way.port}", policy=deployment.policy, pin_measurement=True)
        return create_proxy(session, ProxyConfig(port=port))

    with Served(None, port_of=make) as served:
        httpx2.get(f"{served.url}/verification").raise_for_status()
        yield served


def test_a_person_uses_an_app_in_a_browser_and_nothing_of_it_is_in_the_traffic(
    own: Window, proxy: Served, notes: Notes, relay: tuple[Relay, Deployment], foreign: tuple[Foreign, Served]
) -> None:
    page = own.page
    page.goto(proxy.app.app_address)
    expect(page.locator("#live")).to_have_text("fetched")
    assert page.locator("h1").evaluate("one => getComputedStyle(one).color") == "rgb(1, 2, 3)"
    name = page.locator("h1").inner_text()
    for number, note in enumerate((MARKED, "another")):
        page.get_by_label("Note").fill(note)
        page.get_by_role("button", name="Keep").click()
        expect(page.locator("li")).to_have_count(number + 1)
    assert page.url == proxy.app.app_address
    assert page.locator("h1").inner_text() == name, "its cookie came back"
    page.reload()
    assert page.locator("li").all_inner_texts() == [MARKED, "another"]
    seen = b"".join(record.data for record in relay[0].take())
    assert len(seen) > 5000
    assert MARKED.encode() not in seen
    assert foreign[0].asked == [], "the script from elsewhere was not even asked for"


def test_its_pages_reach_neither_others_nor_the_proxy_and_leave_no_worker(
    own: Window, proxy: Served, foreign: tuple[Foreign, Served]
) -> None:
    own.page.goto(proxy.app.app_address)
    attacks = ATTACKS.replace("FOREIGN", str(foreign[1].port)).replace("PROXY", str(proxy.port))
    told = own.page.evaluate(attacks)
    assert told == {
        "foreign fetch": "TypeError",
        "beacon image": "blocked",
        "proxy fetch": "TypeError",
        "worker": "TypeError",
    }
    assert foreign[0].asked == []


def test_another_page_can_neither_post_to_it_nor_frame_it(
    own: Window, proxy: Served, notes: Notes, foreign: tuple[Foreign, Served]
) -> None:
    own.page.goto(proxy.app.app_address)
    expect(own.page.locator("#live")).to_have_text("fetched")
    before = notes.asked_pages()
    foreign[0].page = (
        f'<iframe src="{proxy.app.app_address}"></iframe><form method=post action="{proxy.app.app_address}notes">'
        "<input name=note value=forged></form>"
    )
    own.page.goto(foreign[1].url)
    own.page.evaluate("document.forms[0].submit()")
    own.page.wait_for_url("**/notes")
    expect(own.page.locator("body")).to_contain_text("foreign_page")
    assert notes.asked_pages() == before


def test_under_127_0_0_1_its_pages_are_inert(own: Window, proxy: Served, notes: Notes) -> None:
    own.page.goto(f"{proxy.url}/page")
    assert own.page.locator("h1").count() == 1
    assert own.page.locator("#live").inner_text() == ""
    assert own.context.cookies() == []
    assert notes.asked == ["GET /page"]
