import json
from pathlib import Path

import pytest
from tests.cli.running import run
from tests.owner.wheels import lock

from cloister.cli.main import app
from cloister.evidence.bundle import parse_bundle_head

TOML = 'name = "hello"\napp = "main:app"\nkind = "wsgi"\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "cloister.toml").write_text(TOML)
    (folder / "main.py").write_text("app = None")
    return folder


def test_one_sealed_file_and_its_address_on_standard_output(folder: Path) -> None:
    ran = run(app, "package", str(folder))
    assert ran.exit_code == 0
    assert ran.stdout == f"{folder / 'hello.cloister'}\n"
    head = parse_bundle_head((folder / "hello.cloister").read_bytes())
    assert f"sha256:{head.sha256}" in ran.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["cloister.toml", "hello.cloister", "main.py"]


def test_as_json_it_tells_the_digests_and_no_key(folder: Path, tmp_path: Path) -> None:
    ran = run(app, "package", str(folder), "--json", "--out", str(tmp_path / "b.cloister"))
    told = json.loads(ran.stdout)
    head = parse_bundle_head((tmp_path / "b.cloister").read_bytes())
    assert told["app_sha256"] == head.sha256
    assert told["bytes"] == (tmp_path / "b.cloister").stat().st_size
    (keys,) = (tmp_path / "state" / "cloister" / "bundles").iterdir()
    key = json.loads(keys.read_text())["keys"]["code"]
    assert key not in ran.stdout + ran.stderr


def test_which_python_its_requirements_are_for_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock(["itsdangerous"], tmp_path / "index", folder / "lock.txt")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (folder / "cloister.toml").write_text(f'{TOML}requirements = "lock.txt"\nplatform = "sev-snp"\n')
    ran = run(app, "package", str(folder))
    assert "for Python 3.13\n" in ran.stderr
    assert parse_bundle_head((folder / "hello.cloister").read_bytes()).manifest.python == "3.13"
    (folder / "cloister.toml").write_text(f'{TOML}requirements = "lock.txt"\npython = "3.14"\n')
    assert json.loads(run(app, "package", str(folder), "--json").stdout)["python"] == "3.14"


def test_a_bundle_is_no_part_of_the_next_one(folder: Path) -> None:
    digests = [json.loads(run(app, "package", str(folder), "--json").stdout)["app_sha256"] for _ in range(2)]
    assert digests[0] == digests[1]


def test_a_fault_in_the_file_is_told_with_its_line(folder: Path) -> None:
    (folder / "cloister.toml").write_text(TOML.replace("wsgi", "cgi"))
    ran = run(app, "package", str(folder))
    assert ran.exit_code == 4
    assert "cloister.toml, line 3: kind" in ran.stderr
    assert "hint: " in ran.stderr
