import os
from pathlib import Path

import pytest
from tests.enclave.runtime.world import bundle

from cloister.errors import WrongUse
from cloister.evidence.bundle import parse_bundle_head
from cloister.owner.filekeys import load, save

HEAD = parse_bundle_head(bundle({"code": b"x"})[0])
KEYS = {"code": os.urandom(32)}


def test_keys_come_back_and_only_their_user_can_read_them(tmp_path: Path) -> None:
    state = tmp_path / "state"
    save(state, HEAD.id, KEYS)
    assert load(state, HEAD) == KEYS
    assert (state / "bundles").stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in (state / "bundles").iterdir()] == [0o600]


def test_keys_that_others_can_reach_are_refused(tmp_path: Path) -> None:
    save(tmp_path, HEAD.id, KEYS)
    (file,) = (tmp_path / "bundles").iterdir()
    file.chmod(0o644)
    with pytest.raises(WrongUse, match="Others can reach"):
        load(tmp_path, HEAD)


def test_keys_behind_a_link_are_refused(tmp_path: Path) -> None:
    save(tmp_path, HEAD.id, KEYS)
    (file,) = (tmp_path / "bundles").iterdir()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WrongUse):
        load(tmp_path, HEAD)


def test_another_owners_bundle_has_no_keys_here(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="not on this machine"):
        load(tmp_path, HEAD)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"v":1,"keys":{"code":"AAAA"}}', b'{"v":1,"keys":{"more":"AAAA"}}'])
def test_a_damaged_file_is_told(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, HEAD.id, KEYS)
    (file,) = (tmp_path / "bundles").iterdir()
    file.write_bytes(content)
    with pytest.raises(WrongUse, match="cannot be read"):
        load(tmp_path, HEAD)
