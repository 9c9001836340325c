"""Archives in memory, as the enclave gets them, and an app in its process."""

import asyncio
import io
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloister.enclave.pyapp.app import AppConfig, PythonApp


def tar(files: Mapping[str, str | bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def wheel(files: Mapping[str, str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def memory(content: bytes) -> int:
    descriptor = os.memfd_create("section")
    os.write(descriptor, content)
    return descriptor


def python_app(code: str, *, kind: Any = "asgi", confined: bool = False, **more: Any) -> PythonApp:
    files = {"code": memory(tar({"main.py": code, **more.pop("beside", {})}))}
    files |= {name: memory(content) for name, content in more.pop("files", {}).items()}
    how = {name: more.pop(name) for name in ("tell", "dial") if name in more}
    config = AppConfig(kind=kind, entry=more.pop("entry", "main:app"), files=files, confined=confined, **more)
    return PythonApp(config, **how)


def shared(front: int | None = None) -> set[Path]:
    """What of the apps of a front (this process, or that of a number) lies in the memory that all processes share."""
    return set(Path("/dev/shm").glob(f"cloister-app-{front or os.getpid()}-*"))


async def ask(
    app: Any, path: str = "/", *, method: str = "GET", body: bytes = b"", headers: Any = (), query: bytes = b""
) -> tuple[int, list[tuple[bytes, bytes]], list[bytes]]:
    """Status, headers, and the parts of the body as they came."""
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "https",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "root_path": "",
        "headers": list(headers),
        "server": ("enclave.invalid", 443),
    }
    asked = [{"type": "http.request", "body": body, "more_body": False}]
    found: list[Any] = []

    async def receive() -> Any:
        if asked:
            return asked.pop()
        return await asyncio.get_running_loop().create_future()  # nothing more comes

    async def send(message: Any) -> None:
        found.append(message)

    await app(scope, receive, send)
    parts = [message["body"] for message in found[1:] if message["body"]]
    return found[0]["status"], found[0]["headers"], parts
