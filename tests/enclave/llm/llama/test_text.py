import pytest

from cloister.enclave.llm.engine import TokenLogprob
from cloister.enclave.llm.llama.text import TextStream


def run(stream: TextStream, pieces: list[bytes]) -> list[str]:
    shown = []
    for piece in pieces:
        delta = stream.feed(piece)
        shown.append(delta.text if delta else "")
        if stream.stopped:
            break
    rest = stream.finish()
    return [*shown, rest.text if rest else ""]


def test_holds_back_a_character_split_over_tokens() -> None:
    euro = "€".encode()
    assert run(TextStream(), [b"a" + euro[:1], euro[1:2], euro[2:] + b"b"]) == ["a", "", "€b", ""]


def test_shows_a_replacement_for_bytes_that_never_become_a_character() -> None:
    assert "".join(run(TextStream(), [b"\xe2\x82", b"x", b"\xf0\x9f"])) == "�x�"


def test_never_shows_any_of_a_stop_string() -> None:
    stream = TextStream(stop=("STOP",))
    assert run(stream, [b"a S", b"T", b"OP", b"never"]) == ["a ", "", "", ""]
    assert stream.stopped


def test_shows_what_only_looked_like_a_stop_string() -> None:
    assert run(TextStream(stop=("STOP",)), [b"a S", b"T", b"ART"]) == ["a ", "", "START", ""]


def test_shows_the_held_back_beginning_when_the_answer_ends_there() -> None:
    assert run(TextStream(stop=("STOP",)), [b"x ST"]) == ["x ", "ST"]


def test_stops_at_the_earliest_of_several_stop_strings() -> None:
    stream = TextStream(stop=("dd", "bc"))
    assert run(stream, [b"abcdd"]) == ["a", ""]


def test_finds_a_stop_string_split_inside_a_character() -> None:
    euro = "€".encode()
    stream = TextStream(stop=("€",))
    assert run(stream, [b"a" + euro[:2], euro[2:]]) == ["a", "", ""]
    assert stream.stopped


@pytest.mark.parametrize("stop", [(), ("zz",), ("b", "é!")])
def test_counts_every_shown_token_once_with_its_logprob(stop: tuple[str, ...]) -> None:
    stream = TextStream(stop=stop)
    shown = []
    pieces = [b"", b"a", b"\xc3", b"\xa9", b"c"]
    for number, piece in enumerate(pieces):
        delta = stream.feed(piece, TokenLogprob(number, piece, 0.0))
        shown += [delta] if delta else []
    rest = stream.finish()
    shown += [rest] if rest else []
    assert "".join(d.text for d in shown) == "aéc"
    assert sum(d.tokens for d in shown) == 5
    assert [entry.token for d in shown for entry in d.logprobs] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("stop", [(), ("x",)])
def test_a_token_without_text_is_not_held_back(stop: tuple[str, ...]) -> None:
    entry = TokenLogprob(7, b"", 0.0)
    delta = TextStream(stop=stop).feed(b"", entry)
    assert delta is not None
    assert (delta.text, delta.tokens, delta.logprobs) == ("", 1, (entry,))


@pytest.mark.parametrize(("stop", "begun"), [((), b"\xe2"), (("STOP",), b"ST"), (("STOP",), b"\xe2")])
def test_tokens_without_text_behind_held_text_do_not_pile_up(stop: tuple[str, ...], begun: bytes) -> None:
    stream = TextStream(stop=stop)
    pieces = [begun, *[b""] * 3000]
    shown = [stream.feed(piece, TokenLogprob(number, piece, 0.0)) for number, piece in enumerate(pieces)]
    deltas = [*filter(None, shown), *filter(None, [stream.finish()])]
    assert max(delta.tokens for delta in deltas) <= 1025
    assert "".join(delta.text for delta in deltas) == begun.decode(errors="replace")
    assert [entry.token for delta in deltas for entry in delta.logprobs] == list(range(3001))
