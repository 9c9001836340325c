"""Every command that the README shows works as it is shown (ports apart)."""

import re
from contextlib import ExitStack

import pytest
from tests.system.shell import ROOT, Shell, free_port, tool

pytestmark = pytest.mark.system


def _commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def _python() -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))


def test_every_command_of_the_readme_works(shell: Shell) -> None:
    tool("curl")
    serve, connect = str(free_port()), str(free_port())
    ran = []
    with ExitStack() as running:
        for shown in _commands():
            if shown.startswith("make "):
                continue  # test_make.py
            command = shown.replace("8484", serve).replace("8485", connect)
            if command.startswith(("cloister serve", "cloister connect")):
                running.enter_context(shell.background(command))
            else:
                done = shell.run(command)
                assert done.returncode == 0, (command, done.stdout, done.stderr)
                assert done.stdout.strip() or "chat" in command, command
            ran.append(command.split()[1])
        program = shell.home / "readme.py"
        program.write_text(_python().replace("8484", serve))
        done = shell.run(f"python {program.name}")
        assert (done.returncode, done.stdout.strip()) == (0, "demo"), done.stderr
    assert {"serve", "verify", "ask", "chat", "connect", "demo"} <= set(ran)
