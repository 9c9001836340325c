import json
import re

import pytest
from tests.enclave.llm.schema_check import random_text

from cloister.enclave.llm.grammar import Grammar
from cloister.enclave.llm.patterns import PatternError, gbnf_of_pattern, literal, one_of


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "^$",
        "abc",
        "^a|b$",
        "a*b+c?",
        "a{2}b{1,}c{0,3}?",
        r"[\w.-]+@[a-z\d]+\.[a-z]{2,4}",
        r"(?:a(b|c)|d){2}",
        r"[^\s\"\\]",
        r'["\\/\n]',
        r"\x41\u00e9\.\-\/\$",
        r".\S\W\D",
        "[]a]|[a-]",
        "é[à-ü]",
    ],
)
def test_what_the_grammar_writes_matches_the_pattern(pattern: str) -> None:
    grammar = Grammar(f'root ::= "\\"" {gbnf_of_pattern(pattern)} "\\""')
    for seed in range(40):
        text = json.loads(random_text(grammar, seed))
        assert re.search(pattern, text) is not None, text


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        ")",
        "a)",
        "[a",
        "*a",
        "a**",
        "a{2",
        "a{3,2}",
        "a{x}",
        "a{0}",
        "a{99999999999}",
        "a^b",
        "a$b",
        "(^a)",
        "(?=a)",
        "(?P<n>a)",
        r"\1",
        r"\bword",
        r"\p{L}",
        r"\u12",
        "[z-a]",
        r"[\d-z]x{",
        "[\x00]",
        "\\",
        "(" * 50 + ")" * 50,
        "a" * 1025,
    ],
)
def test_what_is_not_understood_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        gbnf_of_pattern(pattern)


@pytest.mark.parametrize(
    "texts",
    [["a"], ["", "a", "ab"], ["ab", "abc", "b", "ab"], [f"v{n}" for n in range(1000)], ["x" * n for n in range(40)]],
)
def test_one_of_many_texts_is_told_with_few_ways_at_a_time(texts: list[str]) -> None:
    grammar = Grammar(f'root ::= "<" {one_of(texts)} ">"')
    for text in texts:
        state = grammar.start
        for char in f"<{text}>":
            after = grammar.after(state, char.encode())
            assert after is not None, text
            state = after
        assert state.must_end
    for text in ("abx", "v", "v1000", "v00", "x" * 40):
        found = grammar.after(grammar.start, f"<{text}>".encode())
        assert found is None, text


@pytest.mark.parametrize("text", ["", 'a"b\\c', "\n\r\t\x00\x1f", "é日😀\ufdd0", "]^-"])
def test_a_literal_is_its_text(text: str) -> None:
    grammar = Grammar(f'root ::= "<" {literal(text)} ">"')
    assert random_text(grammar, 1) == f"<{text}>"
