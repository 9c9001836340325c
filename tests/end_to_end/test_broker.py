"""An owner who is away: their broker releases to the enclave that waits, each time it starts, and to no other."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.end_to_end.test_sealed_apps import Hosted, Owned, hosted, owned

from cloister.cli.local import owner_key
from cloister.cli.policy_file import to_toml
from cloister.client import http_client
from cloister.errors import NotTrusted
from cloister.owner.appfile import read_appfile
from cloister.owner.deployment import launch_bytes, owner_name
from cloister.owner.provision import contents, provision
from cloister.sim import Device
from cloister.verify import Policy

SECRET = "canary-secret-9912-zanzibar"
TOML = 'name = "hello"\napp = "main:app"\nkind = "wsgi"\nsecrets = ["TOKEN"]\n'
CODE = """
import os
def app(environ, start_response):
    start_response("200 OK", [("content-type", "text/plain")])
    return [os.environ["TOKEN"].encode()]
"""


@dataclass(frozen=True)
class Absent:
    """An owner who handed their app over to a broker, which has no key of theirs. `folder`: the broker's."""

    own: Owned
    state: Path
    folder: Path
    broker_key: str

    @property
    def policy(self) -> Policy:
        return replace(self.own.policy, broker_key=self.broker_key)

    def launch(self, **change: Any) -> bytes:
        told = {"owner_key": owner_name(owner_key()), "deployment": "acme", "release": 1, "broker_key": self.broker_key}
        return launch_bytes(self.own.made.head, config=self.own.config, **{**told, **change})

    @contextmanager
    def started(self, **change: Any) -> Iterator[Hosted]:
        with hosted(self.own, self.state, launch=base64.b64encode(self.launch(**change)).decode()) as host:
            yield host

    def command(self, *words: str) -> list[str]:
        """Of a machine that has nothing of the owner's state folder."""
        return [str(Path(sys.executable).with_name("cloister")), "broker", *words, "--folder", str(self.folder)]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "XDG_STATE_HOME": str(self.folder.parent / "nothing")}

    def run(self, *words: str) -> str:
        ran = subprocess.run(self.command(*words), env=self.environment(), capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert SECRET not in ran.stdout + ran.stderr
        return ran.stdout

    def look(self, url: str) -> str:
        return self.run("serve", "--policy", str(self.folder / "policy.toml"), "--watch", url, "--once")

    def decided(self, url: str) -> str:
        """What a look says once there is something to decide: on a busy machine an enclave may not wait yet."""
        for _ in range(20):
            if told := self.look(url):
                return told
        return ""

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.run("log", "show", "--json").splitlines()]


@pytest.fixture(scope="module")
def handed_over(tmp_path_factory: pytest.TempPathFactory, state: Path) -> Absent:
    """Once: what each test's broker has at its beginning."""
    place = tmp_path_factory.mktemp("owner")
    own = owned(place, state, TOML, {"main.py": CODE})
    folder = place / "broker"
    (place / "secrets.toml").write_text(f'TOKEN = "{SECRET}"\n')
    away = Absent(own, state, folder, "")
    away = replace(away, broker_key=away.run("init").strip())
    (keys,) = (state / "cloister" / "bundles").glob(f"{own.made.head.id}.json")
    files = ["--bundle", str(own.made.path), "--bundle-keys", str(keys), "--secrets", str(place / "secrets.toml")]
    away.run("add", "acme", str(own.folder), *files)
    root = folder / "sim-root.pem"
    root.write_bytes(Device.open(state / "cloister" / "sim").root_pem)
    (folder / "policy.toml").write_text(to_toml(away.own.policy, comment="as deployed", root=root))
    return away


@pytest.fixture
def absent(handed_over: Absent, tmp_path: Path) -> Absent:
    """With a broker of the test's own."""
    shutil.copytree(handed_over.folder, tmp_path / "broker")
    return replace(handed_over, folder=tmp_path / "broker")


@pytest.fixture(scope="module")
def waiting(handed_over: Absent) -> Iterator[Hosted]:
    """An enclave that the broker may release to, and to which nobody does."""
    with handed_over.started() as host:
        yield host


def said(absent: Absent, host: Hosted) -> str:
    with http_client(host.url, policy=absent.policy) as client:
        return client.get("/").text


def test_an_enclave_serves_after_every_start_without_its_owner(absent: Absent) -> None:
    """The first time a broker that watches is ended by force in the end; the second time another one looks once."""
    with absent.started() as host:
        serving = absent.command("serve", "--policy", str(absent.folder / "policy.toml"), "--watch", host.url)
        broker = subprocess.Popen(serving, env=absent.environment(), stdout=subprocess.PIPE, text=True)
        try:
            assert broker.stdout is not None
            assert broker.stdout.readline().startswith("released acme")
            assert host.event()["event"] == "ready"
            assert said(absent, host) == SECRET
            assert SECRET.encode() not in host.traffic()
        finally:
            broker.send_signal(signal.SIGKILL)
            broker.communicate()
    with absent.started() as host:
        assert absent.decided(host.url).startswith("released acme")
        assert host.event()["event"] == "ready"
        assert said(absent, host) == SECRET
        assert absent.look(host.url) == ""  # it waits for nobody
        with http_client(host.url, policy=absent.own.policy) as client, pytest.raises(NotTrusted, match="broker"):
            client.get("/")  # of a client whose policy names no broker
    log = absent.log()
    assert [line["event"] for line in log] == ["init", "added", *["releasing", "released"] * 2]
    assert [line["grant"] for line in log if "grant" in line] == [1, 1, 2, 2]
    assert absent.run("log", "verify").startswith("whole: 6 lines")
    assert all(SECRET.encode() not in path.read_bytes() for path in absent.folder.rglob("*") if path.is_file())


def test_the_owner_may_release_as_before(absent: Absent) -> None:
    with absent.started() as host:
        given = contents(read_appfile(absent.own.folder), absent.own.made.keys, secrets={"TOKEN": SECRET}, now=1.0)
        provision(host.url, policy=absent.policy, owner=owner_key(), release=given)
        assert host.event()["event"] == "ready"
        assert said(absent, host) == SECRET


OTHERS = {
    "deployment": {"deployment": "another"},
    "owner": {"owner_key": "ed25519:" + "A" * 43},
    "broker": {"broker_key": "ed25519:" + "A" * 43},
}


@pytest.mark.parametrize("what", OTHERS)
def test_to_any_other_enclave_nothing_is_sent(absent: Absent, what: str) -> None:
    with absent.started(**OTHERS[what]) as host:
        refused(absent, host, what)


@pytest.mark.parametrize("what", ["revoked", "measurement"])
def test_what_was_revoked_or_runs_other_code_gets_nothing(absent: Absent, waiting: Hosted, what: str) -> None:
    if what == "revoked":
        absent.run("revoke", "acme")
    else:
        policy = (absent.folder / "policy.toml").read_text()
        measured = next(iter(absent.own.policy.measurements["sim"]))["code"]
        (absent.folder / "policy.toml").write_text(policy.replace(str(measured), f"sha256:{'99' * 32}"))
    refused(absent, waiting, what)


def refused(absent: Absent, host: Hosted, what: str) -> None:
    assert absent.decided(host.url).startswith("refused")
    assert httpx2.get(f"{host.url}/readyz").json() == {"status": "waiting"}
    assert b"cloister-release" not in host.traffic()
    last = absent.log()[-1]
    assert last["event"] == "refused"
    assert what in f"{last['step']} {last['reason']}"
