import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from cloister.client import printable


@given(st.text())
def test_nothing_that_could_paint_a_terminal_is_left(text: str) -> None:
    shown = printable(text, 40)
    assert all(unicodedata.category(c)[0] != "C" and unicodedata.category(c) not in ("Zl", "Zp") for c in shown)
    assert len(shown) <= 43


def test_shows_what_is_harmless() -> None:
    assert printable(b"plain \xff \x1b[31mverified\x1b[0m \xe2\x80\xae") == '"plain \ufffd [31mverified [0m"'
