import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.enclave.llm.grammar import Grammar, State
from cloister.errors import WrongUse

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


def follow(grammar: Grammar, *pieces: bytes) -> State | None:
    state: State | None = grammar.start
    for piece in pieces:
        state = None if state is None else grammar.after(state, piece)
    return state


def takes(text: str, grammar: str) -> bool:
    state = follow(Grammar(grammar), text.encode())
    return state is not None and state.may_end


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        ('root ::= "ab" | "ac"', ["ab", "ac"], ["", "a", "ad", "abc"]),
        ("root ::= [a-c]*", ["", "abcabc"], ["abd"]),
        ("root ::= [^a-c]+", ["dé😀"], ["", "da"]),
        ('root ::= "a"{2,3} "b"?', ["aa", "aaab"], ["a", "aaaa", "ab"]),
        ('root ::= "a"{2,}', ["aa", "a" * 50], ["a"]),
        ('root ::= "a"{0} "b"', ["b"], ["ab", ""]),
        ('root ::= "(" root ")" | "x"', ["x", "((x))"], ["((x)", "()"]),
        ('root ::= ("a" | "ab") ("c" | "bc")', ["ac", "abc", "abbc"], ["ab"]),
        ("root ::= . .", ["a\n", "😀é"], ["a"]),
        (
            JSON,
            ['{"a": [1, -2.5e3, "\\u00e9\\n", {}], "b": null}', "{ }"],
            ["[]", '{"a": 01}', '{"a": 1,}', '{"a": "\n"}'],
        ),
    ],
)
def test_takes_what_the_grammar_says_and_nothing_else(grammar: str, yes: list[str], no: list[str]) -> None:
    assert [text for text in yes if not takes(text, grammar)] == []
    assert [text for text in no if takes(text, grammar)] == []


@given(st.text(max_size=6), st.data())
def test_bytes_may_be_cut_anywhere(text: str, data: st.DataObject) -> None:
    grammar = Grammar("root ::= [^a]{0,6}")
    raw = text.encode(errors="surrogatepass")
    cut = data.draw(st.integers(0, len(raw)))
    whole, parts = follow(grammar, raw), follow(grammar, raw[:cut], raw[cut:])
    assert (whole is None) == (parts is None)
    assert whole == parts


@pytest.mark.parametrize(
    "raw", [b"\xff", b"\x80", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe9a", b"\xf5"]
)
def test_what_is_no_utf8_fits_nothing(raw: bytes) -> None:
    grammar = Grammar("root ::= .*")
    assert follow(grammar, raw) is None
    assert follow(grammar, *(bytes([byte]) for byte in raw)) is None


def test_half_a_character_fits_only_where_the_whole_can() -> None:
    grammar = Grammar('root ::= "é" [ж-ю]')
    assert follow(grammar, "é".encode()[:1]) is not None
    assert follow(grammar, b"\xc2") is None, "it begins other characters"
    state = follow(grammar, "éж".encode()[:-1])
    assert state is not None
    assert not state.may_end
    assert follow(grammar, "éж".encode()) is not None


def test_first_bytes_leave_out_none_that_fits() -> None:
    grammar = Grammar('root ::= [aé-\u07ff] | "😀" | [\\u4e00-\\u9fff]')
    firsts = grammar.start.first_bytes()
    assert firsts == {ord("a"), *range(0xC3, 0xE0), 0xF0, *range(0xE4, 0xEA)}


def test_knows_when_it_may_and_when_it_must_end() -> None:
    grammar = Grammar('root ::= "a" "b"?')
    states = [follow(grammar, piece) for piece in (b"", b"a", b"ab")]
    assert [(s.may_end, s.must_end) for s in states if s] == [(False, False), (True, False), (True, True)]


AMBIGUOUS = {
    "all ways at once": "root ::= a0\n"
    + "".join(f'a{n} ::= a{n + 1} "x" | a{n + 1} "y"\n' for n in range(40))
    + 'a40 ::= "z"',
}
EXPLODING = {
    "words of two letters": 'root ::= "b" | "a" r r | "a" s r\nr ::= "a" r r | "a" s s | "c"\ns ::= "a" r s | "a" s r | "c"',
    "counted twice": 'root ::= "a"{0,60000} "a"{0,60000} "a"{0,60000} "a"{0,60000} "b"',
    "nested stars": 'root ::= ((("a"+)+)+)+ "b"',
    "blanks on blanks": 'root ::= ws ws ws ws ws ws ws ws "b"\nws ::= [a]*',
    "deep": 'root ::= "a" root "b" | "b"',
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_refuses_what_begins_in_too_many_ways(name: str) -> None:
    began = time.thread_time()
    with pytest.raises(WrongUse, match="too many ways"):
        Grammar(AMBIGUOUS[name])
    assert time.thread_time() - began < 5


@pytest.mark.parametrize("name", EXPLODING)
def test_follows_an_ambiguous_grammar_in_bounded_time_and_memory(name: str) -> None:
    """Whether all of it still fits is up to the limits; that it comes to an end is not."""
    grammar = Grammar(EXPLODING[name])
    began = time.thread_time()
    state = grammar.start
    for _ in range(300):
        after = grammar.after(state, b"a")
        if after is None:
            break
        state = after
        assert len(state.ways) <= 256
    before = grammar.steps
    grammar.after(grammar.start, b"a" * 1000)
    assert grammar.steps - before < 8192 + 32_000 + 4200
    assert time.thread_time() - began < 10


def test_two_ways_that_are_the_same_are_one() -> None:
    assert len(Grammar('root ::= a | a | (a)\na ::= "x"').start.ways) == 1


def test_a_text_does_not_end_inside_a_character() -> None:
    state = follow(Grammar('root ::= "é"*'), b"\xc3")
    assert state is not None
    assert not state.may_end
    assert not state.must_end


ONE_CLASS = "root ::= ({})+\nc ::= [{}]".format(
    "|".join(['c "a"'] * 250), "".join(chr(code) for code in range(0x10000, 0x10000 + 100_000, 2))
)


def test_many_ways_over_one_large_class_cost_as_little_as_one() -> None:
    grammar = Grammar(ONE_CLASS)
    assert len(grammar.start.ways) == 250
    began = time.thread_time()
    assert grammar.start.first_bytes() == {0xF0}
    assert time.thread_time() - began < 0.2


@pytest.mark.parametrize("piece", [b"a", "\U00010001".encode(), "\U00010001".encode()[:3], "\U00010000".encode()[:3]])
def test_what_does_not_fit_is_counted_by_the_ways_it_was_held_against(piece: bytes) -> None:
    grammar = Grammar(ONE_CLASS)
    before = grammar.steps
    grammar.after(grammar.start, piece)
    assert grammar.steps - before >= 250 // 8


REPEATING = {
    "the same option": 'root ::= {}\nb ::= {}\nx ::= "a"'.format("|".join(['b "x"'] * 900), "|".join("x" * 25_000)),
    "options never looked at": 'root ::= {} "b"\nb ::= {}|""\nx ::= "a"'.format("b " * 800, "|".join("x" * 25_000)),
}


@pytest.mark.parametrize("name", REPEATING)
def test_refuses_in_no_time_what_says_the_same_often(name: str) -> None:
    began = time.thread_time()
    with pytest.raises(WrongUse, match="too many ways"):
        Grammar(REPEATING[name])
    assert time.thread_time() - began < 2
