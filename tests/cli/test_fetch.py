import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import run
from tests.client.conftest import device, stage
from tests.client.deployment import LAUNCH, Deployment, Stage
from typer.testing import Result

from cloister.cli import output
from cloister.evidence.launch import App
from cloister.sim import Device

__all__ = ["device", "run", "stage"]

Run = Callable[..., Result]


@dataclass
class Said:
    """An app that notes what it is asked, and answers with `parts`; `breaks` off after them."""

    parts: list[bytes] = field(default_factory=lambda: [b"hello"])
    status: int = 200
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    breaks: bool = False
    seen: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive()).get("body", b"")
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        path = scope["raw_path"].decode() + ("?" + scope["query_string"].decode() if scope["query_string"] else "")
        self.seen.append({"asked": f"{scope['method']} {path}", "headers": headers, "body": body})
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        if self.breaks:
            raise RuntimeError
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def app() -> Said:
    return Said()


@pytest.fixture
def enclave(app: Said, device: Device, stage: Stage, tmp_path: Path) -> tuple[str, list[str]]:
    """Its address, and the options that trust it."""
    own = Deployment(device, app)
    own.launch = replace(LAUNCH, app=App("asgi", "66" * 32))
    root = tmp_path / "root.pem"
    root.write_bytes(device.root_pem)
    return stage.show(own.gateway), ["--dangerously-trust-simulator", str(root)]


def test_the_answers_bytes_are_all_that_goes_to_standard_output(
    run: Run, app: Said, enclave: tuple[str, list[str]]
) -> None:
    url, trusted = enclave
    app.parts = [bytes(range(256)), b"\xff" * 40_000]
    ran = run("fetch", url, "/hello?q=a%20b", *trusted)
    assert (ran.exit_code, ran.stdout_bytes) == (0, b"".join(app.parts))
    assert ran.stderr.startswith("SIMULATED  sim, deployment acme-chat")
    assert app.seen[0]["asked"] == "GET /hello?q=a%20b"
    assert run("fetch", url, *trusted).exit_code == 0
    assert app.seen[1]["asked"] == "GET /"


@pytest.mark.parametrize(
    ("data", "media_type", "body"),
    [
        ('{"a": 1}', "application/json", b'{"a": 1}'),
        ("a=1&b=2", "application/x-www-form-urlencoded", b"a=1&b=2"),
        ("@-", "application/json", b"[1]"),
        ("@body.bin", "application/x-www-form-urlencoded", b"\0\xff" * 700_000),
    ],
)
def test_a_body_arrives_whole_and_by_its_kind(
    run: Run, app: Said, enclave: tuple[str, list[str]], data: str, media_type: str, body: bytes
) -> None:
    url, trusted = enclave
    Path("body.bin").write_bytes(b"\0\xff" * 700_000)
    assert run("fetch", url, "/form", "--data", data, *trusted, input="[1]").exit_code == 0
    (asked,) = app.seen
    assert (asked["asked"], asked["body"], asked["headers"]["content-type"]) == ("POST /form", body, media_type)


def test_method_fields_and_key_are_the_persons(run: Run, app: Said, enclave: tuple[str, list[str]]) -> None:
    url, trusted = enclave
    more = ["-X", "put", "-d", "x", "-H", "Content-Type: text/plain", "-H", "X-Own:  1 ", "--api-key", "ck-1"]
    assert run("fetch", url, "/items/1", *more, *trusted).exit_code == 0
    headers = app.seen[0]["headers"]
    assert app.seen[0]["asked"] == "PUT /items/1"
    assert (headers["content-type"], headers["x-own"], headers["authorization"]) == ("text/plain", "1", "Bearer ck-1")


def test_nothing_is_asked_of_an_enclave_that_is_not_trusted(
    run: Run, app: Said, enclave: tuple[str, list[str]]
) -> None:
    ran = run("fetch", enclave[0], "/secret", "-d", "my secret")
    assert (ran.exit_code, ran.stdout, app.seen) == (3, "", [])
    assert "my secret" not in ran.output


def test_a_terminal_obeys_nothing_of_it(
    run: Run, app: Said, enclave: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, trusted = enclave
    app.parts = ["\x1b[2J\x1b]52;c;cm0=\x07ok \u202eé".encode()]
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    assert run("fetch", url, *trusted).stdout == "[2J]52;c;cm0=ok é\n"


def test_a_refusal_of_the_app_is_printed_and_is_no_success(run: Run, app: Said, enclave: tuple[str, list[str]]) -> None:
    url, trusted = enclave
    app.status, app.parts = 404, [b"no such page"]
    ran = run("fetch", url, "/none", *trusted)
    assert (ran.exit_code, ran.stdout) == (1, "no such page")
    assert "status 404" in ran.stderr
    app.status, app.headers = 303, [(b"location", b"/next\x1b[2J".replace(b"\x1b", b""))]
    ran = run("fetch", url, "/old", *trusted)
    assert ran.exit_code == 0
    assert "leads to /next" in ran.stderr
    assert len(app.seen) == 2


def test_an_answer_that_breaks_off_is_an_error_and_no_file(
    run: Run, app: Said, enclave: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, trusted = enclave
    app.parts, app.breaks = [b"x" * 70_000], True
    assert run("fetch", url, *trusted).exit_code != 0
    assert run("fetch", url, "-o", tmp_path / "file", *trusted).exit_code != 0
    assert not (tmp_path / "file").exists()
    app.breaks = False
    ran = run("fetch", url, "-o", tmp_path / "file", *trusted)
    assert (ran.exit_code, ran.stdout, (tmp_path / "file").read_bytes()) == (0, "", b"x" * 70_000)


@pytest.mark.parametrize(
    "words",
    [
        ["hello"],
        ["//evil.example/"],
        ["/a b"],
        ["/\udcff"],
        ["/", "-X", "GET\r\nX: y"],
        ["/", "-H", "no field"],
        ["/", "-H", "X-Secret: geheim\nY: z"],
        ["/", "-d", "@missing"],
        ["/", "-o", "no/folder/file"],
    ],
)
def test_what_cannot_be_sent_or_kept_is_wrong_use(run: Run, enclave: tuple[str, list[str]], words: list[str]) -> None:
    ran = run("fetch", enclave[0], *words, *enclave[1])
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert "geheim" not in ran.output


def test_an_enclave_that_is_not_there_is_unreachable(run: Run) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert run("fetch", f"http://127.0.0.1:{bound.getsockname()[1]}").exit_code == 5
