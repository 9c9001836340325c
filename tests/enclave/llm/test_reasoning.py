import pytest

from cloister.enclave.llm.reasoning import MOST_BLANKS, Thinking, ThinkSplitter, thinking_of

QWEN3 = (
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\\n{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
QWQ = "{{ content.split('</think>')[-1] }}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "thinking"),
    [(None, ""), ("{{ messages }}{% if add_generation_prompt %}a{% endif %}", ""), (QWEN3, "tagged"), (QWQ, "opened")],
)
def test_thinking_follows_from_the_templates_source(template: str | None, thinking: str) -> None:
    assert thinking_of(template) == thinking


def split(thinking: Thinking, *pieces: str) -> tuple[str, str]:
    splitter = ThinkSplitter(thinking)
    found = [*map(splitter.feed, pieces), splitter.finish()]
    return "".join(thought for thought, _ in found), "".join(said for _, said in found)


@pytest.mark.parametrize(
    ("thinking", "text", "expected"),
    [
        ("tagged", "<think>\nSo, 1 < 2.\n\n</think>\n\nYes.\n", ("So, 1 < 2.", "Yes.\n")),
        ("tagged", "\n<think>a</think>b<think>c</think>", ("a", "b<think>c</think>")),
        ("tagged", "<think></think>Yes", ("", "Yes")),
        ("tagged", "<think>cut off </thi", ("cut off </thi", "")),
        ("tagged", "<think", ("", "<think")),
        ("tagged", " No <think>tag</think>", ("", " No <think>tag</think>")),
        ("tagged", "", ("", "")),
        ("opened", "So.\n</think>\n\nYes.", ("So.", "Yes.")),
        ("opened", "\n\n</think>\n\n{}", ("", "{}")),
        ("opened", "never said", ("never said", "")),
        ("", "<think>a</think>b", ("", "<think>a</think>b")),
    ],
)
def test_thoughts_are_split_off_wherever_the_text_is_cut(
    thinking: Thinking, text: str, expected: tuple[str, str]
) -> None:
    assert split(thinking, *text) == expected
    for cut in range(len(text) + 1):
        assert split(thinking, text[:cut], text[cut:]) == expected


def test_thoughts_are_passed_on_as_they_come() -> None:
    splitter = ThinkSplitter("tagged")
    assert splitter.feed("<think>\nFirst,") == ("First,", "")
    assert splitter.feed(" then </th") == (" then", "")
    assert splitter.feed("e end") == (" </the end", "")
    assert splitter.feed("</think>\n") == ("", "")
    assert splitter.feed("\nYes") == ("", "Yes")
    assert splitter.feed("\n") == ("", "\n")


def test_of_many_blanks_in_a_thought_only_the_last_are_held_back() -> None:
    """Each further one would cost more than the one before."""
    splitter = ThinkSplitter("opened")
    assert splitter.feed("a" + " " * 5000) == ("a" + " " * (5000 - MOST_BLANKS), "")
    assert splitter.feed("</think>") == ("", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a" + " " * MOST_BLANKS + "</think>b", ("a", "b")),
        ("<think>a" + " " * (MOST_BLANKS + 5) + "</think>b", ("a     ", "b")),
        (" " * MOST_BLANKS + "<think>a</think>b", ("a", "b")),
        (" " * (MOST_BLANKS + 1) + "<think>a", ("", " " * (MOST_BLANKS + 1) + "<think>a")),
    ],
)
def test_many_blanks_count_the_same_wherever_the_text_is_cut(text: str, expected: tuple[str, str]) -> None:
    assert split("tagged", text) == split("tagged", *text) == expected
