"""A broker that says who may join a key group: replicas in this process, a real broker and its log."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.enclave.runtime.test_joining import Site, founded, policy_text, waiting
from tests.verify.world import MEASUREMENT, NOW, OWNER

from cloister.channel.group import parse_request
from cloister.enclave.runtime.joining import Group
from cloister.errors import MalformedMessage, NotTrusted, VerificationFailed, WrongUse
from cloister.owner.broker import Broker
from cloister.owner.broker_log import Entry, read_entries
from cloister.owner.broker_state import BrokerKeys, Record, Records
from cloister.sim import Device
from cloister.verify import Policy

KEYS = BrokerKeys.derive(bytes(range(32)))
URL = "http://127.0.0.1:8484"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Whose group's policy names the broker."""
    device = Device.open(tmp_path / "sim", now=NOW)
    one = Site(device, device, policy_text(device, broker_key=KEYS.name))
    yield one
    one.close()


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    one = Broker(KEYS, Records(tmp_path / "records", KEYS.records), tmp_path / "log", clock=lambda: NOW)
    one.begin()
    return one


def told(site: Site, broker: Broker, **pins: Any) -> Policy:
    fields = {
        "owner_key": OWNER,
        "deployment": "acme-chat",
        "measurements": {"sim": (MEASUREMENT.components(),)},
        "simulator_root": site.device.root_pem,
        **pins,
    }
    return broker.fit(Policy(**fields))


def log(tmp_path: Path) -> list[Entry]:
    return list(read_entries((tmp_path / "log").read_bytes(), KEYS.signing.public_key()))


async def asking(site: Site) -> tuple[Group, Group, "asyncio.Task[Any]"]:
    member = await founded(site)
    joiner, entering = await waiting(site)
    return member, joiner, entering


def requested(site: Site) -> bytes:
    """What a replica asks with."""

    async def play() -> bytes:
        member, joiner, entering = await asking(site)
        request = await joiner.request(member.challenge())
        entering.cancel()
        return request

    return asyncio.run(play())


def test_a_broker_lets_a_replica_in_and_never_sees_what_the_keys_come_from(
    site: Site, broker: Broker, tmp_path: Path
) -> None:
    async def play() -> None:
        member, joiner, entering = await asking(site)
        request = await joiner.request(member.challenge())
        with pytest.raises(NotTrusted, match="broker"):
            await member.admit(request)
        request = await joiner.request(member.challenge())
        given = broker.authorise(request, URL, policy=told(site, broker))
        admission = await member.admit(given)
        await joiner.accept(admission)
        ring = await entering
        assert joiner.published() == member.published()
        passed = request + given + admission + (tmp_path / "log").read_bytes()
        assert all(secret.secret not in passed for secret in ring.secrets)

    asyncio.run(play())
    last = log(tmp_path)[-1]
    assert last.event == "join-authorised"
    assert {"url": URL, "deployment": "acme-chat", "platform": "sim"}.items() <= dict(last.details).items()


def test_a_replica_that_does_not_verify_gets_no_word_and_a_line_in_the_log(
    site: Site, broker: Broker, tmp_path: Path
) -> None:
    request = requested(site)
    machine = told(site, broker, limits=replace(Policy().limits, platform_ids=frozenset({"another machine"})))
    with pytest.raises(VerificationFailed, match="custody"):
        broker.authorise(request, URL, policy=machine)
    with pytest.raises(MalformedMessage):
        broker.authorise(b"junk", URL, policy=told(site, broker))
    for _ in range(3):  # what repeats itself is said once an hour
        with pytest.raises(MalformedMessage):
            broker.authorise(b"junk", URL, policy=told(site, broker))
    assert sum(line.event == "join-refused" for line in log(tmp_path)) == 2
    lines = log(tmp_path)[-2:]
    assert [line.event for line in lines] == ["join-refused"] * 2
    assert "custody" in str(lines[0].details["reason"])


def test_nothing_joins_for_a_deployment_that_its_owner_revoked(site: Site, broker: Broker, tmp_path: Path) -> None:
    request = requested(site)
    broker.add(Record(deployment="acme-chat", app="66" * 32))
    assert parse_request(broker.authorise(request, URL, policy=told(site, broker))).word
    broker.revoke("acme-chat")
    with pytest.raises(NotTrusted, match="revoked"):
        broker.authorise(request, URL, policy=told(site, broker))
    assert log(tmp_path)[-1].event == "join-refused"


def test_an_old_record_that_comes_back_lets_nothing_join(site: Site, broker: Broker, tmp_path: Path) -> None:
    """Another broker on this machine revoked it meanwhile. An older app's, or no record, is not the one that stands either."""
    request, file = requested(site), tmp_path / "records" / "acme-chat.record"
    broker.add(Record(deployment="acme-chat", app="66" * 32))
    old = file.read_bytes()
    other = Broker(KEYS, Records(tmp_path / "records", KEYS.records), tmp_path / "log", clock=lambda: NOW)
    other.revoke("acme-chat")
    for back in (old, None):
        file.write_bytes(back) if back else file.unlink()
        with pytest.raises(NotTrusted, match="revoked"):
            broker.authorise(request, URL, policy=told(site, broker))
    other.add(Record(deployment="acme-chat", app="77" * 32))
    for back in (old, None):
        file.write_bytes(back) if back else file.unlink()
        with pytest.raises(NotTrusted, match="handed over last"):
            broker.authorise(request, URL, policy=told(site, broker))
    assert "join-authorised" not in [line.event for line in log(tmp_path)]


def test_without_its_log_a_broker_gives_no_word(site: Site, broker: Broker, tmp_path: Path) -> None:
    request = requested(site)
    (tmp_path / "log").unlink()
    with pytest.raises((NotTrusted, WrongUse)):
        broker.authorise(request, URL, policy=told(site, broker))
