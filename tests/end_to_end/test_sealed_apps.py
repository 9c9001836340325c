"""Sealed apps as an owner, a host and a client see them: three parties, each in its own process or folder.

The host here is a process of its own that is given a bundle, a launch config and an enclave's configuration, and records all
that passes through it: what it holds in memory, on disk and in its logs is searched for canaries.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.end_to_end.tenants import ALICE, ALICE_HASH
from tests.owner.wheels import FLASK, closure, lock
from tests.vendors import intel
from tests.verify import test_composition as composition
from tests.verify.world import NONCE, NOW, failures

from cloister.channel.release import ApiKeyHash
from cloister.cli.local import owner_key
from cloister.cli.sealed import LocalApp, config_for
from cloister.client import Session, http_client
from cloister.enclave.llm.llama.library import library_dir
from cloister.errors import NotTrusted, VerificationFailed
from cloister.evidence.launch import parse_launch
from cloister.models.download import resolve
from cloister.owner.appfile import read_appfile
from cloister.owner.deployment import launch_bytes, owner_name
from cloister.owner.package import Package, package
from cloister.owner.provision import contents, provision
from cloister.sim import Device, measure
from cloister.verify import Policy, verify
from cloister.verify.key_configs import X_WING_PUBLIC

CODE, SECRET, SETTING, PROMPT = (f"canary-{word}-7741-zanzibar" for word in ("code", "secret", "setting", "prompt"))

FLASK_APP = f"""
import os, socket, sys
from flask import Flask, Response, request
app = Flask(__name__)
WORD = "{CODE}"
@app.get("/health")
def health(): return "ok"
@app.post("/echo")
def echo(): return {{"said": request.get_json()["text"], "secret": os.environ["TOKEN"], "word": WORD}}
@app.get("/stream")
def stream(): return Response((f"{{n}} {{WORD}}\\n" for n in range(3)), mimetype="text/plain")
def listening():
    for fd in os.listdir("/proc/self/fd"):
        try: held = socket.socket(fileno=os.dup(int(fd)))
        except OSError: continue
        if held.family != socket.AF_UNIX and held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN): yield str(held.getsockname())
@app.get("/environment")
def environment(): return {{"names": sorted(os.environ), "listening": list(listening()), "flags": [sys.flags.isolated, sys.flags.no_user_site, sys.flags.no_site]}}
"""
FASTAPI_APP = f"""
import os
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
app = FastAPI()
@app.get("/health")
async def health(): return {{"status": "ok"}}
@app.get("/stream")
async def stream(text: str):
    async def events():
        for word in (text, os.environ["TOKEN"], "{CODE}"):
            yield f"data: {{word}}\\n\\n"
    return StreamingResponse(events(), media_type="text/event-stream")
"""

HOST = """
import base64, json, sys, threading
from pathlib import Path
from cloister.enclave.boot import Boot
from cloister.evidence.launch import launch_digest
from cloister.host.process import EnclaveProcess, listen
from cloister.host.relay import Relay
from cloister.sim import Device, measure
from cloister.enclave.llm.llama.library import library_dir
given = json.loads(sys.argv[1])
launch, config = base64.b64decode(given["launch"]), base64.b64decode(given["config"])
sock = listen("127.0.0.1", 0)
device = Device.open(Path(given["device"]))
hardware = device.launch(measure(library_dir()), launch_digest(launch))
boot = Boot(launch=launch, config=config, listen_fd=sock.fileno(), device_fd=hardware.fd, model_path="", model_name="",
            engine_dir=str(library_dir()), bundle_path=given["bundle"])
relay = Relay(sock.getsockname()[1])
relay.start()
process = EnclaveProcess(boot.encode(), (sock.fileno(), hardware.fd))
process.start()
hardware.handed_over()
sock.close()
print(json.dumps([relay.port, process.process.pid]), flush=True)
def follow():
    for event in process.events():
        print(json.dumps(event), flush=True)
threading.Thread(target=follow, daemon=True).start()
for _ in sys.stdin:
    Path(given["traffic"]).write_bytes(b"".join(record.data for record in relay.take()))
    print("written", flush=True)
process.stop()
"""


@dataclass
class Hosted:
    url: str
    enclave: int
    process: subprocess.Popen[str]
    folder: Path
    seen: bytes = b""

    def until_waiting(self) -> None:
        until = time.monotonic() + 30
        with httpx2.Client(base_url=self.url) as client:
            while self.process.poll() is None and time.monotonic() < until:
                try:
                    if client.get("/readyz").json() == {"status": "waiting"}:
                        return
                except httpx2.TimeoutException:
                    continue  # a busy machine
                except httpx2.HTTPError:
                    return  # it has ended: its events say why
                time.sleep(0.05)

    def event(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while True:
            found: dict[str, Any] = json.loads(self.process.stdout.readline())
            if found["event"] in ("ready", "failed"):
                return found

    def traffic(self) -> bytes:
        """All that passed until now; the process still lives."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        while self.process.stdout.readline() != "written\n":
            assert self.process.poll() is None
        self.seen += (self.folder / "traffic").read_bytes()
        (self.folder / "traffic").unlink()
        return self.seen


@dataclass(frozen=True)
class Owned:
    """An app and its owner's deployment of it."""

    made: Package
    folder: Path
    config: bytes
    policy: Policy
    deployment: str = "acme"

    @property
    def launch(self) -> bytes:
        return launch_bytes(
            self.made.head,
            owner_key=owner_name(owner_key()),
            deployment=self.deployment,
            release=1,
            config=self.config,
        )

    def release(self, url: str, secrets: dict[str, str]) -> None:
        given = contents(read_appfile(self.folder), self.made.keys, secrets=secrets, now=time.time())
        provision(url, policy=self.policy, owner=owner_key(), release=given)


def owned(folder: Path, state: Path, toml: str, files: dict[str, str], *, deployment: str = "acme") -> Owned:
    app_folder = folder / "app"
    app_folder.mkdir(parents=True)
    for name, content in {"cloister.toml": toml, **files}.items():
        (app_folder / name).write_text(content)
    app = read_appfile(app_folder)
    model = resolve(app.model) if app.model else None
    bundles = folder / "host"
    bundles.mkdir()
    made = package(app, bundles / "app.cloister", state=state / "cloister", model=model)
    config = config_for(made.head)
    measurement = measure(library_dir())
    policy = Policy(
        deployment=deployment,
        owner_key=owner_name(owner_key()),
        models=frozenset(made.head.manifest.models) or None,
        config=config.digest().hex(),
        app=made.head.sha256,
        platforms=("sim",),
        measurements={"sim": (measurement.components(),)},
        simulator_root=Device.open(state / "cloister" / "sim").root_pem,
        tolerate_insecure=frozenset(config.insecure),
    )
    return Owned(made, app_folder, config.encode(), policy, deployment)


@contextmanager
def hosted(own: Owned, state: Path, *, environment: dict[str, str] | None = None, **change: Any) -> Iterator[Hosted]:
    folder = own.made.path.parent
    homes = {"HOME": folder / "home", "TMPDIR": folder / "tmp"}  # below what is searched
    for home in homes.values():
        home.mkdir(exist_ok=True)
    given = {
        "launch": base64.b64encode(own.launch).decode(),
        "config": base64.b64encode(own.config).decode(),
        "bundle": str(own.made.path),
        "device": str(state / "cloister" / "sim"),
        "traffic": str(folder / "traffic"),
        **change,
    }
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", HOST, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **{name: str(home) for name, home in homes.items()}, **(environment or {})},
        )
    assert process.stdout is not None
    try:
        port, pid = json.loads(process.stdout.readline())
        host = Hosted(f"http://127.0.0.1:{port}", pid, process, folder)
        host.until_waiting()
        yield host
    finally:
        process.kill()  # the enclave then sees its standard input close
        process.communicate()


def descendants(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += descendants(int(child))
    return found


def memory_of(pid: int) -> Iterator[bytes]:
    """Every part of a process that it can write."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            if line.split()[1].startswith("rw"):
                try:
                    yield os.pread(memory.fileno(), last - first, first)
                except OSError:
                    continue  # special: no memory of its own


def files_below(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def written_by(hosted: Hosted) -> dict[Path, str]:
    """What its host and its enclave have on disk, by digest; what the host records aside."""
    recorded = (hosted.folder / "log", hosted.folder / "traffic")
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files_below(hosted.folder)
        if path not in recorded
    }


def assert_nowhere(hosted: Hosted, canaries: list[bytes]) -> None:
    """Not in what passed, what lies on disk, what was logged, what the host's process holds, nor in what any process can
    read of another's start. That the search finds what is there is seen by what the host was given."""
    given = str(hosted.folder / "app.cloister").encode()
    for canary in canaries:
        assert canary not in hosted.seen
    found = False
    for path in [*files_below(hosted.folder), *files_below(Path("/dev/shm"))]:
        content = path.read_bytes()
        found = found or content.startswith(b"cloister-bundle\0")
        assert [canary for canary in canaries if canary in content] == [], path
    assert found
    assert f"TMPDIR={hosted.folder / 'tmp'}".encode() in Path(f"/proc/{hosted.process.pid}/environ").read_bytes()
    seen, found = 0, False
    for part in memory_of(hosted.process.pid):
        seen += len(part)
        found = found or given in part
        assert [canary for canary in canaries if canary in part] == []
    assert (seen > 1 << 20, found) == (True, True)
    for pid in descendants(hosted.enclave):
        for name in ("cmdline", "environ"):
            content = Path(f"/proc/{pid}/{name}").read_bytes()
            assert [canary for canary in canaries if canary in content] == []


FLASK_TOML = """
name = "hello"
app = "main:app"
kind = "wsgi"
requirements = "requirements.txt"
health = "/health"
secrets = ["TOKEN"]
domain = "hello.example.com"
settings = { GREETING = "SETTING" }
""".replace("SETTING", SETTING)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    index = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PIP_NO_INDEX", "1")
        environment.setenv("PIP_FIND_LINKS", str(index))
        environment.setenv("PIP_CONFIG_FILE", "/dev/null")
        yield index


@pytest.fixture(scope="module")
def flask_app(tmp_path_factory: pytest.TempPathFactory, state: Path, packages: Path) -> Owned:
    """Packaged once."""
    folder = tmp_path_factory.mktemp("flask")
    requirements = lock(FLASK, packages, folder / "requirements.txt").read_text()
    return owned(folder, state, FLASK_TOML, {"main.py": FLASK_APP, "requirements.txt": requirements})


@pytest.fixture(scope="module")
def served(flask_app: Owned, state: Path) -> Iterator[Hosted]:
    """Started once, released by its owner, in an environment that means it ill."""
    environment = {"PYTHONPATH": "/evil", "FLASK_DEBUG": "1", "PYTHONSTARTUP": "/evil"}
    with hosted(flask_app, state, environment=environment) as host:
        flask_app.release(host.url, {"TOKEN": SECRET})
        assert host.event()["event"] == "ready"
        yield host


def test_of_a_flask_app_its_host_holds_no_code_secret_setting_or_prompt(flask_app: Owned, served: Hosted) -> None:
    with Session(served.url, policy=flask_app.policy) as session:
        assert session.verify().statement.aud == ("https://hello.example.com",)
    with http_client(served.url, policy=flask_app.policy) as client:
        said = client.post("/echo", json={"text": PROMPT}).json()
        assert said == {"said": PROMPT, "secret": SECRET, "word": CODE}
        assert client.get("/stream").text == f"0 {CODE}\n1 {CODE}\n2 {CODE}\n"
        environment = client.get("/environment").json()
    assert environment["flags"] == [1, 1, 1]
    assert environment["listening"] == []
    assert {"PYTHONPATH", "FLASK_DEBUG", "PYTHONSTARTUP"} & set(environment["names"]) == set()
    assert len(served.traffic()) > 5000
    assert_nowhere(served, [word.encode() for word in (CODE, SECRET, SETTING, PROMPT)])


def test_a_fastapi_apps_stream_arrives_whole(tmp_path: Path, state: Path, packages: Path) -> None:
    requirements = lock(closure("fastapi"), packages, tmp_path / "requirements.txt").read_text()
    toml = FLASK_TOML.replace("wsgi", "asgi")
    own = owned(tmp_path, state, toml, {"main.py": FASTAPI_APP, "requirements.txt": requirements})
    with hosted(own, state) as host:
        own.release(host.url, {"TOKEN": SECRET})
        assert host.event()["event"] == "ready"
        with http_client(host.url, policy=own.policy) as client:
            text = client.get("/stream", params={"text": PROMPT}).text
        events = re.findall(r"^data: (.*)$", text, re.MULTILINE)
        assert events == [PROMPT, SECRET, CODE]
        assert host.traffic()
        assert_nowhere(host, [word.encode() for word in (CODE, SECRET, PROMPT)])


def test_of_a_sealed_model_its_host_holds_no_weights_or_prompt(tmp_path: Path, state: Path) -> None:
    own = owned(tmp_path, state, 'name = "chat"\napp = "llm"\nmodel = "tiny"\n', {})
    weights = resolve("tiny").path.read_bytes()
    pieces = [weights[at : at + 64] for at in (len(weights) // 2, len(weights) - 4096)]
    with hosted(own, state) as host:
        own.release(host.url, {})
        assert host.event()["event"] == "ready"
        with http_client(host.url, policy=own.policy) as client:
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
            assert client.post("/v1/completions", json=body).status_code == 200
        assert host.traffic()
        assert_nowhere(host, [PROMPT.encode(), *pieces])


def test_a_sealed_models_api_keys_come_with_the_release(tmp_path: Path, state: Path) -> None:
    own = owned(tmp_path, state, 'name = "chat"\napp = "llm"\nmodel = "tiny"\n', {})
    config = config_for(own.made.head, api_keys=True)
    with LocalApp(own.made.path, own.made.head, config, deployment="acme") as running:
        running.start()
        keys = (ApiKeyHash("alice", ALICE_HASH),)
        given = contents(read_appfile(own.folder), own.made.keys, secrets={}, now=time.time(), api_keys=keys)
        provision(running.url, policy=running.policy, owner=running.owner, release=given)
        running.wait_ready()
        with http_client(running.url, policy=running.policy) as client:
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers={"authorization": f"Bearer {ALICE}"}).status_code == 200


# Attacks


def test_secrets_are_taken_from_nobody_but_the_owner_and_only_once(flask_app: Owned, state: Path) -> None:
    """Before the owner, by a stranger, in clear, and again: refused, and the app is the owner's all the same."""
    address = "/.well-known/cloister-release"
    headers = {"content-type": "application/octet-stream"}
    with hosted(flask_app, state) as host, httpx2.Client(base_url=host.url, timeout=60) as stranger:
        before = written_by(host)
        for junk in (b"", b'{"TOKEN": "mine"}', os.urandom(2000)):
            assert stranger.post(address, content=junk, headers=headers).status_code == 403
        assert written_by(host) == before != {}
        assert stranger.get("/readyz").json() == {"status": "waiting"}
        flask_app.release(host.url, {"TOKEN": SECRET})
        assert host.event()["event"] == "ready"
        with http_client(host.url, policy=flask_app.policy) as client:
            assert client.post("/echo", json={"text": "x"}).json()["secret"] == SECRET
        assert stranger.post(address, content=recorded_release(host), headers=headers).status_code == 403


def recorded_release(host: Hosted) -> bytes:
    """The last one that its host has seen pass."""
    seen = host.traffic()
    start = seen.rindex(b"POST /.well-known/cloister-release")
    length = int(re.search(rb"content-length: (\d+)", seen[start:], re.IGNORECASE)[1])  # type: ignore[index]
    body = seen[seen.index(b"\r\n\r\n", start) + 4 :][:length]
    assert len(body) == length > 1500
    return body


def test_a_release_that_was_recorded_does_not_open_the_next_start(
    flask_app: Owned, served: Hosted, state: Path
) -> None:
    body = recorded_release(served)
    with hosted(flask_app, state) as again, httpx2.Client(base_url=again.url, timeout=60) as host_itself:
        headers = {"content-type": "application/octet-stream"}
        before = written_by(again)
        answer = host_itself.post("/.well-known/cloister-release", content=body, headers=headers)
        assert answer.status_code == 403
        assert written_by(again) == before
        assert host_itself.get("/readyz").json() == {"status": "waiting"}


def test_another_bundle_than_the_launch_config_names_starts_nothing(
    flask_app: Owned, tmp_path: Path, state: Path
) -> None:
    other = owned(
        tmp_path / "other", state, 'name = "hello"\napp = "main:app"\nkind = "wsgi"\n', {"main.py": "app = 1"}
    )
    with hosted(flask_app, state, bundle=str(other.made.path)) as host:
        event = host.event()
    assert (event["event"], event["error"], event["step"]) == ("failed", "NotTrusted", "launch.app")


@pytest.mark.parametrize("kind", ["wsgi", "llm"])
def test_under_an_apps_launch_config_nothing_starts_without_its_bundle(
    flask_app: Owned, state: Path, kind: str
) -> None:
    """The built-in app, with a model of the host's, would be taken for the app that clients pin."""
    launch = parse_launch(flask_app.launch)
    launch = replace(launch, app=replace(launch.app, kind=kind), models=("ab" * 32,))
    with hosted(flask_app, state, bundle="", launch=base64.b64encode(launch.encode()).decode()) as host:
        event = host.event()
    assert (event["event"], event["error"], event["step"]) == ("failed", "NotTrusted", "launch.app")


def test_an_app_launched_by_another_or_for_another_deployment_gets_nothing(flask_app: Owned, state: Path) -> None:
    """The genuine code and bundle, under somebody else's launch config: the owner's machine refuses to release."""
    head = flask_app.made.head
    for owner, deployment, step in (
        ("ed25519:" + "A" * 43, "acme", "owner"),
        (owner_name(owner_key()), "another", "deployment"),
    ):
        launch = launch_bytes(head, owner_key=owner, deployment=deployment, release=1, config=flask_app.config)
        with hosted(flask_app, state, launch=base64.b64encode(launch).decode()) as host:
            with pytest.raises(VerificationFailed) as caught:
                flask_app.release(host.url, {"TOKEN": SECRET})
            assert step in caught.value.message
            assert httpx2.get(f"{host.url}/readyz", timeout=60).json() == {"status": "waiting"}
            assert SECRET.encode() not in host.traffic()


def test_a_requirement_that_was_changed_on_its_way_is_never_run(flask_app: Owned, tmp_path: Path, state: Path) -> None:
    """In the bundle: its ciphertext does not open. (In the index: `tests/owner/test_requirements.py`.)"""
    placement = next(one for one in flask_app.made.head.placements if one.section.name == "requirements")
    content = bytearray(flask_app.made.path.read_bytes())
    content[placement.offset + placement.length // 2] ^= 1
    changed = tmp_path / "changed.cloister"
    changed.write_bytes(content)
    with hosted(flask_app, state, bundle=str(changed)) as host:
        flask_app.release(host.url, {"TOKEN": SECRET})
        event = host.event()
    assert (event["event"], event["error"]) == ("failed", "NotTrusted")
    assert "requirements" in event["message"]


def test_a_local_app_is_what_the_owner_pins(flask_app: Owned, state: Path) -> None:
    """What `cloister test` starts; and the same app under another policy is refused."""
    config = config_for(flask_app.made.head)
    with LocalApp(flask_app.made.path, flask_app.made.head, config, deployment="acme") as running:
        running.start()
        given = contents(read_appfile(flask_app.folder), flask_app.made.keys, secrets={"TOKEN": "x"}, now=time.time())
        provision(running.url, policy=running.policy, owner=running.owner, release=given)
        running.wait_ready()
        with http_client(running.url, policy=running.policy) as client:
            assert client.get("/health").text == "ok"
        pinned = Policy(simulator_root=running.device.root_pem, app="00" * 32)
        with http_client(running.url, policy=pinned) as client, pytest.raises(NotTrusted):
            client.get("/health")


def test_an_owner_releases_nothing_to_a_trust_domain_in_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of its evidence is genuine, and without the bit the owner accepts it."""
    fields = {"purpose": "provision", "ohttp_keys": b"", "provision_key": bytes(X_WING_PUBLIC), "models": ()}
    machine = composition.MACHINES["tdx"]
    machine = replace(machine, statement=replace(machine.statement, **fields))  # type: ignore[arg-type]
    believed = composition.policy("tdx")

    def owners_view() -> bytes:
        document, roots = machine.document(), composition.ROOTS
        verified = verify(document, policy=believed, nonce=NONCE, now=NOW, roots=roots, purpose="provision")
        return verified.provision_key

    assert owners_view() == bytes(X_WING_PUBLIC)
    attributes = bytes([intel.TD_ATTRIBUTES[0] | 1]) + intel.TD_ATTRIBUTES[1:]
    monkeypatch.setattr(intel, "TD_ATTRIBUTES", attributes)
    with pytest.raises(VerificationFailed) as caught:
        owners_view()
    assert set(failures(caught.value)) == {"evidence.debug"}
