import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.enclave.llm.gbnf import MAX_GRAMMAR, read_grammar
from cloister.errors import WrongUse

HOSTILE = {
    "nothing": "",
    "no root": 'a ::= "a"',
    "no name": '::= "a"',
    "no body at all": "root",
    "no body": "root ::",
    "undefined": "root ::= other",
    "twice": 'root ::= "a"\nroot ::= "b"',
    "open string": 'root ::= "abc',
    "open class": "root ::= [abc",
    "open group": 'root ::= ("a"',
    "too much closed": 'root ::= "a")',
    "open count": 'root ::= "a"{3',
    "no count": 'root ::= "a"{}',
    "count backwards": 'root ::= "a"{3,2}',
    "huge count": 'root ::= "a"{1,99999999}',
    "endless digits": 'root ::= "a"{' + "9" * 10_000 + "}",
    "range backwards": "root ::= [z-a]",
    "empty class": "root ::= []",
    "unknown escape": r'root ::= "\q"',
    "half an escape": r'root ::= "\u12"',
    "too large a character": r'root ::= "\UFFFFFFFF"',
    "token": "root ::= <think>",
    "postfix on nothing": "root ::= *",
    "two postfixes": 'root ::= "a"**',
    "left recursion": 'root ::= root "a" | "a"',
    "hidden left recursion": 'root ::= a\na ::= "x"? b\nb ::= root "y" | "z"',
    "only itself": "root ::= root",
    "never ends": 'root ::= "a" root',
    "a rule that never ends": 'root ::= "b" | "c" a\na ::= "a" a',
    "repeats nothing": 'root ::= ("a"?)*',
    "repeats nothing often": "root ::= e{5}\ne ::= [ab]*",
    "deep groups": "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000,
    "many rules": "".join(f'r{n} ::= "a"\n' for n in range(5000)) + "root ::= r0",
    "too long": 'root ::= "' + "a" * MAX_GRAMMAR + '"',
    "lies in chains": "".join(f"r{n} ::= r{(n + 2000) % 4001}\n" for n in range(4000)) + 'r4000 ::= "a"\nroot ::= r0',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_soon_and_not_quoted(name: str) -> None:
    began = time.thread_time()
    with pytest.raises(WrongUse) as caught:
        read_grammar(HOSTILE[name])
    assert time.thread_time() - began < 5
    assert len(caught.value.message) < 100


@pytest.mark.parametrize(
    "text",
    [
        'root ::= "a"',
        "root ::= [a-z]+ # all of it\n",
        'root ::= a |\n  b\na ::= "x"\n\n\nb ::= ("y" |\n "z")\n',
        r'root ::= "\x41\u00e9\U0001F600\n\"\\" [^\]\-\\] .',
        'root ::= "a"{3} "b"{2,} "c"{0,4} "d"{0}',
        'root ::= ws "a" ws\r\nws ::= ([ \\t\\n] ws)?\r\n',
        'root   ::= object\nobject ::= "{" ( string ":" object ("," string ":" object)* )? "}"\nstring ::= "\\"" [^"]* "\\""',
    ],
)
def test_grammars_in_the_wild_are_read(text: str) -> None:
    assert read_grammar(text).name == "root"


def test_a_refusal_names_the_line() -> None:
    with pytest.raises(WrongUse, match="at line 3"):
        read_grammar('root ::= "a"\n\nb ::= %\n')


PIECES = [
    "root",
    "::=",
    "a",
    '"x"',
    '"',
    "[a-z]",
    "[^",
    "]",
    "(",
    ")",
    "|",
    "*",
    "+",
    "?",
    "{2,3}",
    "{",
    "\n",
    " ",
    "#",
    "\\",
    ".",
]


@given(st.lists(st.sampled_from(PIECES), max_size=30), st.booleans())
def test_any_text_is_read_or_refused(pieces: list[str], begun: bool) -> None:
    with contextlib.suppress(WrongUse):
        read_grammar(("root ::= " if begun else "") + " ".join(pieces))
