"""An app of somebody's own behind the proxy: its paths and methods are its own, and its pages stand at a name of their own."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import httpx2
import pytest
from tests.client.deployment import HANG, LAUNCH, Deployment, InnerApp, Served, Stage

from cloister.client import AsyncSession
from cloister.evidence.launch import App
from cloister.proxy import ProxyConfig, Upstream, create_proxy
from cloister.proxy.origin import Identity, app_name, origin_key
from cloister.sim import Device

KEY = bytes(32)
NAME = app_name(Identity(LAUNCH.owner_key, LAUNCH.deployment, simulated=True), KEY)
FORM = {"content-type": "application/x-www-form-urlencoded"}


@dataclass
class PersonsApp:
    """Tells what it was asked; `answer`: the fields of its head, of an HTML page."""

    answer: list[tuple[bytes, bytes]] = field(default_factory=lambda: [(b"content-type", b"text/html")])
    status: int = 200
    seen: list[dict[str, Any]] = field(default_factory=list)
    goes_on: asyncio.Event | None = None
    inner: InnerApp = field(default_factory=InnerApp)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] in ("/v1/endless", "/v1/breaks-late"):
            await self.inner(scope, receive, send)
            return
        body = (await receive()).get("body", b"")
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        told = {"method": scope["method"], "path": scope["path"], "query": scope["query_string"].decode()}
        self.seen.append({**told, "headers": headers, "body": body})
        await send({"type": "http.response.start", "status": self.status, "headers": self.answer})
        await send({"type": "http.response.body", "body": b"<p>hello</p>"})


@pytest.fixture
def app() -> PersonsApp:
    return PersonsApp()


@pytest.fixture
def own(device: Device, app: PersonsApp) -> Deployment:
    own = Deployment(device, app)
    own.launch = replace(LAUNCH, app=App("wsgi", "66" * 32))
    return own


@pytest.fixture
def served(own: Deployment, stage: Stage) -> Iterator[Served]:
    url = stage.show(own.gateway)

    def make(port: int) -> object:
        session = AsyncSession(url, policy=own.policy, pin_measurement=True)
        return create_proxy(session, ProxyConfig(port=port, app_key=KEY))

    with Served(None, port_of=make) as served:
        httpx2.get(f"{served.url}/verification", trust_env=False).raise_for_status()
        yield served


@pytest.fixture
def program(served: Served) -> Iterator[httpx2.Client]:
    """Asks under 127.0.0.1, as the built-in app's clients do."""
    with httpx2.Client(base_url=served.url, trust_env=False) as client:
        yield client


@pytest.fixture
def page(served: Served) -> Iterator[httpx2.Client]:
    """Asks at the app's own name, as a browser does that stands there."""
    headers = {"host": f"{NAME}:{served.port}", "sec-fetch-site": "same-origin"}
    with httpx2.Client(base_url=served.url, headers=headers, trust_env=False) as client:
        yield client


def test_where_a_key_is_asked_for_the_apps_name_is_one_for_its_pages_alone(
    own: Deployment, stage: Stage, app: PersonsApp
) -> None:
    url = stage.show(own.gateway)

    def make(port: int) -> object:
        session = AsyncSession(url, policy=own.policy, pin_measurement=True)
        return create_proxy(session, ProxyConfig(port=port, app_key=KEY, key="k" * 43))

    shown = {"authorization": f"Bearer {'k' * 43}"}
    with Served(None, port_of=make) as served, httpx2.Client(base_url=served.url, trust_env=False) as client:
        assert client.get("/verification", headers=shown).status_code == 200
        assert client.get("/", headers={"host": f"{NAME}:{served.port}"}).text == "<p>hello</p>"
        assert client.get("/hello").status_code == 401
        assert client.get("/hello", headers={"host": f"{NAME[1:]}:{served.port}"}).status_code == 421
        assert client.get("/hello", headers=shown).text == "<p>hello</p>"
    assert [one["path"] for one in app.seen] == ["/", "/hello"]
    assert "authorization" not in app.seen[1]["headers"]


def test_on_port_80_the_apps_address_needs_no_port(own: Deployment, stage: Stage) -> None:
    """Clients leave it out, and whoever asks there asks the app."""
    url = stage.show(own.gateway)

    def make(_port: int) -> object:
        session = AsyncSession(url, policy=own.policy, pin_measurement=True)
        return create_proxy(session, ProxyConfig(port=80, app_key=KEY))

    with Served(None, port_of=make) as served, httpx2.Client(base_url=served.url, trust_env=False) as client:
        assert client.get("/verification", headers={"host": "127.0.0.1"}).status_code == 200
        for host in (NAME, f"{NAME}:80", NAME.upper()):
            assert client.get("/", headers={"host": host}).text == "<p>hello</p>", host
        assert "proxy" in client.get("/", headers={"host": "127.0.0.1"}).json()


def test_every_path_and_method_is_the_apps(program: httpx2.Client, app: PersonsApp) -> None:
    asked = [("GET", "/hello?q=a%20b"), ("PUT", "/items/1"), ("PATCH", "/items/1"), ("DELETE", "/items/1")]
    for method, path in [*asked, ("OPTIONS", "/items"), ("REPORT", "/"), ("HEAD", "/chat")]:
        answer = program.request(method, path if path != "/" else "/cal/", content=b"x" if method == "PUT" else None)
        assert answer.status_code == 200, method
    seen = [(one["method"], one["path"], one["query"]) for one in app.seen]
    assert seen[:2] == [("GET", "/hello", "q=a%20b"), ("PUT", "/items/1", "")]
    assert [one[0] for one in seen[2:]] == ["PATCH", "DELETE", "OPTIONS", "REPORT", "HEAD"]
    assert app.seen[1]["body"] == b"x"


def test_bodies_arrive_as_they_were_sent(program: httpx2.Client, page: httpx2.Client, app: PersonsApp) -> None:
    for client in (program, page):
        client.post("/form", data={"a": "1"})
        client.post("/file", files={"f": ("name.bin", bytes(range(256)), "application/x-own")})
        client.post("/json", json={"a": 1})
        client.post("/none")
    types = [one["headers"].get("content-type", "").partition(";")[0] for one in app.seen[:4]]
    assert types == ["application/x-www-form-urlencoded", "multipart/form-data", "application/json", ""]
    assert (app.seen[0]["body"], json.loads(app.seen[2]["body"])) == (b"a=1", {"a": 1})
    assert bytes(range(256)) in app.seen[1]["body"]
    assert [one["body"][:2] for one in app.seen[4:]] == [one["body"][:2] for one in app.seen[:4]]


def test_what_the_proxy_says_itself_is_under_127_0_0_1_alone(
    program: httpx2.Client, page: httpx2.Client, served: Served, app: PersonsApp
) -> None:
    assert program.get("/").json()["app"] == served.app.app_address == f"http://{NAME}:{served.port}/"
    assert program.get("/verification").json()["verdict"] == "simulated"
    assert program.post("/metrics", json={}).status_code == 405
    assert app.seen == []
    for path in ("/", "/verification", "/metrics"):
        assert page.post(path, json={}).text == "<p>hello</p>"
    assert [one["path"] for one in app.seen] == ["/", "/verification", "/metrics"]


def test_a_browsers_own_navigation_opens_a_page(page: httpx2.Client, app: PersonsApp) -> None:
    for site in ("none", "same-origin"):
        asked = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
        assert page.get("/", headers=asked).text == "<p>hello</p>"
    for part in ("script", "style", "image", "iframe", "worker", "font", "empty"):
        assert page.get("/part", headers={"sec-fetch-dest": part}).status_code == 200
    assert len(app.seen) == 9


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none", "origin": "null"},
        {"sec-fetch-site": "cross-site", "origin": "null"},
        {"origin": "http://evil.example"},
        {"origin": f"http://{NAME}"},
        {"origin": f"http://{NAME}:1"},
        {"origin": "http://127.0.0.1:PORT"},
        {"origin": "http://localhost:PORT"},
        {"host": NAME},
        {"host": f"{NAME}:1"},
        {"host": "other.localhost:PORT"},
        {"host": f"evil.{NAME}:PORT"},
    ],
)
def test_no_foreign_page_asks_it_anything(
    page: httpx2.Client, served: Served, app: PersonsApp, method: str, headers: dict[str, str]
) -> None:
    put = {name: value.replace("PORT", str(served.port)) for name, value in headers.items()}
    answer = page.request(method, "/form", headers={**FORM, **put}, content=b"a=1")
    assert answer.status_code in (403, 421)
    assert app.seen == []


def test_an_apps_page_asks_nothing_under_the_proxys_own_names(
    program: httpx2.Client, served: Served, app: PersonsApp
) -> None:
    """There the built-in app's keys may be; and the web chat, another time."""
    for headers in ({"origin": f"http://{NAME}:{served.port}"}, {"sec-fetch-site": "cross-site"}):
        for path in ("/form", "/verification"):
            assert program.post(path, data={"a": "1"}, headers=headers).status_code == 403
    foreign = {"origin": "null", "sec-fetch-site": "same-origin"}  # of a document in a sandbox
    assert program.post("/form", data={"a": "1"}, headers=foreign).status_code == 403
    assert app.seen == []


def test_its_own_forms_and_cookies_work_at_its_own_name(page: httpx2.Client, served: Served, app: PersonsApp) -> None:
    cookie = b"session=abc; Domain=localhost; Path=/; HttpOnly; SameSite=Lax;domain=.enclave.invalid"
    app.answer = [(b"location", b"https://enclave.invalid/done?x=1"), (b"set-cookie", cookie), (b"Set-Cookie", b"b=2")]
    app.status = 303
    address = f"http://{NAME}:{served.port}"
    for origin in (address, "null"):
        sent = {"origin": origin, "referer": f"{address}/form", "cookie": "session=abc", "sec-fetch-dest": "document"}
        answer = page.post("/form", data={"a": "1"}, headers=sent)
        assert (answer.status_code, answer.headers["location"]) == (303, f"{address}/done?x=1")
    assert answer.headers.get_list("set-cookie") == ["session=abc; Path=/; HttpOnly; SameSite=Lax", "b=2"]
    for one in app.seen:
        assert (one["headers"]["cookie"], one["headers"]["origin"]) == ("session=abc", "https://enclave.invalid")
        assert not {"referer", "sec-fetch-dest", "sec-fetch-site"} & one["headers"].keys()


@pytest.mark.parametrize(
    ("said", "here"),
    [
        ("/next", "/next"),
        ("https://other.example/a", "https://other.example/a"),
        ("https://enclave.invalid", "http://HOST"),
        ("http://ENCLAVE.invalid//other.example/a", "http://HOST//other.example/a"),
        ("https://enclave.invalid.other.example/", "https://enclave.invalid.other.example/"),
        ("https://enclave.invalid:444/", "https://enclave.invalid:444/"),
    ],
)
def test_where_it_leads_to_inside_is_here(
    page: httpx2.Client, program: httpx2.Client, served: Served, app: PersonsApp, said: str, here: str
) -> None:
    app.answer, app.status = [(b"Location", said.encode())], 302
    assert page.get("/").headers["location"] == here.replace("HOST", f"{NAME}:{served.port}")
    assert program.get("/old").headers["location"] == here.replace("HOST", f"127.0.0.1:{served.port}")


def test_its_pages_reach_nothing_but_the_enclave_and_stay_in_no_cache(page: httpx2.Client, app: PersonsApp) -> None:
    """A script from elsewhere would read what the sealed channel hides. The app's own policy holds beside ours."""
    app.answer = [
        (b"content-type", b"text/html"),
        (b"content-security-policy", b"script-src 'self'"),
        (b"cache-control", b"public, max-age=31536000"),
        (b"access-control-allow-origin", b"*"),
        (b"alt-svc", b'h2="evil.example:443"'),
        (b"link", b"<https://evil.example/>; rel=preconnect"),
        (b"referrer-policy", b"unsafe-url"),
        (b"service-worker-allowed", b"/"),
        (b"x-own", b"1"),
    ]
    headers = page.get("/").headers
    theirs, ours = headers.get_list("content-security-policy")
    assert theirs == "script-src 'self'"
    rules = {name: set(words) for name, *words in (rule.split() for rule in ours.split(";"))}
    assert rules["default-src"] == {"'self'", "'unsafe-inline'", "'unsafe-eval'", "data:", "blob:"}
    assert rules["form-action"] == rules["base-uri"] == rules["frame-ancestors"] == {"'self'"}
    assert rules.keys() == {"default-src", "object-src", "form-action", "base-uri", "frame-ancestors"}
    assert headers.get_list("cache-control") == ["no-store"]
    assert headers.get_list("referrer-policy") == ["same-origin"]
    assert (headers["x-own"], headers["content-type"]) == ("1", "text/html")
    assert not {"access-control-allow-origin", "alt-svc", "link", "service-worker-allowed"} & set(headers)


@pytest.mark.parametrize("header", [{"sec-fetch-dest": "serviceworker"}, {"service-worker": "script"}])
def test_no_service_worker_is_installed(page: httpx2.Client, app: PersonsApp, header: dict[str, str]) -> None:
    assert "service worker" in page.get("/sw.js", headers=header).json()["error"]["message"]
    assert app.seen == []


def test_under_127_0_0_1_its_answers_are_inert_in_a_browser(program: httpx2.Client, app: PersonsApp) -> None:
    """What stood there yesterday may be the web chat today."""
    app.answer = [(b"content-type", b"text/html"), (b"set-cookie", b"a=1"), (b"content-security-policy", b"x")]
    answer = program.get("/page", headers={"sec-fetch-site": "none", "cookie": "other=service"})
    assert answer.headers.get_list("content-security-policy") == ["sandbox; default-src 'none'"]
    assert "set-cookie" not in answer.headers
    assert "cookie" not in app.seen[0]["headers"]
    assert program.get("/page", headers={"sec-fetch-dest": "script"}).status_code == 403


def test_a_stream_comes_as_it_is_made_and_ends_when_its_reader_goes(
    page: httpx2.Client, program: httpx2.Client, app: PersonsApp
) -> None:
    for client in (page, program):
        app.inner.ended.clear()
        with client.stream("GET", "/v1/endless") as answer:
            assert b"and" in next(answer.iter_raw())
        assert app.inner.ended.wait(HANG)
        with client.stream("GET", "/v1/breaks-late") as answer, pytest.raises(httpx2.RemoteProtocolError):
            answer.read()


def test_an_app_that_is_not_trusted_any_more_hears_nothing(
    page: httpx2.Client, own: Deployment, app: PersonsApp
) -> None:
    assert page.get("/").status_code == 200
    own.launch = replace(own.launch, app=App("wsgi", "77" * 32))
    own.renew_keys()
    answer = page.post("/form", data={"secret": "1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "enclave_not_trusted")
    assert len(app.seen) == 1


def test_before_anything_is_verified_and_among_several_there_is_no_app(own: Deployment, stage: Stage) -> None:
    """Then only the API is forwarded, as JSON."""
    url = stage.show(own.gateway)

    def make(names: tuple[str, ...], port: int) -> object:
        several = [Upstream(name, AsyncSession(url, policy=own.policy)) for name in names]
        return create_proxy(several, ProxyConfig(port=port, app_key=KEY))

    for names in (("one",), ("one", "two")):
        with (
            Served(None, port_of=partial(make, names)) as served,
            httpx2.Client(base_url=served.url, trust_env=False) as http,
        ):
            if len(names) > 1:
                assert http.get("/verification").status_code == 200
            assert http.get("/hello").status_code == 404
            assert http.post("/v1/x", data={"a": "1"}).status_code == 415
            assert http.get("/", headers={"host": f"{NAME}:{served.port}"}).status_code == 421
            assert served.app.app_address == ""


def test_the_name_holds_for_one_deployment_of_one_owner_and_one_user() -> None:
    one = Identity("ed25519:" + "A" * 43, "acme", simulated=True)
    others = [
        replace(one, owner_key="ed25519:" + "B" * 43),
        replace(one, deployment="acme2"),
        replace(one, simulated=False),
    ]
    names = {app_name(one, KEY), app_name(one, b"\1" * 32), *(app_name(other, KEY) for other in others)}
    assert len(names) == 5
    assert app_name(one, KEY) == app_name(replace(one), KEY)
    assert all(len(label) <= 63 and label.isalnum() for name in names for label in name.split("."))


def test_its_key_is_kept_for_this_user_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    key = origin_key()
    assert key == origin_key()
    (kept,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (kept.name, kept.stat().st_mode & 0o777, kept.read_bytes()) == ("apps.key", 0o600, key)
