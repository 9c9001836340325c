"""An app's whole life on a real host: real daemon, real enclave on simulated hardware, the command line as typed.

The host is started once, and each test has an app of its own there.
"""

import json
import os
import re
import shlex
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.certificate import self_signed
from tests.end_to_end.hosting import (
    ANSWER,
    CODE_CANARY,
    QUESTION_CANARY,
    SECRET_CANARY,
    Host,
    ask,
    children_of,
    running,
    told_of,
    write_words,
)
from tests.system.shell import Shell

from cloister.host.relay import Relay
from cloister.models.store import embedded_path


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """With the folder `words`, an app."""
    home = tmp_path_factory.mktemp("home")
    write_words(home)
    with running(home) as one:
        yield one


def state_of(host: Host) -> Path:
    return host.shell.home / ".local" / "state" / "cloister"


def bundles_of(host: Host) -> set[str]:
    return {path.name for path in (state_of(host) / "host" / "bundles").iterdir()}


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


def assert_operator_holds_none(host: Host, told: dict[str, Any], canaries: list[bytes]) -> None:
    """Of what an owner or a user had: not on its disk, not in its daemon's memory, not in what it shows."""
    name = told["app"]["name"]
    kept = [path.read_bytes() for path in (state_of(host) / "host").rglob("*") if path.is_file()]
    assert any(content.startswith(b"cloister-bundle\0") for content in kept)
    shown = [host.do(f"cloister {command}").stdout.encode() for command in ("list", f"status {name}", f"logs {name}")]
    held = list(memory_of(host.pid))
    assert any(told["app"]["launch_sha256"].encode() in piece for piece in held)  # the search does find things
    for canary in canaries:
        assert not any(canary in content for content in [*kept, *shown, *held])


def test_an_app_is_deployed_asked_stopped_restarted_and_removed(host: Host) -> None:
    told = told_of(host.do("cloister deploy words --json"))
    assert told["app"]["state"] == "ready"
    assert told["verification"]["deployment"] == "words"
    assert ask(told) == ANSWER
    assert 0 < told["app"]["expires_at"] - time.time() <= 2 * 86400

    assert_operator_holds_none(host, told, [CODE_CANARY.encode(), SECRET_CANARY.encode(), QUESTION_CANARY.encode()])
    assert "own words" not in host.do("cloister logs words").stdout

    assert told_of(host.do("cloister stop words --json"))["state"] == "stopped"
    with httpx2.Client(trust_env=False) as client:
        assert client.get(told["app"]["address"]).status_code == 503
    again = told_of(host.do("cloister restart words --json"))
    assert again["url"] == told["url"]
    assert ask(again) == ANSWER
    second = told_of(host.do("cloister deploy words --json"))
    assert (second["app"]["release"], second["url"]) == (2, told["url"])
    assert ask(second) == ANSWER
    assert second["app"]["bundle"] in bundles_of(host)
    host.do("cloister remove words --yes")
    assert "words" not in {app["name"] for app in json.loads(host.do("cloister list --json").stdout)}
    assert second["app"]["bundle"] not in bundles_of(host)


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[tuple[Host, list[Relay]]]:
    """A host, and hops before its API and before its one app that record all that goes through: nothing goes past them."""
    elsewhere = "127.0.0.2"
    host = Host(Shell(tmp_path), f"--address http://{elsewhere}:{{port}}")
    host.url = f"http://{elsewhere}:{host.port}"
    ports = (host.port, host.first)
    hops = [Relay(port, keep=256 << 20, listener=socket.create_server((elsewhere, port))) for port in ports]
    for hop in hops:
        hop.start()
    host.start()
    try:
        host.log_in()
        yield host, hops
    finally:
        host.end(signal.SIGTERM)
        for hop in hops:
            hop.stop()


def test_the_wire_carries_no_code_secret_question_or_answer(wire: tuple[Host, list[Relay]]) -> None:
    host, hops = wire
    write_words(host.shell.home)
    told = told_of(host.do("cloister deploy words --json"))
    assert ask(told) == ANSWER
    assert_wire_has_none(told, hops, [CODE_CANARY.encode(), SECRET_CANARY.encode(), QUESTION_CANARY.encode()])


def test_a_model_with_sealed_weights_answers_and_neither_operator_nor_wire_has_them(
    wire: tuple[Host, list[Relay]],
) -> None:
    host, hops = wire
    folder = host.shell.home / "chat"
    folder.mkdir()
    weights = embedded_path("tiny").read_bytes()
    (folder / "own.gguf").write_bytes(weights)
    (folder / "cloister.toml").write_text('name = "chat"\napp = "llm"\nmodel = "own.gguf"\nplatform = "sim"\n')
    told = told_of(host.do("cloister deploy chat --json"))
    address, policy = told["url"], shlex.split(told["try"])[-1]
    question = f"cloister ask {shlex.quote(address)} '{QUESTION_CANARY}' --policy {policy} --temperature 0"
    answer = host.do(question).stdout.strip()
    assert len(answer) > 16  # a shorter one might stand anywhere
    parts = [weights[at : at + 64] for at in range(len(weights) // 8, len(weights) - 64, len(weights) // 8)]
    canaries = [QUESTION_CANARY.encode(), *(part for part in parts if len(set(part)) > 24)]
    assert len(canaries) > 4
    assert_operator_holds_none(host, told, canaries)
    assert_wire_has_none(told, hops, [*canaries, answer.encode()])


def assert_wire_has_none(told: dict[str, Any], hops: list[Relay], canaries: list[bytes]) -> None:
    api, sealed = (b"".join(record.data for record in hop.take()) for hop in hops)
    assert b"cloister-bundle\0" in api  # all of it went through here,
    assert told["app"]["launch_sha256"].encode() in api
    assert sealed.count(b"POST /") >= 2  # and the release and the question through there
    for canary in canaries:
        assert canary not in api
        assert canary not in sealed


def by_tls(host: Host, origin: str) -> str:
    """As `curl --cacert cert.pem` asks. Raises: httpx2.ConnectError for another certificate."""
    trusted = ssl.create_default_context(cafile=str(host.shell.home / "cert.pem"))
    with httpx2.Client(verify=trusted, trust_env=False, timeout=60) as client:
        return client.get(f"{origin}/{QUESTION_CANARY}").text


def test_an_app_with_a_tls_listener_answers_by_the_attested_certificate(host: Host) -> None:
    told = told_of(host.do("cloister deploy words --name listening --tls --json"))
    try:
        assert told["app"]["tls"][0].startswith("https://localhost:")
        assert "tls" in told["verification"]["insecure"]
        assert ask(told) == ANSWER
        policy = shlex.split(told["try"])[-1]
        save = f"cloister verify {shlex.quote(told['url'])} --policy {policy} --save-cert cert.pem"
        host.do(save)
        for origin in told["app"]["tls"]:
            assert by_tls(host, origin) == ANSWER
        again = told_of(host.do("cloister restart listening --json"))
        assert again["app"]["tls"] == told["app"]["tls"]
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            by_tls(host, told["app"]["tls"][0])  # another start, another key
        host.do(save)
        assert by_tls(host, told["app"]["tls"][0]) == ANSWER
    finally:
        host.do("cloister remove listening --yes")


def test_a_missing_secret_is_said_before_anything_is_uploaded(host: Host) -> None:
    before = host.apps().keys(), bundles_of(host)
    write_words(host.shell.home / "without")
    (host.shell.home / "without" / "words" / "secrets.toml").unlink()
    assert "WORD" in host.do("cloister deploy without/words --name without", code=2).stderr
    assert (host.apps().keys(), bundles_of(host)) == before


def test_a_killed_enclave_waits_for_a_new_release_and_nobody_else_can_give_it(host: Host) -> None:
    """Its words are public, as its file says: its users see that, and its host's log has them."""
    others = children_of(host.pid)
    write_words(host.shell.home / "loud")
    with (host.shell.home / "loud" / "words" / "cloister.toml").open("r+") as file:
        content = file.read()
        file.seek(0)
        file.write(f'logs = "public"\n{content}')
    told = told_of(host.do("cloister deploy loud/words --name loud --json"))
    factors = {factor["step"]: factor for factor in told["verification"]["factors"]}
    assert (factors["logs"]["verdict"], factors["logs"]["got"]) == ("pass", "public")
    for child in set(children_of(host.pid)) - set(others):
        os.kill(child, signal.SIGKILL)
    host.reaches("waiting", "loud")
    owner_key = state_of(host) / "owner.pem"
    kept = owner_key.read_bytes()
    owner_key.unlink()
    assert host.do("cloister restart loud", code=3).stderr  # another owner's key
    owner_key.write_bytes(kept)
    owner_key.chmod(0o600)
    again = told_of(host.do("cloister restart loud --json"))
    assert ask(again) == ask(told) == ANSWER
    assert host.do("cloister logs loud").stdout.count("the app's own words") == 2
    address = again["url"].partition("#")[0]
    root = state_of(host) / "sim-root.pem"
    refused = host.do(f"cloister verify {address} --dangerously-trust-simulator {root} --json", code=3)
    assert {"logs"} <= {factor["step"] for factor in told_of(refused)["factors"] if factor["verdict"] == "fail"}


def test_a_host_with_a_certificate_speaks_tls_and_only_to_who_knows_it(tmp_path: Path) -> None:
    for name, content in zip(("host.pem", "host.key"), self_signed("127.0.0.1"), strict=True):
        (tmp_path / name).write_bytes(content)
    host = Host(Shell(tmp_path), "--cert host.pem --key host.key", "https")
    host.start()
    try:
        token = host.do("cloister host token add me").stdout.strip()
        host.do(f"echo {token} | cloister login {host.url}", code=5)
        host.do(f"echo {token} | cloister login {host.url} --ca host.pem")
        assert told_of(host.do("cloister status --json"))["platform"] == "sim"
        host.do(f"echo {token} | cloister login http://127.0.0.1:{host.port}", code=5)
    finally:
        host.end(signal.SIGTERM)
