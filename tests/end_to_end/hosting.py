"""A real host: its daemon as a process, its commands as typed, an app to deploy to it, and a look at it as its users have."""

import json
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from tests.host.stage import eventually
from tests.system.shell import Shell, free_port

from cloister.cli.operator import HostClient, Login
from cloister.cli.policy_file import load_policy
from cloister.client import AUTHORITY, SealedTransport, Session

CODE_CANARY = "canary-in-the-code-7c1f"
SECRET_CANARY = "canary-in-a-secret-91ab"
QUESTION_CANARY = "canary-in-a-question-55e0"
ANSWER = f"/{QUESTION_CANARY} {SECRET_CANARY[-4:]} {CODE_CANARY[-4:]}"
APP = f'''
import os
MARK = "{CODE_CANARY}"
print("the app's own words")
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{{environ['PATH_INFO']}} {{os.environ['WORD'][-4:]}} {{MARK[-4:]}}".encode()]
'''
APP_FILE = """
name = "words"
app = "app:app"
kind = "wsgi"
secrets = ["WORD"]
platform = "sim"
expiry = "2d"

[resources]
memory = "1G"
"""


class Host:
    """A daemon that can be killed and started anew on the same state. `prefix`: a command that runs it."""

    def __init__(self, shell: Shell, options: str = "", scheme: str = "http", prefix: str = "") -> None:
        self.shell = shell
        self.port = free_port()
        self.first = 20_000 + self.port % 10_000  # its first app's port, below those that the kernel hands out
        ports = f"{self.first}-{self.first + 20}"
        self.command = f"{prefix} cloister host --port {self.port} --ports {ports} {options}"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None
        self.token = ""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        self.process = subprocess.Popen(
            shlex.split(self.command),
            cwd=self.shell.home,
            env=self.shell.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        while not self.process.stdout.readline().startswith("ready "):
            assert self.process.poll() is None

    def end(self, how: int) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(60)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def log_in(self, add: str = "cloister host token add me") -> None:
        """`add`: what makes the token there."""
        self.token = self.do(add).stdout.strip()
        self.do(f"echo {self.token} | cloister login {self.url}")

    def do(self, command: str, *, code: int = 0) -> "subprocess.CompletedProcess[str]":
        done = self.shell.run(command, timeout=300)
        assert done.returncode == code, (command, done.stdout, done.stderr)
        return done

    @contextmanager
    def api(self) -> Iterator[HostClient]:
        with HostClient(self.url, Login(self.token)) as client:
            yield client

    def apps(self) -> dict[str, dict[str, Any]]:
        """By name."""
        with self.api() as client:
            return {app["name"]: app for app in client.get("/v1/apps")["apps"]}

    def reaches(self, state: str, name: str = "words") -> dict[str, Any]:
        """Within two minutes; the app as it is then."""
        until = time.monotonic() + 120
        with self.api() as client:
            while (app := client.get(client.app(name)))["state"] != state:
                assert time.monotonic() < until, (app["state"], app["detail"], client.get(client.app(name, "logs")))
                time.sleep(0.05)
        return app


@contextmanager
def running(folder: Path) -> Iterator[Host]:
    """A host in a home of its own, in which its user is logged in to it."""
    host = Host(Shell(folder))
    host.start()
    try:
        host.log_in()
        yield host
    finally:
        host.end(signal.SIGTERM)


def write_words(home: Path) -> Path:
    """An app that answers with what it was asked, and with ends of its secret and its code."""
    folder = home / "words"
    folder.mkdir(parents=True)
    (folder / "app.py").write_text(APP)
    (folder / "cloister.toml").write_text(APP_FILE)
    (folder / "secrets.toml").write_text(f'WORD = "{SECRET_CANARY}"\n')
    return folder


def ask(told: dict[str, Any]) -> str:
    """As a user's program does, with the policy that `deploy` wrote."""
    address = told["url"].partition("#")[0]
    policy = load_policy(Path(shlex.split(told["try"])[-1]))
    with Session(address, policy=policy) as session, httpx2.Client(transport=SealedTransport(session)) as client:
        return client.get(f"http://{AUTHORITY}/{QUESTION_CANARY}").text


def children_of(pid: int) -> list[int]:
    """Of all its threads; none of a process that has just ended."""
    try:
        lists = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for text in lists for child in text.split()]


def gone(processes: list[int]) -> None:
    """Waits until they have ended."""
    eventually(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in processes))


def told_of(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    """What a command said with `--json`."""
    found: dict[str, Any] = json.loads(done.stdout)
    return found
