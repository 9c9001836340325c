"""A hub on a loopback port: the endpoints that fetching a model uses, with faults to order."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = "acme/toy-GGUF"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`cuts`: after how many bytes the next answers break off. `requests`: (path, Range header) as they came."""

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    authorizations: list[tuple[str, str]] = field(default_factory=list)
    announced: dict[str, str] = field(default_factory=dict)
    status: int = 200
    ranges: bool = True
    revision: str = REVISION
    url: str = ""

    def info(self) -> dict[str, Any]:
        return {"id": REPOSITORY, "sha": self.revision, "siblings": [self._sibling(name) for name in self.files]}

    def _sibling(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        sha256 = self.announced.get(name, hashlib.sha256(content).hexdigest())
        return {
            "rfilename": name,
            "size": len(content),
            "blobId": "0" * 40,
            "lfs": {"sha256": sha256, "size": len(content), "pointerSize": 130},
        }

    def downloads(self) -> list[str]:
        return [ranges for path, ranges in self.requests if path.startswith("/cdn/")]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.hub.requests.append((self.path, self.headers.get("Range", "")))
        self.hub.authorizations.append((self.path, self.headers.get("Authorization", "")))
        if self.hub.status != 200:
            self._answer(self.hub.status, b"no")
        elif self.path.startswith(f"/api/models/{REPOSITORY}"):
            self._answer(200, json.dumps(self.hub.info()).encode(), {"Content-Type": "application/json"})
        elif found := re.fullmatch(rf"/{REPOSITORY}/resolve/{self.hub.revision}/(.+)", self.path):
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
            self._answer(302, b"", {"Location": f"{elsewhere}/cdn/{found.group(1)}"})
        elif self.path.startswith("/cdn/"):
            self._send_file(self.hub.files[self.path.removeprefix("/cdn/")])
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, content: bytes) -> None:
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.hub.ranges else 0
        self.send_response(206 if self.hub.ranges else 200)
        if self.hub.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        until = self.hub.cuts.pop(0) if self.hub.cuts else len(content)
        self.wfile.write(content[start : start + until])
        self.close_connection = True


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cloister" / "models"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("cloister.models.download._PAUSE", 0.0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()
