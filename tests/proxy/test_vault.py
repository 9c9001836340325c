import os
import stat
from pathlib import Path

import pytest

from cloister.errors import WrongUse
from cloister.proxy.vault import KEY_BYTES, Vault, vault_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "chat.key"


def test_the_key_is_made_once_and_survives_a_restart(path: Path) -> None:
    key = Vault(path).key()
    assert len(key) == KEY_BYTES
    assert Vault(path).key() == key
    assert Vault(path.with_name("other.key")).key() != key


def test_its_user_alone_may_read_it(path: Path) -> None:
    Vault(path).key()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_a_renewed_key_is_another_and_stays(path: Path) -> None:
    vault = Vault(path)
    old = vault.key()
    new = vault.renew()
    assert new != old
    assert Vault(path).key() == new
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_can_reach_is_refused(path: Path, mode: int) -> None:
    Vault(path).key()
    path.chmod(mode)
    with pytest.raises(WrongUse, match="Others can reach"):
        Vault(path).key()


def test_a_link_is_refused(path: Path) -> None:
    Vault(path.with_name("elsewhere")).key()
    path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(WrongUse, match="Others can reach"):
        Vault(path).key()


def test_a_damaged_key_is_refused_and_not_shown(path: Path) -> None:
    Vault(path).key()
    path.write_bytes(b"marked")
    with pytest.raises(WrongUse, match="damaged") as caught:
        Vault(path).key()
    assert "marked" not in str(caught.value) + caught.value.hint


def test_a_place_that_cannot_be_written_is_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WrongUse, match="cannot be used"):
        Vault(tmp_path / "file" / "chat.key").key()


def test_of_two_that_make_it_at_once_both_get_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link
    others: list[bytes] = []

    def late(draft: Path, place: Path) -> None:
        if not others:
            others.append(b"")
            others.append(Vault(path).key())
        link(draft, place)

    monkeypatch.setattr("cloister.private_file.os.link", late)
    assert Vault(path).key() == others[1]


def test_it_lies_in_the_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert vault_file() == tmp_path / "cloister" / "chat.key"
