"""`cloister test`, as its user sees it: a process of its own, and an app without requirements."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.running import run

from cloister.cli import test as command
from cloister.cli.main import app
from cloister.errors import WrongUse
from cloister.owner.appfile import AppFile
from cloister.owner.requirements import HERE, target_of

TOML = """
name = "hello"
app = "main:app"
kind = "wsgi"
health = "/health"
tests = "{python} check.py"
secrets = ["TOKEN"]
"""
APP = """
import os
def app(environ, start_response):
    start_response("200 OK", [("content-type", "text/plain"), ("set-cookie", "a=b")])
    return [os.environ["TOKEN"].encode()]
"""
CHECK = """
import os, sys, urllib.request
assert "TOKEN" not in os.environ
with urllib.request.urlopen(os.environ["CLOISTER_URL"] + "/anything?q=1") as answer:
    assert answer.headers["set-cookie"] == "a=b"
    print("it said", answer.read().decode())
sys.exit({code})
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "cloister.toml").write_text(TOML.format(python=sys.executable))
    (folder / "main.py").write_text(APP)
    (folder / "check.py").write_text(CHECK.format(code=0))
    (folder / "secrets.toml").write_text('TOKEN = "the-secret"\n')
    return folder


def cloister(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("cloister")), "test", str(folder), *words]
    environment = {**os.environ, "XDG_STATE_HOME": str(folder.parent / "state")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def test_an_app_whose_tests_pass(folder: Path) -> None:
    ran = cloister(folder)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "hello: passed\n"
    assert "it said the-secret" in ran.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["check.py", "cloister.toml", "main.py", "secrets.toml"]
    assert not (folder.parent / "state" / "cloister" / "bundles").exists()  # keys of a bundle that is gone


def test_tests_that_fail_fail_the_command(folder: Path) -> None:
    (folder / "check.py").write_text(CHECK.format(code=3))
    ran = cloister(folder, "--json")
    assert ran.returncode == 1
    told = json.loads(ran.stdout)
    assert (told["passed"], told["exit_code"], told["verification"]["verdict"]) == (False, 3, "simulated")


def test_an_app_that_cannot_start_is_told_with_its_place(folder: Path) -> None:
    (folder / "main.py").write_text("import missing_thing\n")
    ran = cloister(folder)
    assert ran.returncode == 2
    assert "ModuleNotFoundError: missing_thing" in ran.stderr
    assert "main.py:1" in ran.stderr


def test_a_secret_without_a_value_is_told_before_anything_starts(folder: Path) -> None:
    (folder / "secrets.toml").unlink()
    ran = cloister(folder)
    assert ran.returncode == 2
    assert "TOKEN" in ran.stderr
    assert "measuring" not in ran.stderr


def test_requirements_are_fetched_for_the_python_that_is_here_wherever_the_app_goes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[AppFile] = []

    def pack(app: AppFile, *_: object) -> None:
        packed.append(app)
        raise WrongUse("Far enough.")

    monkeypatch.setattr(command, "pack", pack)
    lines = 'platform = "tdx"\nrequirements = "lock.txt"\npython = "3.14"\n'
    (folder / "lock.txt").touch()
    (folder / "cloister.toml").write_text((folder / "cloister.toml").read_text() + lines)
    assert run(app, "test", str(folder)).exit_code == 2
    assert [target_of(one.platform, one.python) for one in packed] == [HERE]
