"""`cloister broker join`, between two replicas that are served on loopback."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.client.deployment import Served
from tests.enclave.runtime.test_joining import Site, behind, policy_text
from tests.verify.world import MEASUREMENT, OWNER
from typer.testing import Result

from cloister.cli.policy_file import to_toml
from cloister.enclave.runtime.entrance import Entrance
from cloister.enclave.runtime.joining import Group
from cloister.sim import Device
from cloister.verify import Policy

Run = Callable[..., Result]


class Door:
    """A replica that enters its group as soon as anybody knocks."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._entrance = Entrance(group, behind)
        self._entering: asyncio.Task[Any] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._entering is None:
            self._entering = asyncio.create_task(self.group.enter())
        while self.group.state == "starting":  # noqa: ASYNC110 (a replica that tells nobody)
            await asyncio.sleep(0.01)
        await self._entrance(scope, receive, send)


@pytest.fixture
def broker_key(run: Run) -> str:
    return run("broker", "init").stdout.strip()


@pytest.fixture
def site(tmp_path: Path, broker_key: str) -> Iterator[Site]:
    device = Device.open(tmp_path / "sim")
    one = Site(device, device, policy_text(device, broker_key=broker_key), now=time.time())
    yield one
    one.close()


@pytest.fixture
def policy(tmp_path: Path, site: Site) -> Callable[..., Path]:
    (tmp_path / "root.pem").write_bytes(site.device.root_pem)

    def write(deployment: str) -> Path:
        told = Policy(
            owner_key=OWNER,
            deployment=deployment,
            measurements={"sim": (dict(MEASUREMENT.components()),)},
            simulator_root=site.device.root_pem,
        )
        file = tmp_path / f"{deployment}.toml"
        file.write_text(to_toml(told, comment="x", root=tmp_path / "root.pem"))
        return file

    return write


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["words", "json"])
def test_a_broker_has_a_replica_let_in_that_verifies_and_no_other(
    run: Run, site: Site, policy: Callable[..., Path], as_json: list[str]
) -> None:
    member, joiner = Door(site.replica(founds=True)), Door(site.replica())
    with Served(member) as there, Served(joiner) as here:
        refused = run("broker", "join", here.url, there.url, "--policy", policy("another"))
        assert (refused.exit_code, joiner.group.state) == (3, "joining")
        assert "deployment" in refused.stderr
        joined = run("broker", "join", here.url, there.url, "--policy", policy("acme-chat"), *as_json)
        assert joined.exit_code == 0, joined.stderr
        told = json.dumps({"joined": here.url, "member": there.url}, indent=2) if as_json else f"joined {here.url}"
        assert joined.stdout == f"{told}\n"
        assert joiner.group.published() == member.group.published() != ()
    shown = run("broker", "log", "show", "--json").stdout
    assert [json.loads(line)["event"] for line in shown.splitlines()] == ["init", "join-refused", "join-authorised"]


def test_what_is_no_address_or_answers_nothing_joins_nothing(
    run: Run, policy: Callable[..., Path], nowhere: str
) -> None:
    assert run("broker", "join", "nonsense", nowhere, "--policy", policy("acme-chat")).exit_code == 2
    assert run("broker", "join", nowhere, nowhere, "--policy", policy("acme-chat")).exit_code == 5
