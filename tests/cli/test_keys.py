import hashlib
import json
import stat
from pathlib import Path

import pytest
from tests.cli.running import run

from cloister.cli.keys import read_keys
from cloister.cli.main import app
from cloister.errors import WrongUse


def test_a_key_is_shown_once_and_rests_as_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    made = run(app, "keys", "new", str(file), "alice")
    assert made.exit_code == 0
    key = made.stdout.strip()
    assert key.startswith("ck-")
    assert key not in file.read_text()
    assert [(k.name, k.sha256) for k in read_keys(file)] == [("alice", hashlib.sha256(key.encode()).hexdigest())]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_two_keys_of_one_name_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    run(app, "keys", "new", str(file), "alice")
    before = file.read_text()
    assert run(app, "keys", "new", str(file), "alice").exit_code == 2
    assert file.read_text() == before


def test_list_shows_names_and_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = json.loads(run(app, "keys", "new", str(file), "alice", "--json").stdout)["key"]
    listed = run(app, "keys", "list", str(file)).stdout
    assert "alice" in listed
    assert key not in listed


@pytest.mark.parametrize("content", ["", "alice\n", "alice zz\n", "alice " + "0" * 63 + "\n", "a b " + "0" * 64 + "\n"])
def test_a_file_that_is_no_list_of_hashes_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(WrongUse):
        read_keys(file)


def test_a_file_that_cannot_be_written_is_wrong_use(tmp_path: Path) -> None:
    refused = run(app, "keys", "new", str(tmp_path / "missing" / "keys"), "alice")
    assert (refused.exit_code, refused.stdout) == (2, "")
