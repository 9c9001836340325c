import pytest

from cloister.cli.rendering import finished, show_markdown

TEXT = """# Title

A paragraph
of two lines.

```python
print("hello")

# a comment
```
After the code.

~~~
``` not an end
~~~

last"""


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("", ""),
        ("no end", ""),
        ("a line\n", ""),
        ("a\n\nb", "a\n\n"),
        ("```\ncode\n\nmore\n", ""),
        ("```\ncode\n```\n", "```\ncode\n```\n"),
        ("````\n```\n````\nx", "````\n```\n````\n"),
        ("```\n~~~\n\n", ""),
        ("```\n```python\n\n", ""),
    ],
)
def test_only_whole_blocks_are_finished(text: str, whole: str) -> None:
    assert text[: finished(text)] == whole


def test_what_is_finished_stays_so_whatever_follows() -> None:
    for length in range(len(TEXT)):
        assert finished(TEXT) >= finished(TEXT[:length])
        assert finished(TEXT[:length] + "\n\n# More\n\n") >= finished(TEXT[:length])


def test_an_answer_is_drawn_once_however_it_was_cut(capsys: pytest.CaptureFixture[str]) -> None:
    show_markdown(["# Title\n\nSome **bold** words.\n\n- one\n- two\n"])
    whole = capsys.readouterr().out
    show_markdown("# Title\n\nSome **bold** words.\n\n- one\n- two\n")
    assert capsys.readouterr().out == whole
    assert "Some bold words." in whole
    assert whole.count("one") == 1


def test_what_came_is_drawn_when_it_breaks_off(capsys: pytest.CaptureFixture[str]) -> None:
    def breaking() -> object:
        yield "The beginn"
        raise KeyError

    with pytest.raises(KeyError):
        show_markdown(breaking())  # type: ignore[arg-type]
    assert capsys.readouterr().out.strip() == "The beginn"


def test_a_hostile_answer_cannot_paint_nor_link(capsys: pytest.CaptureFixture[str]) -> None:
    show_markdown(["\x1b]8;;http://evil\x07x\x1b]8;;\x07 [here](http://evil.example) \x1b[2J\u202e"])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "http://evil.example" in shown
