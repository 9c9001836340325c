"""The whole of an app's life in this process: over a real socket, with hardware and clock that the test sets."""

import asyncio
import hashlib
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.enclave.pyapp.archives import shared, tar
from tests.enclave.runtime.test_joining import Site, policy_text
from tests.enclave.runtime.world import CODE, Hardware, Owned, owned, statement_of
from tests.verify.world import MEASUREMENT

from cloister.channel.bhttp import Request
from cloister.channel.ohttp import seal_to
from cloister.channel.release import Release
from cloister.enclave.attest import EvidenceSource
from cloister.enclave.boot import Boot, EnclaveConfig
from cloister.enclave.runtime import life
from cloister.enclave.runtime.clock import Clock
from cloister.enclave.runtime.life import Life, Surroundings
from cloister.errors import CloisterError, MalformedPolicy, NotTrusted, WrongUse
from cloister.evidence.manifest import manifest_digest
from cloister.evidence.strict_json import b64url
from cloister.owner.joining import carry
from cloister.sim import Device

pytestmark = pytest.mark.anyio
NONCE = bytes(range(32))


@dataclass
class Running:
    """`events` are what the host hears."""

    url: str
    own: Owned
    serving: asyncio.Task[None]
    wall: list[float]
    events: list[dict[str, Any]] = field(default_factory=list)

    async def until(self, event: str) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while True:
                found = [one for one in self.events if one["event"] == event]
                if found:
                    return found[0]
                if self.serving.done():
                    self.serving.result()
                await asyncio.sleep(0.01)

    async def get(self, path: str) -> httpx2.Response:
        async with httpx2.AsyncClient() as client:
            return await client.get(self.url + path)

    async def evidence(self) -> bytes:
        answer = await self.get(f"/.well-known/cloister-attestation?nonce={b64url(NONCE)}")
        answer.raise_for_status()
        return answer.content

    async def release(self, contents: Release | None = None) -> int:
        message = self.own.message(await self.evidence(), NONCE, contents)
        return await self.post(message)

    async def post(self, message: bytes) -> int:
        headers = {"content-type": "application/octet-stream"}
        async with httpx2.AsyncClient() as client:
            answer = await client.post(f"{self.url}/.well-known/cloister-release", content=message, headers=headers)
        return answer.status_code

    async def ask(self, path: str) -> str:
        statement = statement_of(await self.evidence())
        sealed = seal_to(statement.ohttp_keys, Request("GET", "https", "enclave.invalid", path, (), b""))
        headers = {"content-type": "message/ohttp-chunked-req"}
        async with httpx2.AsyncClient() as client:
            address = f"{self.url}/.well-known/ohttp-gateway"
            answer = await client.post(address, content=sealed.body, headers=headers)
        items = sealed.response.feed(answer.content)
        sealed.response.finish()
        return b"".join(item for item in items if isinstance(item, bytes)).decode()


@pytest.fixture(autouse=True)
def priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "lower_priority", lambda: None)


def boot_for(own: Owned, path: Path, listen_fd: int, **change: Any) -> Boot:
    boot = Boot(
        launch=own.launch,
        config=own.config.encode(),
        listen_fd=listen_fd,
        model_path="",
        model_name="",
        engine_dir="",
        bundle_path=str(own.write(path)),
    )
    return replace(boot, **change)


@asynccontextmanager
async def living(
    own: Owned, tmp_path: Path, wall: float = 1_800_000_000.0, *, source: EvidenceSource | None = None, **boot: Any
) -> AsyncIterator[Running]:
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    now, events, stop = [wall], list[dict[str, Any]](), list[Callable[[], None]]()

    def say(event: str, **fields: Any) -> None:
        events.append({"event": event, **fields})

    around = Surroundings(source or Hardware(own.launch), None, bytes, say, Clock(lambda: now[0], lambda: 0.0))
    one = Life(boot_for(own, tmp_path / "app.cloister", sock.detach(), **boot), around)
    serving = asyncio.create_task(one.serve(stop.append))
    running = Running(f"http://127.0.0.1:{port}", own, serving, now, events)
    try:
        await running.until("waiting")
        yield running
    finally:
        if not serving.done():
            stop[0]()
        await asyncio.wait([serving])


async def test_an_app_waits_is_released_answers_and_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "_LONGEST_SLEEP", 0.01)
    own = owned(secrets=("TOKEN",))
    contents = Release(
        time_floor=0, expires=1_800_000_100, keys=own.keys, secrets={"TOKEN": "the secret"}, settings={"A": "b"}
    )
    async with living(own, tmp_path) as running:
        assert (await running.get("/readyz")).status_code == 503
        assert await running.release(contents) == 204
        await running.until("ready")
        assert (await running.get("/readyz")).status_code == 200
        statement = statement_of(await running.evidence())
        assert (statement.purpose, statement.code, statement.provision_key) == ("serve", "sealed", None)
        assert await running.ask("/") == "the secret"
        running.wall[0] += 101
        await running.until("expired")
        assert (await running.get("/readyz")).json() == {"status": "expired"}
        assert (await running.get(f"/.well-known/cloister-attestation?nonce={b64url(NONCE)}")).status_code == 503
        assert [one["event"] for one in running.events][-1] == "expired"
        async with asyncio.timeout(10):
            while [child for child in children() if "pyapp" in child]:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.02)
    assert "the secret" not in str(running.events)


async def test_it_answers_by_tls_from_its_release_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "_LONGEST_SLEEP", 0.01)
    own = owned()
    own = replace(own, config=replace(own.config, tls=True))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        origin = f"https://127.0.0.1:{sock.getsockname()[1]}"
        tls: dict[str, Any] = {"tls_fd": sock.detach(), "tls_origins": (origin,)}
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with living(own, tmp_path, **tls) as running, httpx2.AsyncClient(verify=context) as client:
        waiting = statement_of(await running.evidence())
        assert ("tls" in waiting.insecure, waiting.tls_spki) == (True, None)
        await running.release(Release(time_floor=0, expires=1_800_000_100, keys=own.keys))
        await running.until("ready")
        serving = statement_of(await running.evidence())
        assert (serving.aud, serving.tls_spki is None) == ((origin,), False)
        assert (await client.get(origin)).text == "none"
        running.wall[0] += 101
        await running.until("expired")
        async with asyncio.timeout(10):
            while await answers(client, origin):  # noqa: ASYNC110 (connections that run are ended first)
                await asyncio.sleep(0.02)


CONNECTING = """
import socket
def tried(port):
    try:
        with socket.create_connection(("localhost", port), 20) as sock: return repr(sock.recv(1))
    except OSError as error: return type(error).__name__
def app(environ, start_response):
    start_response("200 OK", [])
    return [f"{tried(4443)} {tried(4444)}".encode()]
"""


async def test_what_the_bundle_declares_is_what_its_app_may_connect_to(tmp_path: Path) -> None:
    """Declared, and then not followed into the enclave itself; not declared, it is nowhere to be found."""
    own = owned({"code": tar({"main.py": CONNECTING})}, egress=("localhost:4443",))
    async with living(own, tmp_path) as running:
        await running.release()
        await running.until("ready")
        assert await running.ask("/") == "ConnectionResetError ConnectionRefusedError"


async def answers(client: httpx2.AsyncClient, url: str) -> bool:
    try:
        await client.get(url)
    except httpx2.HTTPError:
        return False
    return True


def children() -> list[str]:
    pids = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    return [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in pids]


async def test_a_second_release_and_a_strangers_are_refused(tmp_path: Path) -> None:
    own = owned()
    stranger = owned()
    async with living(own, tmp_path) as running:
        evidence = await running.evidence()
        assert await running.post(own.message(evidence, NONCE, owner=stranger.owner)) == 403
        assert await running.post(b"secrets in clear") == 403
        message = own.message(evidence, NONCE)
        assert await running.post(message) == 204
        assert await running.post(message) in (403, 409)  # 403 by the gateway, once it serves
        await running.until("ready")
        assert await running.post(message) == 403


async def test_the_owners_time_is_the_enclaves(tmp_path: Path) -> None:
    """A host that sets its clock back a year gains nothing."""
    own = owned()
    async with living(own, tmp_path, wall=1_770_000_000.0) as running:
        assert await running.release(Release(time_floor=1_800_000_000, keys=own.keys)) == 204
        await running.until("ready")
        assert statement_of(await running.evidence()).iat == 1_800_000_000


async def test_a_health_path_is_asked_until_it_is_well(tmp_path: Path) -> None:
    code = """
count = 0
def app(environ, start_response):
    global count
    count += 1
    start_response("200 OK" if count > 2 and environ["PATH_INFO"] == "/well" else "503 No", [])
    return [str(count).encode()]
"""
    own = owned({"code": tar({"main.py": code})}, health="/well?now")
    async with living(own, tmp_path) as running:
        await running.release()
        await running.until("ready")
        assert await running.ask("/well") == "4"


async def test_an_app_that_cannot_start_ends_the_life_and_says_why(tmp_path: Path) -> None:
    own = owned({"code": tar({"main.py": "import missing"})})
    with pytest.raises(WrongUse, match="ModuleNotFoundError: missing"):
        async with living(own, tmp_path) as running:
            await running.release()
            await running.until("ready")


async def test_ciphertext_that_was_swapped_meanwhile_ends_the_life(tmp_path: Path) -> None:
    own = owned()
    with pytest.raises(NotTrusted, match="not what its owner sealed"):
        async with living(own, tmp_path) as running:
            (tmp_path / "app.cloister").write_bytes(own.content[:-1000] + bytes(1000))
            await running.release()
            await running.until("ready")


@pytest.mark.parametrize("what", ["bundle", "launch", "config", "hardware"])
async def test_a_host_that_hands_over_something_else_starts_nothing(tmp_path: Path, what: str) -> None:
    own = owned()
    other = owned({"code": tar({"main.py": CODE + "# another"})})
    changes: dict[str, Any] = {
        "launch": {"launch": other.launch},
        "config": {"config": replace(own.config, slots=2).encode()},
    }
    with socket.create_server(("127.0.0.1", 0)) as sock:
        boot = boot_for(own, tmp_path / "app.cloister", sock.fileno(), **changes.get(what, {}))
        if what == "bundle":
            other.write(tmp_path / "app.cloister")
        hardware = Hardware(other.launch if what == "hardware" else own.launch)
        with pytest.raises(CloisterError):
            Life(boot, Surroundings(hardware, None, bytes, lambda event, **fields: None))


async def test_where_a_process_would_be_another_enclave_a_python_app_is_refused(tmp_path: Path) -> None:
    own = owned()
    own = replace(own, config=replace(own.config, engine="thread"))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        boot = boot_for(own, tmp_path / "app.cloister", sock.fileno())
        with pytest.raises(WrongUse, match="process of its own"):
            Life(boot, Surroundings(Hardware(own.launch), None, bytes, lambda event, **fields: None))


async def test_a_machine_without_namespaces_is_told_of_before_anything_is_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no() -> bool:
        return False

    async with living(owned(), tmp_path) as running:
        assert statement_of(await running.evidence()).insecure == ()
    monkeypatch.setattr(life, "can_confine", no)
    before = shared()
    async with living(owned(), tmp_path) as running:
        assert statement_of(await running.evidence()).insecure == ("app-unconfined",)
        await running.release()
        await running.until("ready")
        assert statement_of(await running.evidence()).insecure == ("app-unconfined",)
        (folder,) = shared() - before
        assert folder.stat().st_mode & 0o777 == 0o700
    assert shared() == before


async def test_a_model_beside_an_app_stands_in_launch_config_and_statement(tmp_path: Path) -> None:
    weights = os.urandom(100)
    digest = hashlib.sha256(weights).hexdigest()
    own = owned({"code": tar({"main.py": CODE}), "model": weights}, model="toy.bin")
    async with living(own, tmp_path) as running:
        await running.release()
        await running.until("ready")
        (model,) = statement_of(await running.evidence()).models
        assert (model.name, model.sha256) == ("toy.bin", digest)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    device = Device.open(tmp_path / "sim")
    one = Site(device, device, "")
    yield one
    one.close()


async def test_replicas_of_a_sealed_app_share_keys_once_each_has_been_released(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no sooner: until then there is nobody to be let in. What expires takes the group's keys with it."""
    monkeypatch.setattr(life, "_LONGEST_SLEEP", 0.01)
    measured = replace(MEASUREMENT, engine=f"sha256:{manifest_digest({}).hex()}")
    policy = 'dangerously_tolerate_insecure = ["app-unconfined"]\n' + policy_text(site.device, measured)
    own = replace(owned(secrets=("TOKEN",)), config=EnclaveConfig(platform="sim", api_keys=False, group_policy=policy))
    told = Release(time_floor=0, expires=int(time.time()) + 500, keys=own.keys, secrets={"TOKEN": "the secret"})

    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    async with (
        living(own, folders[0], time.time(), source=site.chip(measured, own.launch), founds_group=True) as one,
        living(own, folders[1], time.time(), source=site.chip(measured, own.launch)) as two,
    ):
        assert (await one.get("/.well-known/cloister-group")).status_code == 403
        assert await one.release(told) == await two.release(told) == 204
        await one.until("ready")
        await two.until("joining")
        assert (await two.get("/readyz")).json() == {"status": "joining"}

        def carried() -> None:
            with httpx2.Client() as client:
                carry(client, joiner=two.url, member=one.url)

        await asyncio.to_thread(carried)
        await two.until("ready")
        statements = [statement_of(await each.evidence()) for each in (one, two)]
        assert statements[0].ohttp_keys == statements[1].ohttp_keys
        assert {(each.key_scope, each.code) for each in statements} == {("group", "sealed")}
        assert [await each.ask("/") for each in (one, two)] == ["the secret"] * 2
        two.wall[0] += 501
        await two.until("expired")
        assert (await two.get("/.well-known/cloister-group")).status_code == 403


async def test_a_replica_that_nobody_lets_in_expires_all_the_same(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "_LONGEST_SLEEP", 0.01)
    measured = replace(MEASUREMENT, engine=f"sha256:{manifest_digest({}).hex()}")
    policy = 'dangerously_tolerate_insecure = ["app-unconfined"]\n' + policy_text(site.device, measured)
    own = replace(owned(), config=EnclaveConfig(platform="sim", api_keys=False, group_policy=policy))
    told = Release(time_floor=0, expires=int(time.time()) + 500, keys=own.keys)
    async with living(own, tmp_path, time.time(), source=site.chip(measured, own.launch)) as running:
        assert await running.release(told) == 204
        await running.until("joining")
        running.wall[0] += 501
        await running.until("expired")
        assert "ready" not in {event["event"] for event in running.events}


def test_a_groups_policy_that_is_none_stops_the_start(tmp_path: Path) -> None:
    own = replace(owned(), config=EnclaveConfig(platform="sim", api_keys=False, group_policy="no policy"))
    around = Surroundings(Hardware(own.launch), None, bytes, lambda event, **fields: None)
    with pytest.raises(MalformedPolicy):
        Life(boot_for(own, tmp_path / "app.cloister", 3), around)
