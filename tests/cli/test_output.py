import io
import json
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.cli import output
from cloister.errors import VerificationFailed, WrongUse
from cloister.verify import Factor

HOSTILE = {
    "clears the screen": "\x1b[2J\x1b[H",
    "colours": "\x1b[32mVERIFIED\x1b[0m",
    "writes the clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "writes the clipboard with C1": "\x9d52;c;cm0gLXJmIH4=\x9c",
    "sets the title": "\x1b]0;VERIFIED\x07",
    "links": "\x1b]8;;https://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "goes back over the line": "NOT TRUSTED\rVERIFIED   ",
    "goes back by letters": "NOT TRUSTED" + "\b" * 11 + "VERIFIED",
    "C1 control sequence": "\x9b2J",
    "turns letters around": "\u202eDEIFIREV\u202c",
    "isolates": "\u2066x\u2069\u2067y\u2068",
    "hides letters": "veri\u200bfied\u2060\ufeff",
    "tags": "ok\U000e0041\U000e0042",
    "rings": "\a\x07",
    "vertical": "a\x0bb\x0cc\x85d\u2028e",
    "surrogate": "\ud83d",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = output.printable(text)
    assert not [char for char in shown if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}]


@given(st.text(st.characters(codec=None)))
def test_no_text_at_all_leaves_a_control(text: str) -> None:
    shown = output.printable(text)
    left = {unicodedata.category(char) for char in shown if char not in "\n\t\u200c\u200d"}
    # Of the format characters, only visible ones of Arabic, Kaithi, Egyptian and such stay.
    assert not left & {"Cc", "Cs", "Zl", "Zp"}
    assert not [char for char in shown if unicodedata.bidirectional(char) in {"RLO", "LRO", "RLE", "LRE", "PDF"}]
    assert output.printable(shown) == shown
    shown.encode()


@pytest.mark.parametrize(
    "text", ["héllo\n\tworld", "日本語", "می\u200cخواهم", "👩\u200d👩\u200d👧", "שלום", "क्\u200dष"]
)
def test_every_language_stays(text: str) -> None:
    assert output.printable(text) == text


def test_a_joiner_beside_ascii_goes() -> None:
    assert output.printable("veri\u200dfied \u200c\u200d!") == "verified !"


def test_a_field_stays_one_line_and_short() -> None:
    assert output.one_line("a\nok  VERIFIED\tb\r\nc") == "a ok VERIFIED b c"
    assert output.one_line("x" * 300) == "x" * 199 + "…"


def test_an_answer_and_a_line_are_made_printable(capsys: pytest.CaptureFixture[str]) -> None:
    output.write("a\x1b[31mb\n")
    output.line("c\x1b]52;c;x\x07d")
    output.line(output.styled(("e\x9b2Jf", "bold red")))
    assert capsys.readouterr().out == "a[31mb\nc]52;c;xd\ne2Jf\n"


def test_markup_in_a_text_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    output.line("[bold green]VERIFIED[/] :lock: https://x 123")
    assert capsys.readouterr().out == "[bold green]VERIFIED[/] :lock: https://x 123\n"


def test_json_escapes_what_a_terminal_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"text": "".join(HOSTILE.values())}
    output.json_value(value)
    shown = capsys.readouterr().out
    assert json.loads(shown) == value
    assert shown.isascii()
    assert not [char for char in shown if unicodedata.category(char) == "Cc" and char != "\n"]


def test_an_error_shows_its_fields_and_hint_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_error(WrongUse("It\x1b[2J broke.", expected="a\nb", got="c", hint="Mend\x07 it."))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: It[2J broke.\n  expected: a b\n  got:      c\nhint: Mend it.\n"


def test_a_refusal_names_the_factors_that_failed(capsys: pytest.CaptureFixture[str]) -> None:
    factors = (Factor("platform", "pass", "sim", "sim"), Factor("model\r", "fail", "aa", "b\x1bb"))
    output.show_error(VerificationFailed("Refused.", factors=factors))
    assert capsys.readouterr().err == "error: Refused.\n  failed: model\n    expected: aa\n    got:      bb\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for stream, coloured in ((_Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stdout", stream)
        output.line(output.styled(("VERIFIED", "bold green")))
        assert ("\x1b[" in stream.getvalue()) is coloured


def test_prose_breaks_between_words_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "40")
    text = "hint: " + "many words " * 5
    for stream in (_Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        output.line(text, hang=6)
        lines = [one.rstrip() for one in stream.getvalue().splitlines()]
        folded = ["hint: many words many words many", "      words many words many words"]
        assert lines == (folded if stream.isatty() else [text.rstrip()])


def test_a_progress_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for stream, drawn in ((_Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with output.download_bar() as progress:
            progress("toy\x1b[2J.gguf", 1, 2)
        assert ("toy" in stream.getvalue()) is drawn
        assert "toy\x1b" not in stream.getvalue()
