"""The house rules that no other tool enforces."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import cloister.errors
from cloister.errors import CloisterError
from cloister.sim.measure import ROOMS

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def test_import_directions_hold() -> None:
    ran = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout


def test_the_enclave_process_loads_no_room_that_is_not_measured() -> None:
    probe = (
        "import sys, json, pkgutil, importlib, cloister.enclave as e\n"
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(e.__path__, 'cloister.enclave.')"
        " if not m.name.endswith('__main__')]\n"
        "print(json.dumps(sorted({'.'.join(m.split('.')[:2]) for m in sys.modules if m.startswith('cloister.')})))"
    )
    ran = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True, check=True)
    assert set(json.loads(ran.stdout)) == {f"cloister.{room.removesuffix('.py')}" for room in ROOMS}


def test_every_exception_is_exported_and_has_an_exit_code() -> None:
    defined = {
        name
        for name, value in vars(cloister.errors).items()
        if isinstance(value, type) and issubclass(value, CloisterError)
    }
    assert defined == set(cloister.errors.__all__)
    assert {getattr(cloister.errors, name).exit_code for name in defined} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_module_is_short_and_has_no_assert(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 600
    assert not [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]


def test_locks_hold_hashes_and_no_registry() -> None:
    locks = sorted((ROOT / "requirements").glob("*.txt"))
    assert {lock.stem for lock in locks} == {"client", "server", "dev", "engine", "peers", "interop"}
    for lock in locks:
        text = lock.read_text()
        assert "://" not in text
        assert "--index" not in text
        pinned = [line for line in text.splitlines() if "==" in line and not line.startswith((" ", "#"))]
        assert pinned
        assert text.count("--hash=sha256:") >= len(pinned)


def test_the_client_has_at_most_six_direct_dependencies() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(project["dependencies"]) <= 6
