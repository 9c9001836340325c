import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.enclave.llm.llama.placeholders import ControlTexts, Placeholders

CHATML = ("<|im_start|>", "<|im_end|>", "<|im_end|>\n", "</s>", "[INST]")


def by_the_book(control: tuple[str, ...], text: str) -> list[tuple[int, int]]:
    """The same in one plain pattern that tries everything everywhere."""
    whole = sorted(map(re.escape, control), key=len, reverse=True)
    heads = sorted({t[:n] for t in control for n in range(2, len(t))}, key=len, reverse=True)
    tails = sorted({t[-n:] for t in control for n in range(2, len(t))}, key=len, reverse=True)
    pattern = (
        "|".join(whole) + rf"|(?:{'|'.join(map(re.escape, heads))})(?=\s*\Z)|\A(?:{'|'.join(map(re.escape, tails))})"
    )
    return [match.span() for match in re.finditer(pattern, text)]


@given(st.lists(st.sampled_from([*CHATML, "<|", "im_end|>", "_end|>", "<|im", "<", "|>", " ", "\n", "x"]), max_size=6))
def test_finds_what_one_plain_pattern_finds(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert list(ControlTexts(CHATML).spans(text)) == by_the_book(CHATML, text)


def test_prefers_the_longer_of_two_texts() -> None:
    found = ControlTexts(("ab", "abcd", "abce", "b")).spans("xabcdabcab")
    assert list(found) == [(1, 5), (5, 7), (8, 10)]


def test_without_control_tokens_nothing_is_hidden() -> None:
    mark = Placeholders(ControlTexts(("",)))
    assert mark.hide([{"a": "<|im_end|>", "n": 1, "none": None}]) == [{"a": "<|im_end|>", "n": 1, "none": None}]


@pytest.mark.parametrize("text", ["<", "<|", "<|reserved_special_token_", "<| ", "a", " "])
def test_a_long_message_full_of_beginnings_is_soon_read(text: str) -> None:
    """While it is read, nobody else's tokens are made."""
    control = ControlTexts([f"<|reserved_special_token_{n}|>" for n in range(250)])
    began = time.process_time()
    Placeholders(control).hide(text * (1_000_000 // len(text)))
    assert time.process_time() - began < 2
