"""The page's files: each is the one that was built, and a browser lets it do what it must and no more."""

import base64
import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from cloister.errors import WrongUse
from cloister.proxy.page import CONTENT_SECURITY_POLICY, Page

NAMES = {"index.html", "app.js", "style.css", "LICENSES.txt"}
BUILT: Any = files("cloister.proxy").joinpath("page")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in (*NAMES, "assets.json"):
        (tmp_path / name).write_bytes(BUILT.joinpath(name).read_bytes())
    return tmp_path


def test_serves_exactly_the_files_that_are_pinned() -> None:
    assert Page().paths == {"/chat", "/chat/app.js", "/chat/style.css", "/chat/LICENSES.txt"}
    assert {one.name for one in BUILT.iterdir()} == {*NAMES, "assets.json"}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_file_that_was_changed_is_not_served(copy: Path, name: str) -> None:
    Page(copy)
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(WrongUse, match=re.escape(name)):
        Page(copy)


@pytest.mark.parametrize("pins", [b"", b"{", b'{"missing.js": "sha256:00"}'])
def test_pins_that_are_none_are_refused(copy: Path, pins: bytes) -> None:
    (copy / "assets.json").write_bytes(pins)
    with pytest.raises(WrongUse):
        Page(copy)


def test_the_page_pins_its_script_and_style() -> None:
    html = BUILT.joinpath("index.html").read_text()
    for name in ("app.js", "style.css"):
        digest = base64.b64encode(hashlib.sha384(BUILT.joinpath(name).read_bytes()).digest()).decode()
        assert re.search(
            rf'<(script|link)[^>]* (src|href)="/chat/{name}"[^>]* integrity="sha384-{re.escape(digest)}"', html
        )


def test_the_page_has_no_inline_script_or_style_and_names_no_other_host() -> None:
    html = BUILT.joinpath("index.html").read_text()
    assert re.findall(r"<script(?![^>]* src=)", html) == []
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|<img|<iframe|<base|<meta http-equiv", html) == []
    assert re.findall(r"(?:https?:)?//[a-z]", html) == []


def test_the_policy_lets_the_page_talk_to_the_proxy_and_to_nobody_else() -> None:
    allowed = dict(rule.split(" ", 1) for rule in CONTENT_SECURITY_POLICY.split("; "))
    assert allowed == {
        "default-src": "'none'",  # images, fonts, frames, workers, media among them
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "cloister-markdown",
    }


@pytest.mark.parametrize(
    ("path", "media_type"),
    [("/chat", "text/html"), ("/chat/app.js", "text/javascript"), ("/chat/style.css", "text/css")],
)
def test_headers(path: str, media_type: str) -> None:
    reply = Page().get(path)
    assert reply is not None
    headers = {name.decode(): value.decode() for name, value in reply.headers}
    assert headers.pop("content-length") == str(len(reply.body))
    assert headers == {
        "content-type": f"{media_type}; charset=utf-8",
        "cache-control": "no-store",
        "content-security-policy": CONTENT_SECURITY_POLICY,
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-dns-prefetch-control": "off",
        "x-frame-options": "DENY",
    }


def test_the_pins_are_digests() -> None:
    pins = json.loads(BUILT.joinpath("assets.json").read_bytes())
    assert set(pins) == NAMES
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", pin) for pin in pins.values())
