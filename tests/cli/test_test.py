"""`cloister test`, as its user sees it: a process of its own, and an app without requirements."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
