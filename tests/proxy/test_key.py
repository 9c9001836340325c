import stat
from pathlib import Path

import pytest

from cloister.errors import WrongUse
from cloister.proxy.key import key_file, needs_key, own_key


@pytest.mark.parametrize(
    ("platform", "needed"), [("linux", False), ("darwin", True), ("win32", True), ("freebsd14", True)]
)
def test_a_key_is_needed_where_the_kernel_does_not_say_who_asks(platform: str, needed: bool) -> None:
    assert needs_key(platform) == needed


def test_it_is_made_once_and_kept_for_its_user_alone(tmp_path: Path) -> None:
    file = tmp_path / "state" / "proxy.key"
    first, second = own_key(file), own_key(file)
    assert (first.made, second.made) == (True, False)
    assert first.text == second.text
    assert len(first.text) == 43
    assert file.read_text() == f"{first.text}\n", "so that a shell can read it"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert own_key(tmp_path / "other.key").text != first.text


def test_it_stands_in_the_state_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert own_key().file == key_file() == tmp_path / "cloister" / "proxy.key"


def test_its_letters_are_in_no_representation(tmp_path: Path) -> None:
    key = own_key(tmp_path / "proxy.key")
    assert key.text not in f"{key!r} {key}"


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "proxy.key"
    own_key(file)
    file.chmod(0o644)
    with pytest.raises(WrongUse, match="Others can reach"):
        own_key(file)


@pytest.mark.parametrize("content", [b"", b"short\n", b"a" * 44, b"\xff" * 43, b"a" * 43 + b"\nb"])
def test_a_damaged_file_is_refused_and_not_replaced(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "proxy.key"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(WrongUse) as caught:
        own_key(file)
    assert "Moving it away" in caught.value.hint
    assert file.read_bytes() == content


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WrongUse, match="cannot be used"):
        own_key(tmp_path / "file" / "proxy.key")
