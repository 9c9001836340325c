import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.enclave.llm.schema_check import random_text

from cloister.enclave.llm.grammar import Grammar
from cloister.enclave.llm.numbers import Bounds, decimals_between, integers_between


def takes(grammar: Grammar, text: str) -> bool:
    state = grammar.after(grammar.start, text.encode())
    return state is not None and state.may_end


@settings(deadline=None)
@given(st.integers(-1500, 1500), st.integers(0, 300), st.booleans(), st.booleans())
def test_exactly_the_integers_between_get_through(low: int, width: int, above: bool, below: bool) -> None:
    high = low + width
    options = integers_between(Bounds(low, high, above=above, below=below))
    wanted = set(range(low + above, high - below + 1))
    assert bool(options) == bool(wanted)
    if options:
        grammar = Grammar(f"root ::= {' | '.join(options)}")
        near = range(low - 12, high + 13)
        assert {number for number in near if takes(grammar, str(number))} == wanted


@settings(deadline=None)
@given(st.integers(-200, 200), st.integers(0, 40), st.booleans(), st.booleans(), st.integers(0, 9))
def test_decimals_stay_between(low: int, width: int, above: bool, below: bool, seed: int) -> None:
    options = decimals_between(Bounds(low / 4, (low + width) / 4, above=above, below=below))
    if options:
        number = float(random_text(Grammar(f"root ::= {' | '.join(options)}"), seed))
        assert low / 4 <= number <= (low + width) / 4
        assert not (above and number == low / 4)
        assert not (below and number == (low + width) / 4)


@pytest.mark.parametrize("text", ["5", "17", "99", "100", "123456789012345"])
def test_without_a_bound_numbers_may_grow(text: str) -> None:
    assert takes(Grammar(f"root ::= {' | '.join(integers_between(Bounds(low=5)))}"), text)
    assert takes(Grammar(f"root ::= {' | '.join(integers_between(Bounds(high=-5)))}"), f"-{text}")


def test_one_and_a_half_lies_between_one_and_two() -> None:
    grammar = Grammar(f"root ::= {' | '.join(decimals_between(Bounds(1, 2, above=True, below=True)))}")
    assert takes(grammar, "1.5")
    assert [text for text in ("1", "2", "1.0", "2.5", "0.5") if takes(grammar, text)] == []
