"""The API over real HTTP on loopback; the enclaves alone are scripted."""

import base64
import hashlib
import random
import socket
import threading
from typing import Any

import httpx2
import pytest
from starlette.routing import Route
from tests.host.conftest import Served
from tests.host.stage import CONFIG, GIB, OWNER, FakeBackend, eventually, launch_of

from cloister.host.access import PUBLIC
from cloister.host.page import CONTENT_SECURITY_POLICY

CONTENT = random.Random(2).randbytes(3_000_000)
NAME = hashlib.sha256(CONTENT).hexdigest()


def wanted(name: str = "one", **more: Any) -> dict[str, Any]:
    launch = more.pop("launch", launch_of())
    return {
        "name": name,
        "launch": base64.b64encode(launch).decode(),
        "config": base64.b64encode(CONFIG).decode(),
        "model": "tiny",
        "memory_bytes": GIB,
        "cores": 1,
        **more,
    }


def routes(served: Served) -> list[tuple[str, str]]:
    found = []
    for route in served.app._app.routes:
        assert isinstance(route, Route)
        found += [(method, route.path) for method in route.methods or ()]
    return found


# Who may ask


def test_every_route_but_the_public_ones_asks_for_a_token(served: Served) -> None:
    asked = 0
    for method, path in routes(served):
        if method == "HEAD":
            continue
        address = path.replace("{name}", "one").replace("{sha256}", NAME)
        answer = served.stranger.request(method, address, content=b"x")
        public = (method, path) in PUBLIC
        assert (answer.status_code != 401) == public, (method, path)
        asked += not public
    assert asked > 12


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v2/apps", "/v1/apps/../apps", "/healthz/", "/console/../v1/apps", "//v1/apps"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_what_is_no_route_is_refused_the_same_way(served: Served, method: str, path: str) -> None:
    assert served.stranger.request(method, path).status_code == 401


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Basic me",
        "Bearer me",
        "Bearer \udcff",
        "bearer cloister-host-",
        "Token x",
        "Bearer a b",
    ],
)
def test_what_is_no_token_opens_nothing(served: Served, authorization: str) -> None:
    headers = [(b"authorization", authorization.encode(errors="surrogateescape"))]
    assert served.stranger.get("/v1/apps", headers=headers).status_code == 401


def test_a_tokens_digest_or_half_or_double_opens_nothing(served: Served) -> None:
    (record,) = served.stage.store.tokens()
    token = served.client.headers["authorization"].partition(" ")[2]
    for word in (record.sha256, token[:-1], token + token, token + "=", token.lower()):
        assert served.stranger.get("/v1/apps", headers={"authorization": f"Bearer {word}"}).status_code == 401
    twice = [("authorization", f"Bearer {token}"), ("authorization", f"Bearer {token}")]
    assert served.stranger.get("/v1/apps", headers=twice).status_code == 401
    assert served.stranger.get("/v1/apps", headers={"authorization": f"bearer {token}"}).status_code == 200
    for other in ({"cookie": f"token={token}"}, {"x-api-key": token}):
        assert served.stranger.get(f"/v1/apps?token={token}", headers=other).status_code == 401


def test_a_removed_token_opens_nothing_from_then_on(served: Served) -> None:
    assert served.client.get("/v1/apps").status_code == 200
    served.stage.store.remove_token("me")
    assert served.client.get("/v1/apps").status_code == 401


def test_a_body_without_a_token_is_not_read(served: Served) -> None:
    parts = httpx2.URL(str(served.stranger.base_url))
    with socket.create_connection(("127.0.0.1", parts.port or 0), timeout=60) as client:
        client.sendall(
            f"PATCH /v1/uploads/{NAME} HTTP/1.1\r\nHost: x\r\nUpload-Offset: 0\r\nContent-Length: 1000000\r\n\r\n".encode()
        )
        assert client.recv(100).startswith(b"HTTP/1.1 401 ")


# Bundles


def upload(served: Served, content: bytes, offset: int, name: str = NAME) -> httpx2.Response:
    return served.client.patch(f"/v1/uploads/{name}", content=content, headers={"upload-offset": str(offset)})


def test_a_bundle_goes_up_in_pieces(served: Served) -> None:
    begun = served.client.post("/v1/uploads", json={"sha256": NAME, "size": len(CONTENT)})
    assert begun.json() == {"sha256": NAME, "size": len(CONTENT), "offset": 0, "complete": False}
    assert upload(served, CONTENT[:1_500_000], 0).json()["offset"] == 1_500_000
    assert served.client.get(f"/v1/uploads/{NAME}").json()["offset"] == 1_500_000
    assert upload(served, CONTENT[1_500_000:], 1_500_000).json()["complete"] is True
    assert served.stage.bundles.path(NAME).read_bytes() == CONTENT


def test_what_arrived_of_a_cut_upload_is_kept(served: Served) -> None:
    served.client.post("/v1/uploads", json={"sha256": NAME, "size": len(CONTENT)})
    parts = httpx2.URL(str(served.client.base_url))
    head = (
        f"PATCH /v1/uploads/{NAME} HTTP/1.1\r\nHost: x\r\nUpload-Offset: 0\r\nContent-Length: {len(CONTENT)}\r\n"
        f"Authorization: {served.client.headers['authorization']}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", parts.port or 0), timeout=60) as client:
        client.sendall(head.encode() + CONTENT[:2_000_000])
    eventually(lambda: served.client.get(f"/v1/uploads/{NAME}").json()["offset"] == 2_000_000)
    eventually(lambda: upload(served, b"", 2_000_000).status_code == 200)
    assert upload(served, CONTENT[2_000_000:], 2_000_000).json()["complete"] is True


def test_wrong_bytes_offsets_and_names_are_problems(served: Served) -> None:
    served.client.post("/v1/uploads", json={"sha256": NAME, "size": len(CONTENT)})
    assert upload(served, b"x", 5).status_code == 409
    assert served.client.patch(f"/v1/uploads/{NAME}", content=b"x").status_code == 400
    assert upload(served, b"x", 0, "ab" * 32).status_code == 404
    assert upload(served, b"x", 0, "..%2Fhost.db").status_code in (400, 404)
    wrong = upload(served, bytes(len(CONTENT)), 0)
    assert (wrong.status_code, wrong.json()["error"]) == (422, "Malformed")
    assert wrong.headers["content-type"] == "application/problem+json"
    assert served.client.get(f"/v1/uploads/{NAME}").status_code == 404


def test_a_full_disk_is_507_and_apps_go_on(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.client.post("/v1/apps", json=wanted())
    served.client.post("/v1/uploads", json={"sha256": NAME, "size": len(CONTENT)})
    monkeypatch.setattr(served.stage.bundles, "_free", lambda _: 0)
    full = served.client.post("/v1/uploads", json={"sha256": "0" * 64, "size": 10})
    assert (full.status_code, full.json()["error"]) == (507, "HostFull")
    eventually(lambda: served.client.get("/v1/apps/one").json()["state"] == "ready")


# Apps


def test_an_apps_life(served: Served) -> None:
    made = served.client.post("/v1/apps", json=wanted())
    assert made.status_code == 201
    assert made.json()["owner"] == OWNER
    assert made.json()["deployed_by"] == "me"
    eventually(lambda: served.client.get("/v1/apps/one").json()["state"] == "ready")
    assert [app["name"] for app in served.client.get("/v1/apps").json()["apps"]] == ["one"]
    assert served.client.post("/v1/apps", json=wanted()).status_code == 409
    assert served.client.post("/v1/apps/one/stop").json()["state"] == "stopped"
    assert served.client.post("/v1/apps/one/restart").status_code == 200
    assert served.client.put("/v1/apps/one/expiry", json={"expires_at": 5000}).json()["expires_at"] == 5000
    assert served.client.put("/v1/apps/one/expiry", json={"expires_at": None}).json()["expires_at"] is None
    kinds = [line["kind"] for line in served.client.get("/v1/apps/one/logs").json()["lines"]]
    assert kinds[:3] == ["deployed", "starting", "ready"]
    assert served.client.delete("/v1/apps/one").status_code == 204
    assert served.client.get("/v1/apps/one").status_code == 404


@pytest.mark.parametrize(
    "change",
    [
        {"name": 5},
        {"name": None},
        {"launch": b"\xff"},
        {"cores": "1"},
        {"cores": True},
        {"memory_bytes": -1},
        {"memory_bytes": 1.5},
        {"expires_at": "tomorrow"},
        {"expires_at": 1e300},
        {"restart": "sometimes"},
        {"bundle": 7},
        {"model": ["tiny"]},
        {"config": "not base64!"},
    ],
    ids=str,
)
def test_what_is_no_deployment_is_a_problem_not_a_crash(served: Served, change: dict[str, Any]) -> None:
    answer = served.client.post("/v1/apps", json=wanted(**change))
    assert answer.status_code in (400, 422)
    assert served.client.get("/v1/apps").json() == {"apps": []}


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"a":' * 20_000, b"x" * (1 << 21)])
def test_what_is_no_object_is_a_problem(served: Served, body: bytes) -> None:
    assert served.client.post("/v1/apps", content=body).status_code == 400


def test_new_lines_are_waited_for(served: Served) -> None:
    served.client.post("/v1/apps", json=wanted())
    eventually(lambda: served.client.get("/v1/apps/one").json()["state"] == "ready")
    last = served.client.get("/v1/apps/one/logs").json()["lines"][-1]["seq"]
    got: list[Any] = []
    asking = threading.Thread(
        target=lambda: got.extend(served.client.get(f"/v1/apps/one/logs?after={last}&wait=25").json()["lines"])
    )
    asking.start()
    served.stage.store.log("one", 1.0, "ready", "again")
    asking.join(60)
    assert [line["text"] for line in got] == ["again"]
    assert served.client.get("/v1/apps/none/logs").status_code == 404
    assert served.client.get("/v1/apps/one/logs?after=x").status_code == 400


def test_metrics_name_apps_and_nothing_of_theirs(served: Served, backend: FakeBackend) -> None:
    backend.script = lambda _: [{"event": "ready", "model": "a-marked-word"}]
    served.client.post("/v1/apps", json=wanted())
    eventually(lambda: 'cloister_app_up{app="one"} 1' in served.client.get("/metrics").text)
    assert "a-marked-word" not in served.client.get("/metrics").text


def test_the_host_says_what_it_has(served: Served) -> None:
    host = served.client.get("/v1/host").json()
    assert (host["platform"], host["cores"], host["memory_bytes"]) == ("sim", 2, 4 * GIB)


# The console


def console_session(served: Served) -> str:
    address = served.client.post("/v1/console").json()["path"]
    path, _, token = address.partition("#")
    assert path == "/console"
    answer = served.stranger.post("/console/session", json={"token": token})
    assert served.stranger.post("/console/session", json={"token": token}).status_code == 401  # once
    return str(answer.json()["session"])


def test_a_console_reads_and_changes_nothing(served: Served) -> None:
    served.client.post("/v1/apps", json=wanted())
    headers = {"authorization": f"Bearer {console_session(served)}"}
    for method, path in routes(served):
        address = path.replace("{name}", "one").replace("{sha256}", NAME)
        answer = served.stranger.request(method, address, headers=headers, content=b"{}")
        if method == "GET":
            assert answer.status_code in (200, 404), path
        elif path != "/console/session" and method != "HEAD":
            assert answer.status_code == 401, (method, path)


def test_a_console_ends_with_the_token_that_opened_it(served: Served) -> None:
    headers = {"authorization": f"Bearer {console_session(served)}"}
    unused = served.client.post("/v1/console").json()["path"].partition("#")[2]
    assert served.stranger.get("/v1/apps", headers=headers).status_code == 200
    served.stage.store.remove_token("me")
    assert served.stranger.get("/v1/apps", headers=headers).status_code == 401
    late = served.stranger.post("/console/session", json={"token": unused}).json()["session"]
    assert served.stranger.get("/v1/apps", headers={"authorization": f"Bearer {late}"}).status_code == 401


def test_of_a_stranger_no_more_is_held_than_a_token_may_have(served: Served) -> None:
    for spaces, status in ((3000, 401), (5000, 400)):
        answer = served.stranger.post("/console/session", content=b'{"token": "x"' + b" " * spaces + b"}")
        assert answer.status_code == status


def test_a_consoles_time_ends(served: Served) -> None:
    headers = {"authorization": f"Bearer {console_session(served)}"}
    assert served.stranger.get("/v1/apps", headers=headers).status_code == 200
    address = served.client.post("/v1/console").json()["path"]
    served.now[0] = 12 * 3600.0
    assert served.stranger.get("/v1/apps", headers=headers).status_code == 401
    late = {"token": address.partition("#")[2]}
    assert served.stranger.post("/console/session", json=late).status_code == 401


def test_the_page_is_public_and_strict(served: Served) -> None:
    for path, kind in (("", "text/html"), ("/page.js", "text/javascript"), ("/style.css", "text/css")):
        answer = served.stranger.get(f"/console{path}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert "unsafe" not in CONTENT_SECURITY_POLICY
    html = served.stranger.get("/console").text
    assert "style=" not in html
    assert html.count("<script") == 1
    assert "://" not in html.replace("http://www.w3.org", "")
