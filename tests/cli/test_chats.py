from pathlib import Path

import pytest

from cloister.cli.chats import Chats, KeptHistory
from cloister.errors import WrongUse

TALK = {"v": 1, "turns": [["my secret question", "an answer"]]}


def test_what_is_saved_comes_back_and_lies_encrypted_and_private(tmp_path: Path) -> None:
    chats = Chats(tmp_path / "chats")
    chats.save("trip", TALK)
    assert Chats(tmp_path / "chats").load("trip") == TALK
    assert chats.names() == ["trip"]
    for path in (tmp_path / "chats").iterdir():
        assert b"secret" not in path.read_bytes()
        assert path.stat().st_mode & 0o077 == 0
    assert (tmp_path / "chats").stat().st_mode & 0o077 == 0


def test_saving_again_replaces(tmp_path: Path) -> None:
    chats = Chats(tmp_path)
    chats.save("a", TALK)
    chats.save("a", {"v": 2})
    assert chats.load("a") == {"v": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.chat", "key"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a" * 61, "a b", "a\n"])
def test_a_name_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(WrongUse, match="A name has"):
        Chats(tmp_path).save(name, TALK)


def test_no_byte_of_what_was_saved_may_change_nor_its_name(tmp_path: Path) -> None:
    chats = Chats(tmp_path)
    chats.save("a", TALK)
    sealed = (tmp_path / "a.chat").read_bytes()
    for at in range(len(sealed)):
        (tmp_path / "a.chat").write_bytes(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :])
        with pytest.raises(WrongUse, match="does not open"):
            chats.load("a")
    (tmp_path / "b.chat").write_bytes(sealed)
    with pytest.raises(WrongUse, match="does not open"):
        chats.load("b")
    (tmp_path / "a.chat").write_bytes(b"")
    with pytest.raises(WrongUse, match="does not open"):
        chats.load("a")


def test_a_folder_or_key_that_others_reach_is_refused(tmp_path: Path) -> None:
    chats = Chats(tmp_path)
    chats.save("a", TALK)
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(WrongUse, match="Others can reach"):
        chats.load("a")


def test_lines_come_newest_first_and_damage_costs_only_the_damaged(tmp_path: Path) -> None:
    history = KeptHistory(Chats(tmp_path))
    for text in ("one", "two\nlines", "three"):
        history.store_string(text)
    assert list(KeptHistory(Chats(tmp_path)).load_history_strings()) == ["three", "two\nlines", "one"]
    rows = (tmp_path / "lines").read_bytes().splitlines(keepends=True)
    (tmp_path / "lines").write_bytes(rows[0] + b"nonsense\n" + rows[2])
    assert list(KeptHistory(Chats(tmp_path)).load_history_strings()) == ["three", "one"]
    assert (tmp_path / "lines").stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_written_is_said_and_stops_no_question(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    chats = Chats(tmp_path / "file" / "chats")
    with pytest.raises(WrongUse, match="cannot be kept"):
        chats.save("a", TALK)
    with pytest.raises(WrongUse, match="cannot be kept"):
        chats.add_line("one")
    KeptHistory(chats).store_string("one")
