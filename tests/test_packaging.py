"""The container's recipe: locked like the rest, made of files that are there, and complete."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.system.shell import free_port
from typer.main import get_command

from cloister.cli.main import app

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "packaging" / "container" / "Containerfile"
_PIN = re.compile(r"^([a-z0-9-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)


def pins(path: Path) -> dict[str, tuple[str, frozenset[str]]]:
    """Name -> version and hashes."""
    return {name: (version, frozenset(hashes.split())) for name, version, hashes in _PIN.findall(path.read_text())}


def instructions() -> list[list[str]]:
    text = re.sub(r"^#.*\n", "", RECIPE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line]


def test_the_container_installs_what_is_tested_here_and_nothing_unlocked() -> None:
    ours, tested = pins(RECIPE.with_name("requirements.txt")), pins(ROOT / "requirements" / "dev.txt")
    assert {name: tested.get(name) for name in ours} == ours
    client = pins(ROOT / "requirements" / "client.txt")
    assert ours.keys() == client.keys() | {"httptools", "starlette", "uvicorn", "click", "setuptools"}, (
        "client, proxy, and the build"
    )
    installs = [words for words in instructions() if words[0] == "RUN" and "install" in words]
    assert len(installs) == 2
    assert all("--no-deps" in words for words in installs)
    assert all("--require-hashes" in words or "--no-index" in words for words in installs)


def test_the_recipes_files_are_there() -> None:
    copied = [words for words in instructions() if words[0] == "COPY" and not words[1].startswith("--from")]
    assert len(copied) == 3
    for words in copied:
        for name in words[1:-1]:
            assert (ROOT / name).exists(), name


def test_it_runs_the_proxy_as_nobody_in_particular() -> None:
    last = instructions()[-5:]
    assert ["USER", "65532:65532"] in last
    (entry,) = [words for words in last if words[0] == "ENTRYPOINT"]
    program, command = "".join(entry[1:]).strip("[]").split(",")
    assert (Path(program).name, command) == ("cloister", "connect")
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert command in commands


IMPORTS = """
import ast, importlib, json, sys
from pathlib import Path
importlib.import_module("cloister.cli.connect")
looked_at, missing = {}, set()
while new := [name for name in sys.modules if name.partition(".")[0] == "cloister" and name not in looked_at]:
    for name in new:
        looked_at[name] = sys.modules[name].__file__
        for node in ast.walk(ast.parse(Path(looked_at[name]).read_bytes())):
            told = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            for one in [node.module] if isinstance(node, ast.ImportFrom) else told:
                if one.partition(".")[0] in sys.stdlib_module_names:
                    continue
                try:
                    importlib.import_module(one)
                except ModuleNotFoundError as error:
                    missing.add(error.name.partition(".")[0])
print(json.dumps([looked_at, sorted(missing)]))
"""
"""All that `cloister connect` imports, and what its modules would import later, in the midst of a function."""

OF_EXTRAS = ["lxml", "signxml", "sigstore"]
"""Imported where they are installed, or where a policy asks for them, whose error names the extra."""


@pytest.mark.system
def test_what_it_installs_is_all_that_the_proxy_needs(tmp_path: Path) -> None:
    """The recipe's own two installations, from the package registry, in an environment that holds nothing else."""
    _copy_and_install(tmp_path)
    binaries = tmp_path / "opt" / "cloister" / "bin"

    def run(*command: str) -> "subprocess.CompletedProcess[str]":
        environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    probed = run(str(binaries / "python"), "-I", "-c", IMPORTS)
    assert probed.returncode == 0, probed.stderr
    modules, missing = json.loads(probed.stdout)
    assert missing == OF_EXTRAS
    assert {"cloister.cli.connect", "cloister.proxy.app", "cloister.verify.rim"} <= modules.keys()
    assert all(Path(file).is_relative_to(binaries.parent) for file in modules.values())
    helped = run(str(binaries / "cloister"), "connect", "--help")
    assert (helped.returncode, "--policy-of" in helped.stdout) == (0, True), helped.stderr
    nobody_there = run(str(binaries / "cloister"), "connect", f"http://127.0.0.1:{free_port()}", "--port", "0")
    assert nobody_there.returncode == 5, nobody_there.stderr


def _copy_and_install(root: Path) -> None:
    """What the recipe's first part copies and runs, with `root` as `/`; but with this environment's pip, which saves time."""
    for words in instructions():
        if words[0] == "COPY" and not words[1].startswith("--from"):
            *names, to = words[1:]
            for source in (ROOT / name for name in names):
                target = root / to.lstrip("/") / (source.name if to.endswith("/") else "")
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
                else:
                    shutil.copy(source, target)
        elif words[0] == "RUN":
            for command in " ".join(words[1:]).replace("--no-cache-dir ", "").split(" && "):
                program, *rest = [f"{root}{word}" if word.startswith("/") else word for word in command.split()]
                if program == "python3":
                    _run(sys.executable, *rest, "--without-pip")
                else:
                    _run(sys.executable, "-m", "pip", "--python", program, *rest[rest.index("pip") + 1 :])


def _run(*command: str) -> None:
    environment = {**os.environ, "PIP_NO_COMPILE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, (command, ran.stdout, ran.stderr)
