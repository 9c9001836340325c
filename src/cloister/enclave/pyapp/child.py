"""The app's process: confined, unpacked, imported, then answering one request per socket that it is handed.

It tells the front what becomes of it in lines of JSON, without content: `confined` where it may connect somewhere, then
`ready`, or `failed` with an exception's class and place in the app's files. The front's end of `requests` closing means: stop.
"""

import asyncio
import contextlib
import io
import json
import os
import pkgutil
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from cloister.enclave.pyapp import confinement
from cloister.enclave.pyapp.asgi import App, Lifespan, answer
from cloister.enclave.pyapp.unpacking import unpack_code, unpack_wheels
from cloister.enclave.pyapp.wsgi import Wsgi

__all__ = ["main"]

_STOP_SECONDS = 2.0


def main() -> None:
    """`sys.argv`: the descriptors of the sockets for events and for requests."""
    events, requests = (socket.socket(fileno=int(word)) for word in sys.argv[1:3])
    sys.argv[1:] = []
    folder = ""
    try:
        setup = _read_setup(events)
        base = confinement.MEMORY if setup["confined"] else Path(setup["folder"])
        folder = str(base / "app")
        app = _prepare(setup, base, events, requests)
    except BaseException as error:  # noqa: BLE001 (the process's edge)
        _fail(events, error, folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "cloister"]:
        del sys.modules[name]  # an app may have a package of that name
    asyncio.run(_serve(app, events, requests, folder))


def _read_setup(events: socket.socket) -> dict[str, Any]:
    with events.makefile("rb") as stream:
        length = int.from_bytes(stream.read(4), "big")
        setup: dict[str, Any] = json.loads(stream.read(length))
    return setup


def _say(events: socket.socket, event: str, **fields: str) -> None:
    with contextlib.suppress(OSError):
        events.sendall(json.dumps({"event": event, **fields}).encode() + b"\n")


def _fail(events: socket.socket, error: BaseException, folder: str) -> None:
    """Without the exception's words: they may hold a secret."""
    name = str(getattr(error, "name", "") or "") if isinstance(error, ModuleNotFoundError) else ""
    place = _place(error.__traceback__, folder)
    if isinstance(error, SyntaxError) and (error.filename or "").startswith(folder):
        place = f"{Path(str(error.filename)).relative_to(folder)}:{error.lineno}"
    _say(events, "failed", error=type(error).__name__, name=name, place=place)
    os._exit(1)


def _place(trace: TracebackType | None, folder: str) -> str:
    """The last line of the app's own that was run."""
    place = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if folder and file.startswith(folder):
            place = f"{Path(file).relative_to(folder)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _prepare(setup: dict[str, Any], base: Path, events: socket.socket, requests: socket.socket) -> App:
    """The app, its code below `base`."""
    confinement.die_with_parent()
    if setup["confined"]:
        confinement.confine(memory=setup["memory"])
        _hand_back(confinement.open_ways(setup["ways"]), events, requests)
    confinement.drop_privileges()
    if cores := setup["cores"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    code, packages, temporary = base / "app", base / "packages", base / "tmp"
    for folder in (code, packages, temporary, base / "home"):
        folder.mkdir(mode=0o700)
    files: dict[str, int] = setup["files"]
    for name, unpack, folder in (("code", unpack_code, code), ("requirements", unpack_wheels, packages)):
        if name in files:
            with open(files[name], "rb") as archive:  # noqa: PTH123 (a descriptor)
                archive.seek(0)
                unpack(archive, folder)
    os.environ.clear()
    os.environ.update(_environment(setup, base))
    os.umask(0o077)
    os.chdir(code)
    sys.path += [str(code), str(packages)]
    sys.argv[:] = [""]
    for stream in (sys.stdout, sys.stderr):  # where they lead, if anywhere, is the front's affair
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    app = pkgutil.resolve_name(setup["entry"])
    return app if setup["kind"] == "asgi" else Wsgi(app)


def _hand_back(listeners: list[socket.socket], events: socket.socket, requests: socket.socket) -> None:
    """To the front, which takes what connects there: before any of the app's code runs, which may connect at once."""
    if listeners:
        socket.send_fds(requests, [b"w"], [one.fileno() for one in listeners])
        _say(events, "confined")
    for one in listeners:
        one.close()


def _environment(setup: dict[str, Any], base: Path) -> dict[str, str]:
    """Nothing of the host's. Secrets as files too, for programs that read them so."""
    secrets = base / "secrets"
    secrets.mkdir(mode=0o700)
    for name, value in setup["secrets"].items():
        path = secrets / name
        path.touch(mode=0o600)
        path.write_text(value, encoding="utf-8")
    found = {"HOME": str(base / "home"), "TMPDIR": str(base / "tmp"), "LANG": "C.UTF-8", "PATH": os.defpath}
    found |= setup["settings"] | setup["secrets"]
    found["CLOISTER_SECRETS"] = str(secrets)
    if "model" in setup["files"]:
        models = base / "models"
        models.mkdir(mode=0o700)
        model = models / Path(setup["model"]).name
        model.symlink_to(f"/proc/self/fd/{setup['files']['model']}")
        found["CLOISTER_MODEL"] = str(model)
    return found


async def _serve(app: App, events: socket.socket, requests: socket.socket, folder: str) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    running: set[asyncio.Task[None]] = set()
    lifespan = Lifespan(app)

    def take() -> None:
        try:
            message, handed, _flags, _address = socket.recv_fds(requests, 1, 1)
        except OSError:
            message, handed = b"", []
        if not message:
            loop.remove_reader(requests)
            stopped.set()
        for descriptor in handed:
            task = asyncio.create_task(answer(app, socket.socket(fileno=descriptor), lifespan.state))
            running.add(task)
            task.add_done_callback(running.discard)

    if not isinstance(app, Wsgi):
        try:
            await lifespan.start()
        except Exception as error:  # noqa: BLE001 (the process's edge)
            _fail(events, error, folder)
    loop.add_reader(requests, take)
    _say(events, "ready")
    await stopped.wait()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(lifespan.stop(), _STOP_SECONDS)
    os._exit(0)  # whatever threads the app has left
