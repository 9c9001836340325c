"""The host's console in a browser (Debian's chromium), against a host whose enclaves are scripted."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect
from tests.host.conftest import Served, backend, served, stage
from tests.host.stage import FakeBackend, asked, eventually
from tests.system.chat_stage import AXE, Window, browsing, window

from cloister.host.appraisal import Seen
from cloister.host.store import Sample

pytestmark = pytest.mark.system

__all__ = ["backend", "served", "stage"]

AXE_RUN = "() => axe.run(document, { resultTypes: ['violations'] }).then((found) => found.violations)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as one:
        yield one


@pytest.fixture
def open_window(browser: Browser) -> Iterator[Window]:
    with window(browser) as one:
        yield one


def address(served: Served) -> str:
    return served.url + str(served.client.post("/v1/console").json()["path"])


def furnish(served: Served, backend: FakeBackend) -> None:
    """Two apps, one ready with samples, one waiting for its keys."""
    store, fleet = served.stage.store, served.stage.fleet
    backend.script = lambda spawn: [{"event": "waiting" if spawn.name == "sealed" else "ready", "model": "tiny"}]
    for name in ("public", "sealed"):
        fleet.deploy(asked(name, expires_at=4e9 if name == "public" else None), "me")
    eventually(lambda: {app["state"] for app in fleet.all()} == {"ready", "waiting"})
    for number in range(60):
        memory = 100_000_000 + 5_000_000 * (number % 7)
        sample = Sample(1000.0 + 15 * number, memory, 0.4 * number, number, 900 * number, 4000 * number)
        store.sample("public", sample)


def row(page: Page, name: str) -> str:
    return page.locator("#apps tbody tr", has_text=name).inner_text()


def test_it_shows_apps_their_evidence_logs_and_resources(
    served: Served, backend: FakeBackend, open_window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = [Seen("refused", 1000.0, "Other code.", "sim", ("measurement",)), Seen("simulated", 1000.0, "", "sim")]
    monkeypatch.setattr("cloister.host.fleet.look", lambda *_, **__: verdicts.pop())
    furnish(served, backend)
    page = open_window.page
    page.goto(address(served))
    expect(page.locator("#apps tbody tr")).to_have_count(2)
    assert "ready" in row(page, "public")
    assert "waiting" in row(page, "sealed")
    assert "release of keys" in row(page, "sealed")
    assert " days" in row(page, "public")
    evidence = page.locator("#apps tbody td:nth-of-type(2)")
    expect(evidence).to_contain_text(["simulated", "not looked at"])
    expect(page.get_by_text("The operator’s own word.")).to_be_visible()
    page.get_by_role("button", name="public").press("Enter")
    expect(page.locator("#app-title")).to_be_focused()
    expect(page.locator("#log li")).to_have_count(3)
    expect(page.locator("#memory polyline")).to_have_count(1)
    expect(page.locator("#facts")).to_contain_text("release 1")
    served.stage.store.log("public", 5.0, "app", "<img src=x onerror=document.title='owned'>")
    expect(page.locator("#log")).to_contain_text("onerror")
    assert page.title() == "cloister host"
    assert page.locator("#log img").count() == 0
    served.stage.fleet.restart("public")
    expect(evidence).to_contain_text(["refusedOther code.: measurement", "not looked at"])
    assert all(url.startswith(served.url) for url in open_window.asked)
    assert open_window.complaints == []


def test_its_address_is_good_for_one_browser_and_leaves_no_token_in_it(
    served: Served, browser: Browser, open_window: Window
) -> None:
    link = address(served)
    page = open_window.page
    page.goto(link)
    expect(page.locator("#live")).to_contain_text("as of")
    assert page.url == f"{served.url}/console"
    assert page.context.cookies() == []
    page.reload()
    expect(page.locator("#live")).to_contain_text("as of")
    with window(browser) as other:
        other.page.goto(link)
        expect(other.page.locator("#problem")).to_contain_text("one-time address")
        expect(other.page.locator("#apps tbody tr")).to_have_count(0)


def test_it_says_when_its_time_is_over_or_the_host_is_away(served: Served, open_window: Window) -> None:
    page = open_window.page
    page.goto(address(served))
    expect(page.locator("#live")).to_contain_text("as of")
    page.route("**/v1/**", lambda route: route.abort())
    expect(page.locator("#problem")).to_have_text("The host cannot be reached.")
    page.unroute("**/v1/**")
    expect(page.locator("#problem")).to_be_hidden()
    served.now[0] = 12 * 3600.0
    expect(page.locator("#problem")).to_contain_text("This session is over.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1180, 390])
def test_axe_finds_nothing(served: Served, backend: FakeBackend, browser: Browser, scheme: str, width: int) -> None:
    assert AXE.is_file(), f"{AXE} is missing: npm ci, in web/chat"
    furnish(served, backend)
    with window(browser, color_scheme=scheme, viewport={"width": width, "height": 800}) as one:
        one.page.goto(address(served))
        one.page.get_by_role("button", name="public").click()
        expect(one.page.locator("#log li")).to_have_count(3)
        one.page.evaluate(AXE.read_text())
        assert one.page.evaluate(AXE_RUN) == []


def test_the_whole_page_is_used_by_keyboard(served: Served, backend: FakeBackend, open_window: Window) -> None:
    furnish(served, backend)
    page = open_window.page
    page.goto(address(served))
    expect(page.locator("#apps tbody tr")).to_have_count(2)
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim()"))
    assert reached[:3] == ["Skip to the apps", "public", "sealed"]
