"""An app's whole life on a real host: real daemon, real enclave on simulated hardware, the command line as typed."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from tests.host.stage import eventually
from tests.system.shell import Shell, free_port

from cloister.cli.policy_file import load_policy
from cloister.client import AUTHORITY, SealedTransport, Session

CODE_CANARY = "canary-in-the-code-7c1f"
SECRET_CANARY = "canary-in-a-secret-91ab"
QUESTION_CANARY = "canary-in-a-question-55e0"
APP = f'''
import os
MARK = "{CODE_CANARY}"
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
    """A daemon that can be killed and started anew on the same state."""

    def __init__(self, shell: Shell, options: str = "", scheme: str = "http") -> None:
        self.shell = shell
        self.port = free_port()
        first = 20_000 + self.port % 10_000  # below those that the kernel hands out
        self.command = f"cloister host --port {self.port} --ports {first}-{first + 20} {options}"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None

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

    def do(self, command: str, *, code: int = 0) -> "subprocess.CompletedProcess[str]":
        done = self.shell.run(command, timeout=300)
        assert done.returncode == code, (command, done.stdout, done.stderr)
        return done

    def reaches(self, state: str, name: str = "words") -> None:
        """Within two minutes."""
        until = time.monotonic() + 120
        while (app := self.app(name))["state"] != state:
            assert time.monotonic() < until, (app["state"], app["detail"], self.do(f"cloister logs {name}").stdout)

    def app(self, name: str = "words") -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.do(f"cloister status {name} --json").stdout)
        return found


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    one = Host(Shell(tmp_path))
    one.start()
    token = one.do("cloister host token add me").stdout.strip()
    one.do(f"echo {token} | cloister login {one.url}")
    yield one
    one.end(signal.SIGTERM)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    folder = tmp_path / "words"
    folder.mkdir()
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


def memory_of(pid: int) -> Iterator[bytes]:
    """What a process can read of its own memory, piece by piece."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) r", line)
            if match and "[v" not in line:
                start, end = int(match[1], 16), int(match[2], 16)
                try:
                    memory.seek(start)
                    yield memory.read(end - start)
                except (OSError, ValueError, OverflowError):
                    continue


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] + [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
        if int(task.name) != pid
    ]


def gone(processes: list[int]) -> None:
    eventually(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in processes))


def test_an_app_is_deployed_asked_stopped_restarted_and_removed(host: Host, words: Path, tmp_path: Path) -> None:
    told = json.loads(host.do("cloister deploy words --json").stdout)
    assert told["app"]["state"] == "ready"
    assert told["verification"]["deployment"] == "words"
    answer = f"/{QUESTION_CANARY} {SECRET_CANARY[-4:]} {CODE_CANARY[-4:]}"
    assert ask(told) == answer
    assert 0 < told["app"]["expires_at"] - time.time() <= 2 * 86400

    # The operator holds nothing of it: not on the disk, not in the daemon's memory, not in what it shows.
    canaries = [CODE_CANARY.encode(), SECRET_CANARY.encode(), QUESTION_CANARY.encode()]
    state = tmp_path / ".local" / "state" / "cloister"
    kept = [path.read_bytes() for path in (state / "host").rglob("*") if path.is_file()]
    assert any(content.startswith(b"cloister-bundle\0") for content in kept)
    shown = [host.do(f"cloister {command}").stdout.encode() for command in ("list", "status words", "logs words")]
    assert host.process is not None
    held = list(memory_of(host.process.pid))
    assert any(told["app"]["launch_sha256"].encode() in piece for piece in held)  # the search does find things
    for canary in canaries:
        assert not any(canary in content for content in [*kept, *shown, *held])

    assert json.loads(host.do("cloister stop words --json").stdout)["state"] == "stopped"
    with httpx2.Client(trust_env=False) as client:
        assert client.get(told["app"]["address"]).status_code == 503
    again = json.loads(host.do("cloister restart words --json").stdout)
    assert again["url"] == told["url"]
    assert ask(again) == answer
    second = json.loads(host.do("cloister deploy words --json").stdout)
    assert (second["app"]["release"], second["url"]) == (2, told["url"])
    assert ask(second) == answer
    host.do("cloister remove words --yes")
    assert json.loads(host.do("cloister list --json").stdout) == []
    assert list((state / "host" / "bundles").iterdir()) == []


def test_a_missing_secret_is_said_before_anything_is_uploaded(host: Host, words: Path, tmp_path: Path) -> None:
    (words / "secrets.toml").unlink()
    assert "WORD" in host.do("cloister deploy words", code=2).stderr
    assert json.loads(host.do("cloister list --json").stdout) == []
    assert list((tmp_path / ".local/state/cloister/host/bundles").iterdir()) == []


def test_a_killed_enclave_waits_for_a_new_release_and_nobody_else_can_give_it(host: Host, words: Path) -> None:
    told = json.loads(host.do("cloister deploy words --json").stdout)
    assert host.process is not None
    for child in children_of(host.process.pid):
        os.kill(child, signal.SIGKILL)
    host.reaches("waiting")
    owner_key = host.shell.home / ".local/state/cloister/owner.pem"
    kept = owner_key.read_bytes()
    owner_key.unlink()
    assert host.do("cloister restart words", code=3).stderr  # another owner's key
    owner_key.write_bytes(kept)
    owner_key.chmod(0o600)
    again = json.loads(host.do("cloister restart words --json").stdout)
    assert ask(again) == ask(told)


def test_a_host_that_is_killed_at_random_moments_keeps_every_app(host: Host, words: Path) -> None:
    chance = random.Random(6)
    host.do("cloister deploy words")
    host.do("cloister deploy --model tiny --name public --platform sim")
    port = host.app()["port"]
    for _ in range(4):
        assert host.process is not None
        enclaves = children_of(host.process.pid)
        time.sleep(chance.random() * 2)
        host.end(signal.SIGKILL)
        gone(enclaves)
        host.start()
        assert {app["name"] for app in json.loads(host.do("cloister list --json").stdout)} == {"words", "public"}
    host.reaches("ready", "public")
    host.reaches("waiting")
    assert host.app()["port"] == port
    assert QUESTION_CANARY in ask(json.loads(host.do("cloister restart words --json").stdout))


def certificate(folder: Path) -> None:
    """For 127.0.0.1, signed by itself: `host.pem` and `host.key`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "host")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "host.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "host.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def test_a_host_with_a_certificate_speaks_tls_and_only_to_who_knows_it(tmp_path: Path) -> None:
    certificate(tmp_path)
    host = Host(Shell(tmp_path), "--cert host.pem --key host.key", "https")
    host.start()
    try:
        token = host.do("cloister host token add me").stdout.strip()
        host.do(f"echo {token} | cloister login {host.url}", code=5)
        host.do(f"echo {token} | cloister login {host.url} --ca host.pem")
        assert json.loads(host.do("cloister status --json").stdout)["platform"] == "sim"
        host.do(f"echo {token} | cloister login http://127.0.0.1:{host.port}", code=5)
    finally:
        host.end(signal.SIGTERM)
