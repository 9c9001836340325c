"""The web chat's routes, asked as a browser asks: the page for anybody, the key for a session alone."""

import base64
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from tests.client.deployment import Deployment, InnerApp, Served, Stage

from cloister.client import AsyncSession
from cloister.proxy import Chat, ProxyConfig, create_proxy

FORBIDDEN = 401


class Site:
    """A proxy with the web chat, and how many of its addresses were used."""

    def __init__(self, url: str, deployment: Deployment, key_file: Path, key: str = "") -> None:
        self.key_file = key_file
        self.begun = 0

        def make(port: int) -> object:
            self.chat = Chat(port, key_file=key_file, on_begin=self._count)
            session = AsyncSession(url, policy=deployment.policy, pin_measurement=True)
            return create_proxy(session, ProxyConfig(port=port, key=key), self.chat)

        self.served = Served(None, port_of=make)

    def _count(self) -> None:
        self.begun += 1

    def browser(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.served.url, trust_env=False)

    def token(self) -> str:
        return urlsplit(self.chat.address()).fragment


@pytest.fixture
def site(deployment: Deployment, stage: Stage, tmp_path: Path) -> Iterator[Site]:
    one = Site(stage.show(deployment.gateway), deployment, tmp_path / "chat.key")
    with one.served:
        yield one


@pytest.fixture
def browser(site: Site) -> Iterator[httpx2.Client]:
    with site.browser() as one:
        yield one


def begin(browser: httpx2.Client, token: str) -> dict[str, str]:
    """The header that the page sends from then on."""
    answer = browser.post("/chat/session", json={"token": token})
    assert answer.status_code == 200
    return {"x-cloister-binding": answer.json()["binding"]}


def test_the_page_is_there_and_asks_the_enclave_nothing(browser: httpx2.Client, deployment: Deployment) -> None:
    page = browser.get("/chat")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert browser.head("/chat/app.js").status_code == 200
    assert browser.get("/chat/app.js").headers["x-content-type-options"] == "nosniff"
    assert deployment.attested == 0


def test_the_address_is_the_page_with_the_token_out_of_every_request_line(site: Site) -> None:
    address = urlsplit(site.chat.address())
    assert (address.scheme, address.hostname, address.port) == ("http", "127.0.0.1", site.served.port)
    assert (address.path, address.query) == ("/chat", "")
    assert len(address.fragment) == 43


def test_a_token_gives_a_session_that_gets_the_key(site: Site, browser: httpx2.Client) -> None:
    bound = begin(browser, site.token())
    key = base64.b64decode(browser.get("/chat/key", headers=bound).json()["key"])
    assert len(key) == 32
    assert site.key_file.read_bytes() == key
    assert stat.S_IMODE(site.key_file.stat().st_mode) == 0o600
    assert site.begun == 1


def test_the_cookie_is_out_of_reach_of_scripts_and_of_other_sites(site: Site, browser: httpx2.Client) -> None:
    told = browser.post("/chat/session", json={"token": site.token()})
    (cookie,) = told.headers.get_list("set-cookie")
    name, _, rest = cookie.partition("=")
    assert name == f"cloister-chat-{site.served.port}"
    attributes = {part.strip() for part in rest.split(";")[1:]}
    assert attributes == {"HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=2592000"}
    assert rest.split(";")[0] not in told.text


def test_a_token_works_once(site: Site, browser: httpx2.Client) -> None:
    token = site.token()
    begin(browser, token)
    with site.browser() as other:
        answer = other.post("/chat/session", json={"token": token})
        assert (answer.status_code, answer.json()["error"]["code"]) == (FORBIDDEN, "bad_token")
        assert "set-cookie" not in answer.headers
    assert site.begun == 1


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"token": 1}', b'{"token": "\xc3\xa9"}', b"[" * 9000, b"\xff"])
def test_what_is_no_token_begins_nothing(site: Site, browser: httpx2.Client, body: bytes) -> None:
    answer = browser.post("/chat/session", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == FORBIDDEN
    assert site.begun == 0


def test_without_both_halves_of_a_session_there_is_no_key(site: Site, browser: httpx2.Client) -> None:
    bound = begin(browser, site.token())
    with site.browser() as stranger:
        for method, path in (("GET", "/chat/key"), ("POST", "/chat/wipe")):
            body: dict[str, str] | None = {} if method == "POST" else None
            for client, headers in ((stranger, {}), (stranger, bound), (browser, {})):
                answer = client.request(method, path, json=body, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (FORBIDDEN, "no_session")
                assert "key" not in answer.json()
        other = begin(stranger, site.token())
        assert browser.get("/chat/key", headers=other).status_code == FORBIDDEN
    assert not site.key_file.exists()


@pytest.mark.parametrize("cookie", ["", ";", "=", "cloister-chat-1=x", 'a="', "\xff=1"])
def test_a_cookie_header_that_is_none_is_no_session(site: Site, browser: httpx2.Client, cookie: str) -> None:
    bound = begin(browser, site.token())
    browser.cookies.clear()
    headers = [(b"cookie", cookie.encode("latin-1")), (b"x-cloister-binding", bound["x-cloister-binding"].encode())]
    assert browser.get("/chat/key", headers=headers).status_code == FORBIDDEN


@pytest.mark.parametrize("where", ["{other}; {own}", "{own};{other}"])
@pytest.mark.parametrize("other", ["bare", "a b=c", 'a="', "[x]=1", "\xff=1", "{name}=x", "x{name}=x"])
def test_what_other_services_of_this_machine_left_does_not_end_a_session(
    site: Site, browser: httpx2.Client, other: str, where: str
) -> None:
    """Cookies have no ports."""
    bound = begin(browser, site.token())
    ((name, value),) = browser.cookies.items()
    browser.cookies.clear()
    shown = where.format(other=other.format(name=name), own=f"{name}={value}").encode("latin-1")
    headers = [(b"cookie", shown), (b"x-cloister-binding", bound["x-cloister-binding"].encode())]
    assert browser.get("/chat/key", headers=headers).status_code == 200


def test_a_wipe_makes_another_key(site: Site, browser: httpx2.Client) -> None:
    bound = begin(browser, site.token())
    old = browser.get("/chat/key", headers=bound).json()["key"]
    new = browser.post("/chat/wipe", json={}, headers=bound).json()["key"]
    assert new != old
    assert browser.get("/chat/key", headers=bound).json()["key"] == new


def test_a_key_that_others_can_read_is_said(site: Site, browser: httpx2.Client) -> None:
    bound = begin(browser, site.token())
    browser.get("/chat/key", headers=bound)
    site.key_file.chmod(0o644)
    answer = browser.get("/chat/key", headers=bound)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_use")


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"sec-fetch-site": "cross-site"}, 403), ({"origin": "http://127.0.0.1:1"}, 403), ({"host": "evil.example"}, 421)],
)
def test_another_site_gets_neither_page_nor_session(site: Site, headers: dict[str, str], status: int) -> None:
    token = site.token()
    with site.browser() as browser:
        assert browser.get("/chat", headers=headers).status_code == status
        assert browser.post("/chat/session", json={"token": token}, headers=headers).status_code == status
        begin(browser, token)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/chat", 405),
        ("GET", "/chat/session", 405),
        ("POST", "/chat/key", 405),
        ("GET", "/chat/wipe", 405),
        ("GET", "/chat/", 404),
        ("GET", "/chat/assets.json", 404),
        ("GET", "/chat/../app.js", 404),
    ],
)
def test_nothing_else_is_there(site: Site, browser: httpx2.Client, method: str, path: str, status: int) -> None:
    assert browser.request(method, path, json={} if method == "POST" else None).status_code == status


def test_a_proxy_without_the_chat_serves_none(proxy: Served) -> None:
    with httpx2.Client(base_url=proxy.url, trust_env=False) as http:
        assert http.get("/chat").status_code == 404
        assert http.post("/chat/session", json={}).status_code == 404


def test_neither_cookie_nor_binding_reaches_the_enclave(
    site: Site, browser: httpx2.Client, deployment: Deployment
) -> None:
    bound = begin(browser, site.token())
    cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    assert cookie
    browser.get("/v1/models", headers={**bound, "cookie": cookie})
    assert isinstance(deployment.app, InnerApp)
    (seen,) = deployment.app.seen
    assert not seen["headers"].keys() & {"cookie", "x-cloister-binding"}


# Behind a proxy that asks for its own key

OWN_KEY = "k" * 43


@pytest.fixture
def keyed(deployment: Deployment, stage: Stage, tmp_path: Path) -> Iterator[Site]:
    one = Site(stage.show(deployment.gateway), deployment, tmp_path / "chat.key", OWN_KEY)
    with one.served:
        yield one


def test_a_browser_gets_in_by_the_one_time_address_instead_of_the_key(keyed: Site) -> None:
    with keyed.browser() as browser:
        assert browser.get("/chat").status_code == browser.get("/chat/app.js").status_code == 200
        bound = begin(browser, keyed.token())
        for path in ("/v1/models", "/verification", "/chat/key", "/"):
            assert browser.get(path, headers=bound).status_code == 200, path
        assert browser.post("/v1/echo", json={}, headers=bound).status_code == 200


def test_nobody_else_gets_further_than_the_page(keyed: Site, deployment: Deployment) -> None:
    with keyed.browser() as browser, keyed.browser() as stranger:
        bound = begin(browser, keyed.token())
        unbound = {"x-cloister-binding": "A" * 43}
        for client, headers in ((stranger, {}), (stranger, bound), (browser, {}), (browser, unbound)):
            for path in ("/v1/models", "/verification", "/metrics", "/", "/chat/key"):
                answer = client.get(path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "proxy_key"), path
                assert answer.headers["www-authenticate"] == "Bearer"
        assert stranger.post("/chat/session", json={"token": "A" * 43}).json()["error"]["code"] == "bad_token"
    assert deployment.attested == 0


def test_a_program_shows_the_key_and_the_enclave_never_sees_it(keyed: Site, deployment: Deployment) -> None:
    ways = (
        {"authorization": f"Bearer {OWN_KEY}"},
        {"x-api-key": OWN_KEY},
        {"x-api-key": OWN_KEY, "authorization": "Bearer ck-1"},
    )
    with keyed.browser() as program:
        for headers in ways:
            assert program.get("/v1/models", headers=headers).status_code == 200
        assert program.get("/v1/models", headers={"authorization": "Bearer ck-1"}).status_code == 401
    assert isinstance(deployment.app, InnerApp)
    assert [one["headers"].get("authorization") for one in deployment.app.seen] == [None, None, "Bearer ck-1"]
    assert OWN_KEY not in str(deployment.app.seen)
