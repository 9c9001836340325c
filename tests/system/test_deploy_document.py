"""Every command of docs/deploy.md runs as it is shown (ports apart), in its order, in one home."""

import re
import socket
from pathlib import Path

import pytest
from tests.system.shell import ROOT, Shell, free_port

from cloister.owner.appfile import TABLES

pytestmark = pytest.mark.system

TEXT = (ROOT / "docs" / "deploy.md").read_text()
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"^```console\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


def ports() -> tuple[int, str]:
    """For the API, and ten in a row for apps."""
    api = free_port()
    while True:
        first = free_port()
        if first < 65000 and not any(taken(port) for port in range(first, first + 10)):
            return api, f"{first}-{first + 9}"


def taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_every_command_works_in_its_order(tmp_path: Path) -> None:
    api, apps = ports()
    host, *rest = [command.replace("8700", str(api)).replace("8500-8599", apps) for command in COMMANDS]
    assert host.startswith("cloister host ")
    shell = Shell(tmp_path)
    with shell.background(host):
        token = ""
        for command in rest:
            piped = f"echo {token} | {command}" if command.startswith("cloister login") else command
            done = shell.run(piped, timeout=300)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            if command.startswith("cloister host token add"):
                token = done.stdout.strip()
            if command.startswith("cloister deploy"):
                ready, line = done.stdout.splitlines()
                assert re.fullmatch(r"ready http://127\.0\.0\.1:\d+/#owner=ed25519:[\w-]{43}&deployment=\w+", ready)
                asked = shell.run(line)
                assert asked.returncode == 0, (line, asked.stderr)
                assert len(asked.stdout.strip()) > 8
    assert len(rest) > 12


def test_every_command_of_an_apps_life_is_shown() -> None:
    shown = {command.split()[1] for command in COMMANDS}
    assert shown >= {"host", "login", "logout", "init", "test", "deploy", "list", "status", "logs", "restart", "expire"}
    assert shown >= {"stop", "remove"}
    assert "cloister package" in TEXT


def test_every_key_of_an_apps_file_is_shown_and_no_other() -> None:
    section = TEXT.partition("\n## What stands in cloister.toml\n")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| `([a-z_.]+)` \|", section, re.MULTILINE)
    known = [f"{table}.{key}" if table else key for table, keys in TABLES.items() for key in keys]
    assert sorted(shown) == sorted({*known} - {"resources", "client"})
