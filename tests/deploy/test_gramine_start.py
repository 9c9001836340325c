"""The shipped one-process layout, started by the host's backend, with nothing but what its manifest names.

There is no SGX here and no Gramine, so `gramine_programs` stands for both: the enclave sees only the manifest's files, has
only Gramine's system calls and no child processes, and asks a /dev/attestation behind which a throw-away Intel stands.
"""

import contextlib
import json
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.deploy.gramine_stage import GramineMachine, gramine_machine

from cloister.cli.gramine_backend import GramineBackend
from cloister.cli.local import file_digest
from cloister.client import InnerRequest, Session
from cloister.enclave.boot import EnclaveConfig
from cloister.errors import VerificationFailed
from cloister.evidence.launch import LaunchConfig, built_in, launch_digest
from cloister.host.backend import Event, RunningEnclave, Spawn
from cloister.models.store import embedded_path
from cloister.sim.measure import ROOMS
from cloister.verify import Policy, verify
from cloister.verify.roots import PINNED

pytestmark = pytest.mark.system

CONFIG = EnclaveConfig(platform="sgx", api_keys=False, engine="thread", slots=2, context_length=512)
LAUNCH = LaunchConfig(
    owner_key="ed25519:" + "A" * 43,
    deployment="one",
    release=1,
    app=built_in(CONFIG.digest().hex()),
    models=(file_digest(embedded_path("tiny")),),
    config_sha256=CONFIG.digest().hex(),
)


@dataclass
class Started:
    machine: GramineMachine
    backend: GramineBackend
    running: RunningEnclave
    ready: Event
    folder: Path

    @property
    def manifest(self) -> dict[str, Any]:
        return tomllib.loads((self.folder / "cloister.manifest").read_text())

    @property
    def trusted(self) -> set[str]:
        """Paths inside."""
        entries = self.manifest["sgx"]["trusted_files"]
        return {entry["uri"].removeprefix("file:root") for entry in entries if isinstance(entry, dict)}

    def session(self, policy: Policy) -> Session:
        return Session(f"http://127.0.0.1:{self.running.port}", policy=policy, complete=self.machine.sgx.complete)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    folder = tmp_path_factory.mktemp("gramine")
    (folder / "state").mkdir()
    (folder / "dev").mkdir()
    (folder / "dev" / "sgx_enclave").touch()
    with gramine_machine(folder) as machine, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{machine.bin}:{os.environ['PATH']}")
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        backend = GramineBackend(folder / "enclaves", root=folder)
        spawn = Spawn(
            name="one",
            launch=LAUNCH.encode(),
            config=CONFIG.encode(),
            bundle=None,
            model="tiny",
            memory_bytes=4 << 30,
            cores=tuple(os.sched_getaffinity(0)),
        )
        running = backend.start(spawn)
        try:
            told = list(_until_ready(running))
            assert told, "it ended before it was ready"
            assert told[-1]["event"] == "ready", told[-1]
            measured = backend.policy(LAUNCH).measurements["sgx"][0]["mr_enclave"]
            machine.sgx.mr_enclave = bytes.fromhex(str(measured))
            roots = replace(PINNED, intel=machine.sgx.root)
            patch.setattr("cloister.client.attestor.verify", partial(verify, roots=roots))
            (laid_out,) = (folder / "enclaves" / "one").iterdir()
            yield Started(machine, backend, running, told[-1], laid_out)
        finally:
            running.stop()


def _until_ready(running: RunningEnclave) -> Iterator[Event]:
    for event in running.events():
        yield event
        if event["event"] in ("ready", "failed"):
            return


def ask(session: Session) -> str:
    asked = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, "temperature": 0}
    url = "https://enclave.invalid/v1/chat/completions"
    request = InnerRequest("POST", url, ((b"content-type", b"application/json"),), json.dumps(asked).encode())
    with contextlib.closing(session.send(request)) as answer:
        body = b"".join(answer)
    assert answer.status == 200, body
    content: str = json.loads(body)["choices"][0]["message"]["content"]
    return content


def test_it_chats_with_a_client_that_pins_its_measurement(started: Started) -> None:
    with started.session(started.backend.policy(LAUNCH)) as session:
        verified = session.verify()
        assert (verified.platform, verified.simulated) == ("sgx", False)
        assert ask(session)


def test_the_same_image_under_another_owners_name_is_refused(started: Started) -> None:
    policy = started.backend.policy(LAUNCH)
    other = replace(policy, owner_key="ed25519:" + "B" * 42 + "A")
    with started.session(other) as session, pytest.raises(VerificationFailed, match="owner"):
        session.verify()


def test_every_file_that_it_opened_is_in_the_manifest(started: Started) -> None:
    with started.session(started.backend.policy(LAUNCH)) as session:
        ask(session)
    opened = started.machine.opened()
    assert {"/launch.json", "/model.gguf", "/app/cloister/enclave/sgx.py"} <= opened
    assert len(opened) > 300, "the trace shows too little to say anything"
    assert opened <= started.trusted, "these would not open under Gramine"


def test_nothing_of_this_machines_folders_stands_in_the_manifest(started: Started) -> None:
    entries = started.manifest["sgx"]["trusted_files"]
    assert [one for one in entries if isinstance(one, str)] == [f"file:{started.machine.runtime}/"]
    assert {path.split("/")[1] for path in started.trusted} == {"app", "python", "launch.json", "model.gguf"}


def test_what_no_enclave_imports_is_left_out(started: Started) -> None:
    parts = {part for path in started.trusted for part in path.split("/")}
    assert not parts & {"__pycache__", "site-packages", "idlelib", "libc.so.6"}, "Gramine brings its own C library"
    ours = {path.split("/")[3] for path in started.trusted if path.startswith("/app/cloister/")}
    assert ours == {"__init__.py", *ROOMS}


def test_each_trusted_file_lies_there_with_its_digest(started: Started) -> None:
    entries = [entry for entry in started.manifest["sgx"]["trusted_files"] if isinstance(entry, dict)]
    assert all(file_digest(started.folder / e["uri"].removeprefix("file:")) == e["sha256"] for e in entries)
    assert launch_digest(LAUNCH.encode()).hex() in {entry["sha256"] for entry in entries}


def test_it_is_one_process_with_fewer_threads_than_the_manifest_allows(started: Started) -> None:
    calls = [line for line in started.machine.traced if "execve(" in line]
    assert len(calls) == 1, "the enclave started another program"
    assert 8 <= started.machine.most_threads() <= started.manifest["sgx"]["max_threads"]
