import asyncio
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.enclave.pyapp.archives import ask, python_app, shared, tar, wheel

from cloister.enclave.pyapp.app import _Running, can_confine
from cloister.errors import EngineDied, WrongUse

pytestmark = pytest.mark.anyio

ECHO = """
import json, os, sys
async def app(scope, receive, send):
    if scope["type"] != "http": return
    message = await receive()
    found = {"method": scope["method"], "path": scope["path"], "query": scope["query_string"].decode(),
             "body": message["body"].decode(), "headers": [[n.decode(), v.decode()] for n, v in scope["headers"]]}
    await send({"type": "http.response.start", "status": 201, "headers": [(b"X-Kind", b"echo")]})
    await send({"type": "http.response.body", "body": json.dumps(found).encode()})
"""


async def test_a_request_reaches_the_app_and_its_answer_comes_back() -> None:
    app = python_app(ECHO)
    await app.start()
    try:
        headers = [(b"host", b"enclave.invalid"), (b"x-a", b"1")]
        answer = await ask(app, "/a b", method="POST", body=b"hello", headers=headers, query=b"q=1")
    finally:
        await app.close()
    assert answer[0] == 201
    assert answer[1] == [(b"x-kind", b"echo")]
    assert json.loads(b"".join(answer[2])) == {
        "method": "POST",
        "path": "/a b",
        "query": "q=1",
        "body": "hello",
        "headers": [["host", "enclave.invalid"], ["x-a", "1"]],
    }


async def test_lifespan_state_reaches_each_request() -> None:
    code = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        scope["state"]["word"] = "begun"
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["state"]["word"].encode()})
"""
    app = python_app(code)
    await app.start()
    try:
        assert (await ask(app))[2] == [b"begun"]
    finally:
        await app.close()


async def test_a_stream_leaves_part_by_part() -> None:
    """The second part is made only after the first has been seen."""
    code = """
import asyncio, os
async def app(scope, receive, send):
    if scope["type"] != "http": return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"first", "more_body": True})
    while not os.path.exists(SEEN): await asyncio.sleep(0.01)
    await send({"type": "http.response.body", "body": b"second"})
"""
    seen = Path(f"/dev/shm/cloister-seen-{os.getpid()}")
    app = python_app(code.replace("SEEN", repr(str(seen))))
    await app.start()
    parts = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, object]) -> None:
        if part := message.get("body"):
            parts.append(part)
            await asyncio.to_thread(seen.touch)

    scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "https", "path": "/", "raw_path": b"/"}
    scope |= {"query_string": b"", "root_path": "", "headers": [], "server": ("enclave.invalid", 443)}
    try:
        await app(scope, receive, send)  # type: ignore[arg-type]
    finally:
        await asyncio.to_thread(seen.unlink, missing_ok=True)
        await app.close()
    assert parts == [b"first", b"second"]


async def test_large_bodies_pass_both_ways() -> None:
    code = """
def app(environ, start_response):
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("content-type", "application/octet-stream")])
    return [body[::-1]]
"""
    app = python_app(code, kind="wsgi")
    await app.start()
    body = os.urandom(5 << 20)
    try:
        _, _, parts = await ask(app, method="POST", body=body)
    finally:
        await app.close()
    assert b"".join(parts) == body[::-1]


async def test_an_answer_is_never_lost_though_the_app_reads_no_request() -> None:
    """Closing a socket with something unread in it would reset the other end."""
    code = """
async def app(scope, receive, send):
    if scope["type"] != "http": return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"whole"})
"""
    app = python_app(code)
    await app.start()
    try:
        answers = await asyncio.gather(*(ask(app, method="POST", body=bytes(3000)) for _ in range(200)))
    finally:
        await app.close()
    assert [answer[2] for answer in answers] == [[b"whole"]] * 200


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
async def test_an_app_that_raises_breaks_its_answer_off(kind: str) -> None:
    code = "async def app(*a): raise ValueError('secret words')" if kind == "asgi" else "def app(*a): raise ValueError"
    app = python_app(code, kind=kind)
    await app.start()
    try:
        with pytest.raises(EngineDied) as caught:
            await ask(app)
    finally:
        await app.close()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "words", "place"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: nowhere_to_be_found", "main.py:1"),
        ("\nraise RuntimeError('a secret')", "RuntimeError", "main.py:2"),
        ("other = 1", "AttributeError", None),
        ("app = (", "SyntaxError", "main.py:1"),
        ("import sys; sys.exit(3)", "SystemExit", "main.py:1"),
        ("import os; os._exit(3)", "it ended", None),
    ],
)
async def test_an_app_that_cannot_start_is_named_by_class_and_place_without_its_words(
    code: str, words: str, place: str | None
) -> None:
    app = python_app(code)
    with pytest.raises(WrongUse) as caught:
        await app.start()
    assert f"({words}, {place})" in caught.value.message if place else f"({words})" in caught.value.message
    assert "a secret" not in f"{caught.value.message}{caught.value.hint}"


@pytest.mark.parametrize(
    ("then", "words"), [('raise KeyError("a secret")', "(KeyError, main.py:5)"), ("", "(RuntimeError)")]
)
async def test_a_startup_that_fails_is_named_by_class_and_place_without_its_words(then: str, words: str) -> None:
    code = f"""
async def app(scope, receive, send):
    await receive()
    await send({{"type": "lifespan.startup.failed", "message": "a secret"}})
    {then}
"""
    with pytest.raises(WrongUse) as caught:
        await python_app(code).start()
    assert words in caught.value.message
    assert "a secret" not in f"{caught.value.message}{caught.value.hint}"


async def test_it_imports_its_packages_and_none_of_ours() -> None:
    """Starlette and uvicorn are the gateway's; the app brings its own, and even one called cloister."""
    code = """
import sys, json
def app(environ, start_response):
    import cloister, packaged
    found = [cloister.__file__, packaged.NAME, "uvicorn" in sys.modules, sys.path]
    for name in ("starlette", "cryptography", "cloister.enclave"):
        try: __import__(name)
        except ImportError: continue
        found.append(name)
    start_response("200 OK", [])
    return [json.dumps(found).encode()]
"""
    packages = tar(
        {
            "packaged-1-py3-none-any.whl": wheel({"packaged/__init__.py": "NAME = 'mine'"}),
            "cloister-9-py3-none-any.whl": wheel({"cloister-9.data/purelib/cloister/__init__.py": ""}),
        }
    )
    app = python_app(code, kind="wsgi", files={"requirements": packages})
    await app.start()
    try:
        own, name, uvicorn, path, *ours = json.loads(b"".join((await ask(app))[2]))
    finally:
        await app.close()
    assert own.endswith("/packages/cloister/__init__.py")
    assert (name, uvicorn, ours) == ("mine", False, [])
    assert not [folder for folder in path if "site-packages" in folder]


async def test_secrets_and_settings_are_its_whole_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/evil")
    monkeypatch.setenv("FLASK_DEBUG", "1")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/evil")
    code = """
import os, json, stat
def app(environ, start_response):
    file = os.path.join(os.environ["CLOISTER_SECRETS"], "TOKEN")
    found = [dict(os.environ), open(file).read(), stat.S_IMODE(os.stat(file).st_mode)]
    start_response("200 OK", [])
    return [json.dumps(found).encode()]
"""
    app = python_app(code, kind="wsgi", secrets={"TOKEN": "value"}, settings={"GREETING": "hello"})
    await app.start()
    try:
        environment, secret, mode = json.loads(b"".join((await ask(app))[2]))
    finally:
        await app.close()
    assert (secret, mode) == ("value", 0o600)
    assert set(environment) == {
        "HOME",
        "TMPDIR",
        "LANG",
        "PATH",
        "TOKEN",
        "GREETING",
        "CLOISTER_SECRETS",
    }
    assert (environment["TOKEN"], environment["GREETING"]) == ("value", "hello")


def as_started(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()


async def test_no_secret_stands_in_the_command_line_or_the_first_environment() -> None:
    app = python_app(ECHO, secrets={"TOKEN": "canary-7741"})
    await app.start()
    try:
        seen = as_started(app.pid)
    finally:
        await app.close()
    assert seen
    assert b"canary-7741" not in seen


async def test_a_model_is_a_file_that_it_can_open_by_name() -> None:
    code = """
import os
def app(environ, start_response):
    start_response("200 OK", [])
    return [os.path.basename(os.environ["CLOISTER_MODEL"]).encode(), open(os.environ["CLOISTER_MODEL"], "rb").read()]
"""
    app = python_app(code, kind="wsgi", model="toy.gguf", files={"model": b"weights"})
    await app.start()
    try:
        assert (await ask(app))[2] == [b"toy.gguf", b"weights"]
    finally:
        await app.close()


async def test_it_is_started_again_when_it_dies() -> None:
    app = python_app(ECHO)
    await app.start()
    first = app.pid
    try:
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(20):
            while app.pid in (0, first):  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.02)
        assert (await ask(app))[0] == 201
    finally:
        await app.close()


async def test_one_that_did_not_start_in_time_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Any] = []
    start = _Running.start

    async def late(*given: Any) -> Any:
        starts.append(given)
        if len(starts) == 1:
            monkeypatch.setattr("cloister.enclave.pyapp.app._START_SECONDS", 0.0)
        else:
            monkeypatch.setattr("cloister.enclave.pyapp.app._START_SECONDS", 60.0)
        return await start(*given)

    app = python_app(ECHO)
    await app.start()
    first = app.pid
    try:
        monkeypatch.setattr(_Running, "start", late)
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(20):
            while app.pid in (0, first):  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.02)
        assert len(starts) == 2
    finally:
        await app.close()


async def test_too_slow_a_start_is_nobodys_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.enclave.pyapp.app._START_SECONDS", 0.0)
    before = shared()
    with pytest.raises(EngineDied, match="in time"):
        await python_app(ECHO).start()
    assert shared() == before


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_machine_that_has_no_room_for_it_keeps_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    app = python_app(ECHO)
    before = shared(), descriptors()
    monkeypatch.setattr(asyncio, "create_subprocess_exec", full)
    with pytest.raises(OSError, match="unavailable"):
        await app.start()
    assert (shared(), descriptors()) == before


async def test_closed_while_one_that_died_is_tidied_up_it_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = shared()
    tidying, stop = asyncio.Event(), _Running.stop

    async def slow(running: _Running) -> None:
        if not tidying.is_set():
            tidying.set()
            await asyncio.Event().wait()
        await stop(running)

    monkeypatch.setattr(_Running, "stop", slow)
    app = python_app(ECHO)
    await app.start()
    os.kill(app.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        await tidying.wait()
        assert shared() - before
        await app.close()
    assert shared() == before


async def test_nothing_is_left_behind() -> None:
    before = shared()
    app = python_app(ECHO)
    await app.start()
    pid = app.pid
    assert shared() - before
    await app.close()
    assert shared() == before
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


FRONT = """
import asyncio
from tests.enclave.pyapp.archives import python_app
async def main():
    app = python_app("import time\\ndef app(*a): time.sleep(99)", kind="wsgi")
    await app.start()
    print(app.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def started_and_killed() -> int:
    """The number of an app's process whose front was killed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen([sys.executable, "-c", FRONT], stdout=subprocess.PIPE, env=environment) as front:
        assert front.stdout is not None
        pid = int(front.stdout.readline())
        front.kill()
    for left in shared(front.pid):
        shutil.rmtree(left)
    return pid


async def test_it_dies_with_the_front() -> None:
    pid = await asyncio.to_thread(started_and_killed)
    async with asyncio.timeout(10):
        while alive(pid):  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.02)


CONFINED = """
import json, os, socket
def tried(what):
    try: what()
    except OSError as error: return error.errno
    return 0
def app(environ, start_response):
    def connect():
        with socket.create_connection(("127.0.0.1", PORT), 2): pass
    def away():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock: sock.connect(("192.0.2.1", 9))
    def write(path):
        with open(os.path.join(path, "cloister-canary"), "w") as file: file.write("canary")
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    found = {"cwd": os.getcwd(), "host": tried(connect), "away": tried(away), "shm": tried(lambda: write("/dev/shm")),
             "tmp": tried(lambda: write("/tmp")), "root": tried(lambda: write("/")), "home": tried(lambda: write("HERE")),
             "remount": libc.mount(None, b"/", None, 32 | 4096, None),
             "caps": [line for line in open("/proc/self/status") if line.startswith(("CapEff", "CapBnd", "NoNewPrivs"))]}
    start_response("200 OK", [])
    return [json.dumps(found).encode()]
"""


async def confined(code: str, **more: object) -> dict[str, object]:
    if not await can_confine():
        pytest.fail("these tests need namespaces: root, or user namespaces")
    app = python_app(code, kind="wsgi", confined=True, **more)
    await app.start()
    try:
        found: dict[str, object] = json.loads(b"".join((await ask(app))[2]))
    finally:
        await app.close()
    return found


def written(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.glob("cloister-canary")]


async def test_a_confined_app_writes_into_memory_alone_and_reaches_nothing(tmp_path: Path) -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    code = CONFINED.replace("PORT", str(port)).replace("HERE", str(tmp_path))
    found = await confined(code)
    server.close()
    assert found["cwd"] == "/dev/shm/app"
    assert found["shm"] == found["tmp"] == 0
    assert found["root"] != 0
    assert found["home"] != 0
    assert found["host"] != 0
    assert found["away"] != 0
    assert found["remount"] == -1
    assert [line.split()[1] for line in found["caps"]] == ["0" * 16, "0" * 16, "1"]  # type: ignore[attr-defined]
    assert written(Path("/dev/shm"), Path("/tmp"), tmp_path) == []


async def test_loopback_inside_works_for_its_own_servers() -> None:
    code = """
import json, socket
def app(environ, start_response):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 2): pass
    start_response("200 OK", [])
    return [json.dumps({"it": "works"}).encode()]
"""
    assert await confined(code) == {"it": "works"}


async def test_the_app_has_as_many_cores_as_it_may() -> None:
    code = """
import json, os
def app(environ, start_response):
    start_response("200 OK", [])
    return [json.dumps({"cores": len(os.sched_getaffinity(0)), "size": os.statvfs("/dev/shm").f_blocks * 4096}).encode()]
"""
    assert await confined(code, cores=1, memory=8) == {"cores": 1, "size": 8 << 20}
