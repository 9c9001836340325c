import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.enclave.llm.blocks import Block, Blocks, Closed, Opened, Piece, StopScanner
from cloister.enclave.llm.toolcalls import PLAIN, Reading

TOOLS = Reading("hermes", frozenset({"f"}), "tagged")
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


def cut(reading: Reading, *texts: str, whole: bool = True, thoughts: bool = True) -> tuple[list[Block], list[str]]:
    """The blocks, and the changes in short."""
    blocks = Blocks(reading, thoughts=thoughts)
    changes = [change for text in texts for change in blocks.feed(text)] + blocks.finish(whole=whole)
    return blocks.all, [f"{type(change).__name__} {change.block.index}" for change in changes]


def test_text_is_one_block() -> None:
    blocks, changes = cut(PLAIN, "Hel", "lo")
    assert [(block.kind, block.text, block.whole) for block in blocks] == [("text", "Hello", True)]
    assert changes == ["Opened 0", "Piece 0", "Piece 0", "Closed 0"]


def test_no_text_is_no_block() -> None:
    assert cut(PLAIN) == ([], [])


def test_each_block_is_closed_before_the_next_is_opened() -> None:
    blocks, changes = cut(TOOLS, "<think>Hm</think>", "Yes. ", CALL, CALL)
    assert [block.kind for block in blocks] == ["thinking", "text", "call", "call"]
    assert [block.arguments() for block in blocks[2:]] == [{"a": 1}, {"a": 1}]
    order = [change.partition(" ") for change in changes if not change.startswith("Piece")]
    assert [(kind, int(index)) for kind, _, index in order] == [
        (kind, index) for index in range(4) for kind in (Opened.__name__, Closed.__name__)
    ]
    assert {Piece.__name__ in change for change in changes} == {True, False}


def test_thoughts_may_be_left_out() -> None:
    blocks, _ = cut(TOOLS, "<think>Hm</think>Yes.", thoughts=False)
    assert [(block.kind, block.text, block.index) for block in blocks] == [("text", "Yes.", 0)]


def test_what_broke_off_is_not_whole() -> None:
    blocks, changes = cut(TOOLS, CALL[: CALL.index("1}}")], whole=False)
    assert [(block.kind, block.whole, block.arguments()) for block in blocks] == [("call", False, None)]
    assert changes[-1] == "Closed 0"


@pytest.mark.parametrize("text", ["", "[]", "1", '{"a":', "nul"])
def test_arguments_are_an_object_or_none(text: str) -> None:
    assert Block("call", 0, pieces=[text]).arguments() is None


STOPS = st.lists(st.text("ab", min_size=1, max_size=3), max_size=3)


@given(texts=st.lists(st.text("abc", max_size=4), max_size=8), stops=STOPS)
def test_a_text_ends_at_its_first_stop_however_it_was_cut(texts: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for text in texts:
        shown += scanner.feed(text)
        if scanner.found is not None:
            break
    shown += scanner.finish()
    whole = "".join(texts)
    hits = [whole.find(stop) for stop in stops if stop in whole]
    if scanner.found is None:
        assert (shown, hits) == (whole, [])
    else:
        assert whole.startswith(shown + scanner.found)
        assert not any(stop in shown for stop in stops)


def test_nothing_is_held_back_without_need() -> None:
    scanner = StopScanner(["END"])
    assert [scanner.feed(text) for text in ("ab", "cE", "N", "x")] == ["ab", "c", "", "ENx"]
