from pathlib import Path

import pytest

from cloister.errors import WrongUse
from cloister.owner.secrets import read_secrets


def test_the_file_goes_before_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "secrets.toml"
    file.write_text('A = "file"\nUNASKED = "x"\n')
    found = read_secrets(("A", "B"), {"A": "environment", "B": "environment", "C": "x"}, file)
    assert found == {"A": "file", "B": "environment"}


def test_one_without_a_value_is_named_and_no_value_is(tmp_path: Path) -> None:
    file = tmp_path / "secrets.toml"
    file.write_text('A = "canary"\nB = 3\n')
    for names in (("A", "C"), ("A", "B")):
        with pytest.raises(WrongUse, match=names[1]) as caught:
            read_secrets(names, {}, file)
        assert "canary" not in f"{caught.value}{caught.value.hint}"


def test_a_file_that_cannot_be_read_is_told_without_its_words(tmp_path: Path) -> None:
    file = tmp_path / "secrets.toml"
    file.write_text("A = canary")
    for path in (file, tmp_path / "nowhere"):
        with pytest.raises(WrongUse) as caught:
            read_secrets(("A",), {}, path)
        assert "canary" not in f"{caught.value}{caught.value.hint}{caught.value.got}"
        assert caught.value.__suppress_context__
