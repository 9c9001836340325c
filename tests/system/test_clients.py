"""Every recipe of docs/clients.md runs as it is shown (ports apart), against a simulated enclave."""

import re

import pytest
from tests.system.shell import ROOT, Shell, free_port, tool

pytestmark = pytest.mark.system

_FENCE = re.compile(r"^## ([^\n]+)\n.*?^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_every_recipe_works(shell: Shell) -> None:
    tool("curl")
    text = (ROOT / "docs" / "clients.md").read_text()
    (connect,) = re.findall(r"^\$ (cloister connect .*)$", text, re.MULTILINE)
    recipes = _FENCE.findall(text)
    assert len(recipes) == text.count("```python") + text.count("```bash")
    serve, port = str(free_port()), str(free_port())
    with (
        shell.background(f"cloister serve --platform sim --port {serve}"),
        shell.background(connect.replace("8484", serve).replace("8485", port)),
    ):
        for title, kind, recipe in recipes:
            program = shell.home / f"recipe.{kind}"
            program.write_text(recipe.replace("8485", port))
            done = shell.run(f"{kind} {program.name}")
            assert done.returncode == 0, (title, done.stdout, done.stderr)
            assert len(done.stdout.strip()) > 8, (title, done.stdout)
