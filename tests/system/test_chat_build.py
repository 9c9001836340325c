"""The page's checked-in files are what its sources and its lock make, byte for byte."""

import json
import subprocess
from pathlib import Path

import pytest
from tests.system.shell import ROOT, tool

pytestmark = pytest.mark.system

SOURCE = ROOT / "web" / "chat"
BUILT = ROOT / "src" / "cloister" / "proxy" / "page"


def node(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    assert (SOURCE / "node_modules").is_dir(), "npm ci, in web/chat, fetches what the lock names"
    return subprocess.run(
        [tool("node"), *map(str, arguments)], cwd=SOURCE, capture_output=True, text=True, timeout=300, check=False
    )


def test_what_is_installed_is_what_the_lock_names() -> None:
    lock = json.loads((SOURCE / "package-lock.json").read_text())["packages"]
    installed = json.loads((SOURCE / "node_modules" / ".package-lock.json").read_text())["packages"]
    assert installed
    for name, one in installed.items():
        assert (one["version"], one["integrity"]) == (lock[name]["version"], lock[name]["integrity"]), name


def test_the_lock_names_versions_and_digests_and_no_registry() -> None:
    text = (SOURCE / "package-lock.json").read_text()
    assert "://" not in text.replace('"url": "https://', "")  # where a package asks for donations
    for name, one in json.loads(text)["packages"].items():
        assert not name or one["integrity"].startswith("sha512-"), name
    asked = json.loads((SOURCE / "package.json").read_text())
    for version in (asked["dependencies"] | asked["devDependencies"]).values():
        assert version[0].isdigit(), version


def test_a_build_from_the_lock_gives_the_checked_in_bytes(tmp_path: Path) -> None:
    ran = node("build.mjs", tmp_path)
    assert ran.returncode == 0, ran.stderr
    built = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    kept = {one.name: one.read_bytes() for one in BUILT.iterdir()}
    assert built.keys() == kept.keys()
    assert [name for name in built if built[name] != kept[name]] == []


def test_the_sources_have_sound_types() -> None:
    ran = node("node_modules/typescript/bin/tsc", "--noEmit")
    assert ran.returncode == 0, ran.stdout
