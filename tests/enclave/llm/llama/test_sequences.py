import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.enclave.llm.llama.sequences import Sequences, common_prefix, divide

ALICE, BOB = b"a" * 32, b"b" * 32


def make(cells: int = 1000, count: int = 8, slots: int = 4) -> Sequences:
    return Sequences(cells=cells, count=count, slots=slots)


def keep(sequences: Sequences, scope: bytes | None, tokens: list[int]) -> int:
    place = sequences.place(scope, tokens, len(tokens), {})
    sequences.release(place.sequence, tokens, keep=True)
    return place.sequence


def test_takes_over_a_finished_sequence_of_the_same_scope() -> None:
    sequences = make()
    kept = keep(sequences, ALICE, [1, 2, 3, 4])
    place = sequences.place(ALICE, [1, 2, 3, 4, 5], 10, {})
    assert (place.sequence, place.source, place.reused) == (kept, kept, 4)


def test_never_reuses_across_scopes_or_without_one() -> None:
    sequences = make()
    keep(sequences, ALICE, [1, 2, 3, 4])
    assert keep(sequences, None, [1, 2, 3, 4]) >= 0
    assert sequences.kept == 1
    for scope in (BOB, None):
        place = sequences.place(scope, [1, 2, 3, 4, 5], 10, {})
        assert place.reused == 0


def test_never_reuses_a_running_stream_of_another_scope() -> None:
    sequences = make()
    running = sequences.place(ALICE, [1, 2, 3], 10, {})
    other = sequences.place(BOB, [1, 2, 3], 10, {running.sequence: [1, 2, 3]})
    assert other.reused == 0


def test_shares_with_a_running_stream_and_evaluates_one_token_at_least() -> None:
    sequences = make()
    running = sequences.place(ALICE, [1, 2, 3], 10, {})
    place = sequences.place(ALICE, [1, 2, 3], 10, {running.sequence: [1, 2, 3]})
    assert (place.source, place.reused) == (running.sequence, 2)
    assert place.sequence != running.sequence


def test_keeps_a_long_conversation_that_shares_only_its_beginning() -> None:
    sequences = make()
    kept = keep(sequences, ALICE, list(range(100)))
    place = sequences.place(ALICE, [0, 1, 2, 777], 10, {})
    assert (place.source, place.reused) == (kept, 3)
    assert place.sequence != kept
    assert sequences.kept == 1


def test_makes_a_stream_wait_for_cells_rather_than_promise_too_many() -> None:
    sequences = make(cells=100)
    first = sequences.place(None, [1], 60, {})
    assert not sequences.fits(41)
    assert sequences.fits(40)
    sequences.place(None, [1], 40, {})
    assert not sequences.fits(1)
    sequences.release(first.sequence, [1], keep=False)
    assert sequences.fits(60)


def test_grows_as_far_as_the_others_leave_room_and_gives_up_what_it_kept() -> None:
    sequences = make(cells=100)
    kept = keep(sequences, ALICE, [1] * 40)
    first, second = (sequences.place(BOB, [2], 20, {}) for _ in range(2))
    assert sequences.grow(first.sequence, 40) == ()
    assert sequences.grow(first.sequence, 41) == (kept,)
    assert sequences.grow(first.sequence, 81) is None
    assert sequences.grow(first.sequence, 80) == ()
    assert not sequences.fits(1)
    sequences.release(second.sequence, (), keep=False)
    assert sequences.grow(first.sequence, 100) == ()


def test_gives_up_all_that_it_kept() -> None:
    sequences = make(count=3, slots=3)
    kept = [keep(sequences, ALICE, [number]) for number in range(3)]
    sequences.drop_kept()
    assert sequences.kept == 0
    assert {sequences.place(None, [1], 1, {}).sequence for _ in range(3)} == set(kept)


def test_gives_up_what_it_kept_for_those_who_run_oldest_first() -> None:
    sequences = make(cells=100)
    oldest, newer = keep(sequences, ALICE, [1] * 40), keep(sequences, ALICE, [2] * 40)
    place = sequences.place(BOB, [3], 30, {})
    assert place.evict == (oldest,)
    again = sequences.place(ALICE, [2] * 41, 41, {})
    assert (again.sequence, again.reused) == (newer, 40)


def test_does_not_share_from_what_it_just_gave_up() -> None:
    sequences = make(cells=100)
    keep(sequences, ALICE, [1] * 90)
    place = sequences.place(ALICE, [1] * 20 + [2], 60, {})
    assert (place.reused, len(place.evict)) == (0, 1)


def test_finds_a_sequence_when_all_are_kept() -> None:
    sequences = make(count=2, slots=1)
    keep(sequences, ALICE, [1, 1])
    keep(sequences, ALICE, [2, 2])
    place = sequences.place(BOB, [3], 5, {})
    assert place.evict == (place.sequence,)
    assert not sequences.fits(5)


def test_common_prefix_respects_its_limit() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 3], 2) == 2
    assert common_prefix([1, 2], [1, 9], 5) == 1
    assert common_prefix([], [1], 0) == 0


def test_the_last_sequence_left_is_taken_over_for_what_it_shares() -> None:
    """Less than half of it is of use, and there is no other that could be dropped."""
    sequences = make(count=2, slots=2)
    sequences.place(BOB, [9], 10, {})
    kept = keep(sequences, ALICE, [1, 2, 3, 4, 5, 6])
    place = sequences.place(ALICE, [1, 2, 7], 10, {})
    assert (place.sequence, place.evict, place.source, place.reused) == (kept, (), kept, 2)


def cost(group: range, held: dict[int, int], cell: float) -> float:
    return 1 + len(group) * (0.1 + (max(held[at] for at in group) // 64 + 1) * 64 * cell)


def divisions(running: list[int]) -> list[list[range]]:
    if not running:
        return [[]]
    return [
        [range(running[0], running[end - 1] + 1), *rest]
        for end in range(1, len(running) + 1)
        for rest in divisions(running[end:])
    ]


@given(
    st.lists(st.integers(0, 11), min_size=1, max_size=7, unique=True).map(sorted),
    st.lists(st.sampled_from([0, 3, 63, 64, 500, 4000]), min_size=12, max_size=12),
    st.sampled_from([1e-6, 1e-4, 1e-3, 1e-2]),
)
def test_of_all_divisions_the_cheapest_is_taken(running: list[int], cells: list[int], cell: float) -> None:
    held = dict(enumerate(cells))
    found = divide(running, held, cell=cell, most=8192)
    assert [at for group in found for at in running if at in group] == running
    cheapest = min(sum(cost(group, held, cell) for group in groups) for groups in divisions(running))
    assert sum(cost(group, held, cell) for group in found) == pytest.approx(cheapest)


def test_what_has_no_room_for_a_row_is_never_between_two() -> None:
    assert divide([0, 2], {0: 1, 1: 9, 2: 1}, cell=0.0, most=10) == [range(3)]
    assert divide([0, 2], {0: 1, 1: 10, 2: 1}, cell=0.0, most=10) == [range(1), range(2, 3)]
