"""The web chat in a browser (Debian's chromium), against the proxy that serves it and a simulated enclave."""

import contextlib
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect
from tests.cli import conftest as scripted
from tests.cli import hardware
from tests.cli.conftest import Enclave, wait_for
from tests.system.chat_stage import (
    AXE,
    EXPLAINS,
    Site,
    Window,
    browsing,
    say,
    simulated_policy,
    site,
    tdx_deployment,
    tdx_site,
    window,
)
from tests.system.shell import Shell, free_port
from typer.testing import CliRunner

from cloister.cli.main import app
from cloister.client.account import FIRST_USE
from cloister.evidence.document import Document, parse_document
from cloister.host.relay import Relay
from cloister.sim import Device
from cloister.verify import Policy, parse_policy

pytestmark = pytest.mark.system

start_enclave = scripted.start_enclave
SECRET = "marked-secret-question"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as one:
        yield one


@pytest.fixture
def enclave(start_enclave: Callable[..., Enclave]) -> Enclave:
    one = start_enclave()
    one.model.answer = say
    return one


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "chat.key"


@pytest.fixture
def shown(enclave: Enclave, key_file: Path) -> Iterator[Site]:
    """The proxy, which believes the simulator, and reaches the enclave through a hop that records."""
    relay = Relay(int(enclave.url.rpartition(":")[2]))
    relay.start()
    url = f"http://127.0.0.1:{relay.port}"
    try:
        with site(url, simulated_policy(enclave.root.read_bytes()), key_file, relay=relay) as one:
            yield one
    finally:
        with contextlib.suppress(RuntimeError):  # a test may have stopped it
            relay.stop()


@pytest.fixture
def open_window(browser: Browser) -> Iterator[Window]:
    with window(browser) as one:
        yield one


@pytest.fixture
def near(open_window: Window, shown: Site) -> Window:
    """A window at the page, by the one-time address."""
    open_window.open(shown.chat.address())
    return open_window


def answers(page: Page) -> list[str]:
    return page.locator(".message.assistant .body").all_inner_texts()


def questions(page: Page) -> list[str]:
    return page.locator(".message.user .body").all_inner_texts()


# Talking


def test_a_question_is_sealed_and_its_answer_streams_in(near: Window, shown: Site, enclave: Enclave) -> None:
    near.ask(SECRET)
    near.answered(f"You said {SECRET}.")
    assert enclave.model.asked() == [[("user", SECRET)]]
    assert SECRET.encode() not in shown.traffic()
    assert near.complaints == []
    near.ask("And again?")
    near.answered("You said And again?.", count=2)
    assert [role for role, _ in enclave.model.asked()[1]] == ["user", "assistant", "user"]


def test_the_address_that_up_prints_opens_a_chat_with_a_real_model(open_window: Window, tmp_path: Path) -> None:
    with Shell(tmp_path).background(f"cloister up --port {free_port()}") as lines:
        (address,) = [line.removeprefix("web chat ") for line in lines if line.startswith("web chat ")]
        page = open_window.open(address)
        assert page.locator("#badge").inner_text() == "Simulated"
        open_window.ask("Who are you?")
        open_window.page.locator(".message.assistant:not([aria-busy])").wait_for()
        assert len(answers(page)[0].split()) >= 3
        expect(page.locator("#kept")).to_contain_text("Kept in this browser")
    assert open_window.complaints == []


@pytest.mark.parametrize("way", ["key", "button"])
def test_stop_ends_the_answer_inside_and_keeps_what_came(near: Window, enclave: Enclave, way: str) -> None:
    near.ask("Tell me a long story")
    near.page.get_by_text("upon a time").wait_for()
    assert enclave.model.running == 1
    expect(near.page.get_by_role("button", name="Send")).to_be_hidden()
    if way == "key":
        near.page.keyboard.press("Escape")
    else:
        near.page.get_by_role("button", name="Stop").click()
    near.answered("You stopped this answer.")
    wait_for(lambda: enclave.model.running == 0)
    assert "Once upon a time" in answers(near.page)[0]
    near.ask("Hello")
    near.answered("You said Hello.", count=2)


def test_an_answer_can_be_asked_for_again(near: Window, enclave: Enclave) -> None:
    near.ask("One")
    near.answered("You said One.")
    enclave.model.answer = lambda asked: ["Another answer."]
    near.page.get_by_role("button", name="Answer again").click()
    near.answered("Another answer.")
    assert len(answers(near.page)) == 1
    assert enclave.model.asked() == [[("user", "One")], [("user", "One")]]


def test_an_answer_stays_where_no_other_comes_in_its_place(near: Window, enclave: Enclave) -> None:
    near.ask("One")
    near.answered("You said One.")
    enclave.model.answer = lambda asked: [RuntimeError("the engine died")]
    near.page.get_by_role("button", name="Answer again").click()
    expect(near.page.get_by_role("alert")).to_be_visible()
    near.answered("You said One.")


def test_a_question_can_be_edited_and_what_follows_is_replaced(near: Window, enclave: Enclave) -> None:
    for at, text in enumerate(("One", "Two"), 1):
        near.ask(text)
        near.answered(f"You said {text}.", count=at)
    near.page.get_by_role("button", name="Edit and ask again").first.click()
    area = near.page.get_by_label("Edit your message")
    assert area.input_value() == "One"
    area.fill("Three")
    near.page.get_by_role("button", name="Ask again", exact=True).click()
    near.answered("You said Three.")
    assert (questions(near.page), len(answers(near.page))) == (["Three"], 1)
    assert enclave.model.asked()[-1] == [("user", "Three")]


def test_an_answer_that_breaks_off_is_never_shown_as_whole(near: Window, shown: Site) -> None:
    near.ask("Tell me a long story")
    near.page.get_by_text("upon a time").wait_for()
    assert shown.relay is not None
    shown.relay.stop()
    near.page.locator(".end.cut").wait_for()
    assert "Once upon a time" in answers(near.page)[0]
    assert "This is not the whole answer." in answers(near.page)[0]
    expect(near.page.get_by_role("alert")).to_contain_text("The answer was cut off")


def test_a_model_that_fails_leaves_the_question_to_be_sent_again(near: Window, enclave: Enclave) -> None:
    near.ask("Break")
    expect(near.page.get_by_role("alert")).to_be_visible()
    assert (questions(near.page), answers(near.page)) == (["Break"], [])
    enclave.model.answer = lambda asked: ["Mended."]
    near.page.get_by_role("button", name="Try again").click()
    near.answered("Mended.")
    expect(near.page.get_by_role("alert")).to_be_hidden()


def test_an_answer_whose_sealed_end_is_cut_off_is_never_shown_as_whole(near: Window, enclave: Enclave) -> None:
    near.ask("Hello")
    near.answered("You said Hello.")
    enclave.gateway.cut = 900
    near.ask("What is a nonce?")
    near.page.locator("#error").wait_for()
    assert "RFC 9334" not in near.page.locator("#messages").inner_text()
    assert near.page.locator(".message.assistant").count() == near.page.locator(".end.cut").count() + 1


def test_system_prompt_model_and_sampling_go_with_every_question(near: Window, enclave: Enclave) -> None:
    page = near.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    assert page.get_by_label("Model").input_value() == "toy"
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Top p").fill("0.5")
    page.get_by_label("Longest answer (tokens)").fill("77")
    page.get_by_label("Seed").fill("42")
    page.get_by_role("button", name="Save", exact=True).click()
    near.ask("Hello")
    near.answered("You said Hello.")
    assert enclave.model.asked() == [[("system", "Be brief."), ("user", "Hello")]]
    sampling = enclave.model.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed) == (0.25, 0.5, 77, 42)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("System prompt").input_value() == "Be brief."
    assert page.get_by_label("Seed").input_value() == "42"


# What a model writes


def test_what_a_model_thinks_is_folded_away_and_not_sent_back(near: Window) -> None:
    deltas = [{"reasoning_content": "Let me see. "}, {"reasoning_content": "Yes."}, {"content": "It is so."}]
    events = [json.dumps({"choices": [{"delta": delta, "finish_reason": None}]}) for delta in deltas]
    body = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
    asked: list[str] = []

    def fulfil(route: Route) -> None:
        asked.append(route.request.post_data or "")
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    near.page.route("**/v1/chat/completions", fulfil)
    near.ask("Is it?")
    near.answered("It is so.")
    thought = near.page.locator("details.thought")
    expect(thought.get_by_text("Let me see. Yes.")).to_be_hidden()
    expect(near.page.locator("#announcer")).to_have_text("Answer: It is so.")
    thought.locator("summary").click()
    expect(thought.get_by_text("Let me see. Yes.")).to_be_visible()
    near.ask("Really?")
    near.answered("It is so.", count=2)
    assert "It is so." in asked[1]
    assert "Let me see" not in asked[1]


def test_markdown_is_shown_and_code_is_coloured_and_copied(near: Window) -> None:
    near.context.grant_permissions(["clipboard-read", "clipboard-write"])
    near.ask("What is a nonce?")
    near.answered("RFC 9334")
    body = near.page.locator(".message.assistant .body")
    assert body.locator("strong").inner_text() == "nonce"
    assert body.locator("ol > li").count() == 3
    assert body.locator("td").count() == 4
    assert body.locator("code .hljs-keyword").all_inner_texts()[:2] == ["import", "def"]
    body.get_by_role("button", name="Copy").click()
    body.get_by_role("button", name="Copied").wait_for()
    copied = near.page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == EXPLAINS.partition("```python\n")[2].partition("```")[0].strip()
    link = body.get_by_role("link")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert "www.rfc-editor.org" in link.inner_text()  # where it leads, beside the model's words


def test_nothing_that_a_model_writes_becomes_script_picture_or_badge(near: Window, shown: Site) -> None:
    near.ask("Attack me")
    near.answered("spoof")
    page, messages = near.page, near.page.locator("#messages")
    assert page.title() == "cloister chat"
    for selector in (
        "img",
        "script",
        "style",
        "iframe",
        "form",
        "input",
        "[onmouseover]",
        ".badge",
        ".verified",
        "#badge",
    ):
        assert messages.locator(selector).count() == 0, selector
    assert [link.get_attribute("href") for link in messages.get_by_role("link").all()] == ["https://evil.example/login"]
    assert "<script>document.title='owned'</script>" in messages.inner_text()
    assert near.complaints == []
    assert {url.partition("#")[0].rpartition(":")[2].partition("/")[0] for url in near.asked} == {
        str(shown.served.port)
    }


def test_the_browser_itself_refuses_markup_scripts_and_other_hosts(near: Window) -> None:
    page = near.page
    tried = {
        "markup": "() => { document.body.innerHTML = '<p>x</p>'; }",
        "another policy": "() => { trustedTypes.createPolicy('other', { createHTML: (x) => x }); }",
        "the same policy twice": "() => { trustedTypes.createPolicy('cloister-markdown', { createHTML: (x) => x }); }",
        "a script's address": "() => { document.createElement('script').src = '/v1/models'; }",
    }
    for what, script in tried.items():
        refused = page.evaluate(
            f"() => {{ try {{ ({script})(); return ''; }} catch (error) {{ return error.name; }} }}"
        )
        assert refused == "TypeError", what
    elsewhere = page.evaluate("() => fetch('http://127.0.0.1:1/').then(() => '', (error) => error.name)")
    assert elsewhere == "TypeError"
    loaded = page.evaluate(
        "() => new Promise((done) => { const one = new Image(); one.onload = () => done('loaded');"
        " one.onerror = () => done('refused'); one.src = 'data:image/gif;base64,R0lGODlhAQABAAAAACw='; })"
    )
    assert loaded == "refused"
    assert [text for text in near.complaints if "Content Security Policy" in text]


# What is kept


def stored(page: Page) -> str:
    """All that this browser keeps for the page, as text."""
    return str(
        page.evaluate(
            """async () => {
              const open = indexedDB.open('cloister-chat');
              await new Promise((done) => { open.onsuccess = done; });
              const all = open.result.transaction('records').objectStore('records').getAll();
              await new Promise((done) => { all.onsuccess = done; });
              open.result.close();
              const text = (bytes) => String.fromCharCode(...new Uint8Array(bytes));
              const records = all.result.map((one) => one.id + text(one.iv) + text(one.data));
              return JSON.stringify([records, { ...localStorage }, { ...sessionStorage }, document.cookie]);
            }"""
        )
    )


def test_conversations_are_kept_across_a_reload_and_only_encrypted(near: Window, key_file: Path) -> None:
    near.ask(SECRET)
    near.answered(f"You said {SECRET}.")
    kept = json.loads(stored(near.page))
    assert len(kept[0]) == 1
    assert SECRET not in str(kept)
    assert list(kept[1]) == ["cloister-binding"]
    assert kept[2:] == [{}, ""]
    near.page.reload()
    near.page.wait_for_selector("body[data-ready]")
    near.page.get_by_role("button", name=SECRET, exact=True).click()
    assert (questions(near.page), answers(near.page)) == ([SECRET], [f"You said {SECRET}."])
    near.ask("More")
    near.answered("You said More.", count=2)


def test_they_survive_a_restart_of_the_proxy_but_not_the_loss_of_the_key(
    near: Window, shown: Site, key_file: Path
) -> None:
    """The page is asked for its key anew, as after a restart: there is the same, and another one where it was lost."""
    near.ask("Hello")
    near.answered("You said Hello.")
    for lost, rows in ((False, 1), (True, 0)):
        if lost:
            key_file.unlink()
        near.page.goto("about:blank")
        near.open(shown.chat.address())
        assert near.page.locator("#conversations li").count() == rows
        expect(near.page.locator("#kept")).to_contain_text("cannot be opened" if lost else "Kept in this browser")


def test_a_conversation_is_never_continued_with_another_deployment(near: Window, shown: Site, enclave: Enclave) -> None:
    near.ask(SECRET)
    near.answered(f"You said {SECRET}.")

    def another(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "deployment": "another"})

    page = near.page
    page.route("**/verification?*", another)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.get_by_role("button", name=SECRET, exact=True).click()
    expect(page.locator("#foot")).to_contain_text("held with another deployment")
    shown.traffic()
    near.ask("Go on")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    page.get_by_role("button", name="Answer again").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert answers(page) == [f"You said {SECRET}."]
    assert b"POST " not in shown.traffic()
    page.get_by_role("button", name="New conversation").click()
    near.ask("Hello")
    near.answered("You said Hello.")
    assert enclave.model.asked()[-1] == [("user", "Hello")]


def test_the_one_time_address_leaves_nothing_to_use_again(near: Window, shown: Site, browser: Browser) -> None:
    address = shown.chat.address()
    with window(browser) as first:
        first.open(address)
        assert first.page.url == address.partition("#")[0]
        first.page.go_back()
        assert address.partition("#")[2] not in first.page.url
    with window(browser) as second:
        page = second.open(address)
        expect(page.get_by_role("alert")).to_contain_text("This address was used already")
        expect(page.locator("#kept")).to_contain_text("Nothing is kept")


def test_a_browser_without_a_session_chats_and_keeps_nothing(open_window: Window, shown: Site) -> None:
    page = open_window.open(shown.chat.address().partition("#")[0])
    open_window.ask("Hello")
    open_window.answered("You said Hello.")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator("#conversations li").count() == 0


def test_where_the_proxy_asks_for_a_key_the_one_time_address_opens_all_of_the_page(
    browser: Browser, enclave: Enclave, key_file: Path
) -> None:
    policy = simulated_policy(enclave.root.read_bytes())
    with site(enclave.url, policy, key_file, own_key="k" * 43) as keyed:
        with window(browser) as near:
            page = near.open(keyed.chat.address())
            near.ask("Hello")
            near.answered("You said Hello.")
            page.reload()
            page.wait_for_selector("body[data-ready]")
            expect(page.locator("#badge")).to_have_text("Simulated")
            page.get_by_role("button", name="Hello", exact=True).click()
            assert (questions(page), answers(page)) == (["Hello"], ["You said Hello."])
            assert near.complaints == []
        with window(browser) as stranger:
            page = stranger.open(keyed.chat.address().partition("#")[0])
            expect(page.locator("#badge")).not_to_have_text("Simulated")
            assert enclave.model.asked() == [[("user", "Hello")]]


def test_a_key_that_others_can_read_is_not_used_and_said(near: Window, shown: Site, key_file: Path) -> None:
    key_file.chmod(0o644)
    near.page.reload()
    near.page.wait_for_selector("body[data-ready]")
    expect(near.page.get_by_role("alert")).to_contain_text("chmod go-rwx")
    expect(near.page.locator("#kept")).to_contain_text("Nothing is kept: the key for it cannot be had.")


def test_a_conversation_can_be_deleted(near: Window) -> None:
    near.ask("Hello")
    near.answered("You said Hello.")
    near.page.get_by_role("button", name="Delete “Hello”").click()
    expect(near.page.locator("#conversations li")).to_have_count(0)
    assert json.loads(stored(near.page))[0] == []


def test_all_can_be_exported(near: Window, tmp_path: Path) -> None:
    near.ask(SECRET)
    near.answered(f"You said {SECRET}.")
    near.page.get_by_role("button", name="Settings").click()
    with near.page.expect_download() as caught:
        near.page.get_by_role("button", name="Export all").click()
    caught.value.save_as(tmp_path / "export.json")
    (one,) = json.loads((tmp_path / "export.json").read_text())["conversations"]
    assert [(said["role"], said["content"]) for said in one["messages"]] == [
        ("user", SECRET),
        ("assistant", f"You said {SECRET}."),
    ]


def test_a_wipe_leaves_neither_conversations_nor_their_key(near: Window, key_file: Path) -> None:
    near.ask(SECRET)
    near.answered(f"You said {SECRET}.")
    old = key_file.read_bytes()
    near.page.get_by_role("button", name="Settings").click()
    near.page.get_by_role("button", name="Wipe all…").click()
    near.page.get_by_role("alertdialog").get_by_role("button", name="Wipe all", exact=True).click()
    expect(near.page.locator("#conversations li")).to_have_count(0)
    expect(near.page.locator(".message")).to_have_count(0)
    wait_for(lambda: key_file.read_bytes() != old)
    assert json.loads(stored(near.page))[0] == []
    near.ask("Fresh")
    near.answered("You said Fresh.")
    near.page.reload()
    near.page.wait_for_selector("body[data-ready]")
    assert near.page.locator("#conversations .open").all_inner_texts() == ["Fresh"]


# What is believed


def panel_text(page: Page) -> str:
    """All of the panel, tab by tab, in one line."""
    if not page.locator("#panel[open]").count():
        page.locator("#badge").click()
    texts = [page.locator("#panel").inner_text()]
    for tab in page.get_by_role("tab").all():
        tab.click()
        texts.append(page.locator("#panel-steps").inner_text())
    return " ".join(" ".join(texts).split())


def saved_document(page: Page, to: Path) -> Path:
    with page.expect_download() as caught:
        page.get_by_role("button", name="Save the document").click()
    caught.value.save_as(to)
    return to


def said_by_the_terminal(document: Path, *options: str | Path) -> str:
    """What `cloister verify --explain` says of a document."""
    ran = CliRunner().invoke(app, ["verify", str(document), "--explain", *map(str, options)])
    assert ran.exit_code in (0, 3), ran.output
    return ran.stdout


def verify_again(page: Page) -> dict[str, Any]:
    """What the proxy tells the page, which shows that from now on."""
    if not page.locator("#panel[open]").count():
        page.locator("#badge").click()
    with page.expect_response("**/verification?explain*") as caught:
        page.get_by_role("button", name="Verify again").click()
    told: dict[str, Any] = caught.value.json()
    expect(page.locator("#badge")).not_to_have_text("Checking…")
    return told


def assert_they_say_the_same(terminal: str, panel: str, told: dict[str, Any]) -> None:
    """The terminal's words stand in the panel, and what the proxy told the panel stands in the terminal: of each step,
    where that step is."""
    parts = [part for line in terminal.splitlines() for part in parts_of(line)]
    assert len(parts) > 20
    assert [part for part in parts if part.rstrip("…") not in panel] == []
    explained, flat = told["explained"], flattened(terminal)
    texts = [explained["word"], explained["platform"], explained["sentence"], explained["first_use"]]
    texts += [text for fact in explained["facts"] for text in fact]
    texts += [line for line, _ in explained["firmware"]]
    texts += [row[name] for row in explained["forecast"] for name in ("when", "date", "word")]
    texts += [row["what"][:59] for row in explained["forecast"]]
    assert [text for text in texts if text not in flat] == []
    lines = (told.get("error") or {}).get("policy_change", "").splitlines()
    assert [line for line in lines if flattened(line) not in flat] == []
    steps = steps_of(terminal)
    assert steps.keys() == {(step["result"], step["step"]) for step in explained["steps"]}
    for step in explained["steps"]:
        missing = [text for text in words_of(step) if text not in steps[step["result"], step["step"]]]
        assert missing == [], step["step"]


def flattened(text: str) -> str:
    return " ".join(text.split())


def parts_of(line: str) -> list[str]:
    """The words of a line of the terminal, without those between; a heading has none."""
    if line.endswith(":") and not line.startswith(" "):
        return []
    parts = re.split(r"\s{2,}|: |(?<=^  pass) |(?<=^  FAIL) ", line)
    return [part.strip() for part in parts if part.strip()]


def steps_of(terminal: str) -> dict[tuple[str, str], str]:
    """By result and name, all that the terminal says of a step."""
    results = {"checked:": "pass", "not proved:": "not proved", "failed:": "FAIL"}
    found: dict[tuple[str, str], str] = {}
    result, name = "", ""
    for line in terminal.splitlines():
        if not line.startswith(" "):
            result = results.get(line, "")
        elif result:
            if not line.startswith("   "):
                name = re.sub("^  (pass|FAIL) ", "", line).split()[0].rstrip(":")
            found[result, name] = flattened(f"{found.get((result, name), '')} {line}")
    return found


def words_of(step: dict[str, str]) -> list[str]:
    """What there is to say of a step, as long as the terminal's lines are."""
    values = {"pass": [step["got"][:43]], "FAIL": [step["expected"][:199], step["got"][:199]]}.get(step["result"], [])
    return [flattened(text) for text in (*values, step["hint"][:199], step["meaning"], step["remedy"])]


def test_the_panel_of_a_simulated_enclave_says_what_the_terminal_says(
    near: Window, enclave: Enclave, tmp_path: Path
) -> None:
    badge = near.page.locator("#badge")
    assert (badge.inner_text(), badge.get_attribute("class")) == ("Simulated", "badge simulated")
    expect(near.page.locator("#foot")).to_contain_text("whoever runs it can read this")
    told = verify_again(near.page)
    text = panel_text(near.page)
    document = saved_document(near.page, tmp_path / "document.json")
    assert_they_say_the_same(said_by_the_terminal(document, *enclave.trusted), text, told)
    assert "VERIFIED" not in text
    phases = near.page.locator("#panel-phases .phase").all()
    assert [phase.get_attribute("class") for phase in phases] == [*["phase passed"] * 4, "phase open"]


def test_the_panel_of_a_verified_enclave_says_what_the_terminal_says(
    open_window: Window, key_file: Path, tmp_path: Path
) -> None:
    with tdx_site(tdx_deployment(Device.open(tmp_path / "sim")), key_file) as real:
        page = open_window.open(real.chat.address())
        badge = page.locator("#badge")
        assert (badge.inner_text(), badge.get_attribute("class")) == ("Verified", "badge verified")
        told = verify_again(page)
        text = panel_text(page)
        document = saved_document(page, tmp_path / "document.json")
        policy = tmp_path / "policy.toml"
        policy.write_text(hardware.POLICY)
        with hardware.trusting_the_synthetic_root():
            terminal = said_by_the_terminal(document, "--policy", policy)
        assert_they_say_the_same(terminal, text, told)
        assert "VERIFIED tdx" in text
        assert "SIMULATED" not in text
        assert "Nothing proves who has the machine in hand" in text
        open_window.page.keyboard.press("Escape")
        open_window.ask("Good morning")
        open_window.answered("What shall we look at?")


def test_first_use_is_said_until_the_policy_was_compared(open_window: Window, enclave: Enclave, key_file: Path) -> None:
    policy = replace(simulated_policy(enclave.root.read_bytes()), trust="first-use")
    with site(enclave.url, policy, key_file) as one:
        page = open_window.open(one.chat.address())
        expect(page.locator("#first-use")).to_contain_text(f"FIRST USE {FIRST_USE}")
        assert f"FIRST USE {FIRST_USE}" in panel_text(page)


def test_an_enclave_that_is_not_trusted_hears_no_word(
    open_window: Window, enclave: Enclave, key_file: Path, tmp_path: Path
) -> None:
    """The strictest policy believes no simulator."""
    relay = Relay(int(enclave.url.rpartition(":")[2]))
    relay.start()
    with site(f"http://127.0.0.1:{relay.port}", Policy(), key_file, relay=relay) as strict:
        page = open_window.open(strict.chat.address())
        badge = page.locator("#badge")
        assert (badge.inner_text(), badge.get_attribute("class")) == ("Blocked", "badge blocked")
        open_window.ask(SECRET)
        expect(page.get_by_role("alert")).to_be_visible()
        expect(page.locator("#foot")).to_contain_text("nothing is sent")
        traffic = strict.traffic()
        assert b"GET /.well-known/cloister-attestation" in traffic
        assert b"POST " not in traffic
        assert questions(page) == [SECRET]  # nothing is lost: it can be sent again
        told = verify_again(page)
        text = panel_text(page)
        document = saved_document(page, tmp_path / "document.json")
    relay.stop()
    terminal = said_by_the_terminal(document)
    assert "NOT TRUSTED" in terminal
    assert_they_say_the_same(terminal, text, told)
    assert page.locator("#panel-phases .phase.failed").count() >= 1


def test_an_enclave_that_is_tampered_with_is_blocked_before_the_next_word(
    near: Window, shown: Site, enclave: Enclave
) -> None:
    near.ask("Hello")
    near.answered("You said Hello.")

    def tamper(document: bytes) -> bytes:
        items = dict(parse_document(document).items)
        items["statement"] = type(items["statement"])("application/json", items["statement"].content + b" ")
        return Document(items).encode()

    enclave.gateway.change = tamper
    near.page.locator("#badge").click()
    near.page.get_by_role("button", name="Verify again").click()
    expect(near.page.locator("#badge")).to_have_text("Blocked")
    near.page.keyboard.press("Escape")
    shown.traffic()
    near.ask(SECRET)
    expect(near.page.get_by_role("alert")).to_be_visible()
    traffic = shown.traffic()
    assert b"GET /.well-known/cloister-attestation" in traffic
    assert b"POST " not in traffic
    assert len(enclave.model.requests) == 1
    enclave.gateway.change = bytes
    near.page.get_by_role("button", name="Try again").click()
    near.answered(f"You said {SECRET}.", count=2)
    expect(near.page.locator("#badge")).to_have_text("Simulated")


def test_what_was_changed_is_shown_as_lines_of_a_policy_to_copy(
    open_window: Window, enclave: Enclave, key_file: Path, tmp_path: Path
) -> None:
    """They are TOML, and accept what was refused; where evidence is not genuine, none are offered."""
    root = enclave.root.read_bytes()
    with site(enclave.url, replace(simulated_policy(root), deployment="another"), key_file) as one:
        page = open_window.open(one.chat.address())
        open_window.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.locator("#badge").click()
        change = page.locator("#panel-change")
        expect(change).to_contain_text("They say what runs, not that it is right")
        assert change.locator("dt, dd").all_inner_texts() == ["expected", "another", "got", "laptop"]
        page.evaluate(AXE.read_text())
        assert page.evaluate(AXE_RUN) == []
        change.get_by_role("button", name="Copy").click()
        change.get_by_role("button", name="Copied").wait_for()
        lines = page.evaluate("navigator.clipboard.readText()")
        told = verify_again(page)
        text = panel_text(page)
        document = saved_document(page, tmp_path / "document.json")
    assert tomllib.loads(lines) == {"deployment": "laptop"}
    head = 'version = 1\ndangerously_trust_simulator = "root"\ndangerously_tolerate_insecure = ["api-keys-off"]\n'
    refusing = tmp_path / "policy.toml"
    refusing.write_text(f'{head}deployment = "another"\n')
    (tmp_path / "root").write_bytes(root)
    assert_they_say_the_same(said_by_the_terminal(document, "--policy", refusing), text, told)
    accepting = parse_policy(head + lines, read=lambda name: root)
    with site(enclave.url, accepting, key_file) as one:
        page = open_window.open(one.chat.address())
        expect(page.locator("#badge")).to_have_text("Simulated")
        page.locator("#badge").click()
        expect(page.locator("#panel-change")).to_be_hidden()
    with site(enclave.url, Policy(), key_file) as one:
        page = open_window.open(one.chat.address())
        expect(page.locator("#badge")).to_have_text("Blocked")
        page.locator("#badge").click()
        expect(page.locator("#panel-change")).to_be_hidden()


@pytest.mark.parametrize(
    "body",
    ["", "null", "[]", "{}", '{"verdict": "trusted"}', '{"verdict": "trusted", "explained": {"steps": []}}'],
)
def test_a_proof_that_says_nothing_is_no_proof(open_window: Window, shown: Site, body: str) -> None:
    """An absent step is never a passed one."""
    open_window.page.route(
        "**/verification?*", lambda route: route.fulfill(status=200, content_type="application/json", body=body)
    )
    page = open_window.open(shown.chat.address())
    assert page.locator("#badge").inner_text() == "Blocked"
    open_window.ask(SECRET)
    expect(page.get_by_role("alert")).to_be_visible()
    assert b"POST " not in shown.traffic()


def test_while_it_is_checked_every_step_is_pending(open_window: Window, shown: Site) -> None:
    open_window.page.route("**/verification?*", lambda route: None)
    page = open_window.page
    page.goto(shown.chat.address())
    page.locator("#badge").click()
    assert page.locator("#badge").inner_text() == "Checking…"
    assert page.locator("#panel-phases .phase-result").all_inner_texts() == ["pending"] * 5


# For everybody


def test_the_keyboard_is_enough(near: Window) -> None:
    page = near.page
    near.ask("Hello")
    near.answered("You said Hello.")
    page.keyboard.press("Shift+Tab")
    seen: list[str] = []
    for _ in range(40):
        name = page.evaluate(
            "() => { const at = document.activeElement;"
            " return at.getAttribute('aria-label') || at.innerText || at.id || ''; }"
        )
        seen.append(name.strip())
        page.keyboard.press("Tab")
    for name in ("New conversation", "Settings", "Simulated: show what was verified", "Copy", "Edit and ask again"):
        assert name in seen, seen
    page.locator("#badge").focus()
    page.keyboard.press("Enter")
    page.locator("#tab-key").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-code"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.id") == "tab-open"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "badge"


def test_a_screen_reader_hears_that_it_answers_and_then_the_answer(near: Window) -> None:
    region = near.page.locator("#announcer")
    assert (region.get_attribute("role"), region.get_attribute("aria-live")) == ("status", "polite")
    near.ask("Tell me a long story")
    expect(region).to_have_text("The model is answering.")
    near.page.keyboard.press("Escape")
    expect(region).to_have_text("Stopped.")
    near.ask("Hello")
    near.answered("You said Hello.", count=2)
    expect(region).to_have_text("Answer: You said Hello.")


AXE_RUN = "() => axe.run(document, { resultTypes: ['violations'] }).then((found) => found.violations)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1180, 390])
def test_axe_finds_nothing(browser: Browser, shown: Site, scheme: str, width: int) -> None:
    assert AXE.is_file(), f"{AXE} is missing: npm ci, in web/chat"
    with window(browser, color_scheme=scheme, viewport={"width": width, "height": 800}) as one:
        page = one.open(shown.chat.address())
        page.evaluate(AXE.read_text())
        found = {"start": page.evaluate(AXE_RUN)}
        one.ask("What is a nonce?")
        one.answered("RFC 9334")
        found["answer"] = page.evaluate(AXE_RUN)
        page.locator("#badge").click()
        for tab in page.get_by_role("tab").all():
            tab.click()
            found[f"panel {tab.inner_text()}"] = page.evaluate(AXE_RUN)
        page.keyboard.press("Escape")
        page.locator("#open-settings").dispatch_event("click")
        found["settings"] = page.evaluate(AXE_RUN)
    told = {
        where: [(one["id"], one["impact"], one["nodes"][0]["html"]) for one in broken]
        for where, broken in found.items()
    }
    assert told == {where: [] for where in found}


def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser: Browser, shown: Site) -> None:
    with window(browser, viewport={"width": 360, "height": 700}, has_touch=True) as one:
        page = one.open(shown.chat.address())
        fits = "() => document.documentElement.scrollWidth <= innerWidth"
        one.ask("What is a nonce?")
        one.answered("RFC 9334")
        assert page.evaluate(fits)
        page.get_by_role("button", name="Conversations").click()
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator("#side")).to_be_hidden()
        page.locator("#badge").click()
        assert page.evaluate(fits)
        assert page.locator("#panel").evaluate("one => one.scrollWidth <= one.clientWidth")


@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
def test_it_is_dark_or_light_as_the_system_says_or_the_person(
    browser: Browser, shown: Site, scheme: str, other: str
) -> None:
    paper = "() => getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(251, 250, 248)", "dark": "rgb(23, 24, 27)"}
    with window(browser, color_scheme=scheme) as one:
        page = one.open(shown.chat.address())
        assert page.evaluate(paper) == colours[scheme]
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Appearance").select_option(other)
        assert page.evaluate(paper) == colours[other]
        page.reload()
        page.wait_for_selector("body[data-ready]")
        assert page.evaluate(paper) == colours[other]
