from cloister.enclave.llm.llama.sequences import Sequences, common_prefix

ALICE, BOB = b"a" * 32, b"b" * 32


def make(cells: int = 1000, count: int = 8, slots: int = 4) -> Sequences:
    return Sequences(cells=cells, count=count, slots=slots)


def keep(sequences: Sequences, scope: bytes | None, tokens: list[int]) -> int:
    place = sequences.place(scope, tokens, len(tokens), {})
    assert place is not None
    sequences.release(place.sequence, tokens, keep=True)
    return place.sequence


def test_takes_over_a_finished_sequence_of_the_same_scope() -> None:
    sequences = make()
    kept = keep(sequences, ALICE, [1, 2, 3, 4])
    place = sequences.place(ALICE, [1, 2, 3, 4, 5], 10, {})
    assert place is not None
    assert (place.sequence, place.source, place.reused) == (kept, kept, 4)


def test_never_reuses_across_scopes_or_without_one() -> None:
    sequences = make()
    keep(sequences, ALICE, [1, 2, 3, 4])
    assert keep(sequences, None, [1, 2, 3, 4]) >= 0
    assert sequences.kept == 1
    for scope in (BOB, None):
        place = sequences.place(scope, [1, 2, 3, 4, 5], 10, {})
        assert place is not None
        assert place.reused == 0


def test_never_reuses_a_running_stream_of_another_scope() -> None:
    sequences = make()
    running = sequences.place(ALICE, [1, 2, 3], 10, {})
    assert running is not None
    other = sequences.place(BOB, [1, 2, 3], 10, {running.sequence: [1, 2, 3]})
    assert other is not None
    assert other.reused == 0


def test_shares_with_a_running_stream_and_evaluates_one_token_at_least() -> None:
    sequences = make()
    running = sequences.place(ALICE, [1, 2, 3], 10, {})
    assert running is not None
    place = sequences.place(ALICE, [1, 2, 3], 10, {running.sequence: [1, 2, 3]})
    assert place is not None
    assert (place.source, place.reused) == (running.sequence, 2)
    assert place.sequence != running.sequence


def test_keeps_a_long_conversation_that_shares_only_its_beginning() -> None:
    sequences = make()
    kept = keep(sequences, ALICE, list(range(100)))
    place = sequences.place(ALICE, [0, 1, 2, 777], 10, {})
    assert place is not None
    assert (place.source, place.reused) == (kept, 3)
    assert place.sequence != kept
    assert sequences.kept == 1


def test_makes_a_stream_wait_for_cells_rather_than_promise_too_many() -> None:
    sequences = make(cells=100)
    first = sequences.place(None, [1], 60, {})
    assert first is not None
    assert sequences.place(None, [1], 41, {}) is None
    assert sequences.place(None, [1], 40, {}) is not None
    sequences.release(first.sequence, [1], keep=False)
    assert sequences.place(None, [1], 60, {}) is not None


def test_gives_up_what_it_kept_for_those_who_run_oldest_first() -> None:
    sequences = make(cells=100)
    oldest, newer = keep(sequences, ALICE, [1] * 40), keep(sequences, ALICE, [2] * 40)
    place = sequences.place(BOB, [3], 30, {})
    assert place is not None
    assert place.evict == (oldest,)
    again = sequences.place(ALICE, [2] * 41, 41, {})
    assert again is not None
    assert (again.sequence, again.reused) == (newer, 40)


def test_does_not_share_from_what_it_just_gave_up() -> None:
    sequences = make(cells=100)
    keep(sequences, ALICE, [1] * 90)
    place = sequences.place(ALICE, [1] * 20 + [2], 60, {})
    assert place is not None
    assert (place.reused, len(place.evict)) == (0, 1)


def test_finds_a_sequence_when_all_are_kept() -> None:
    sequences = make(count=2, slots=1)
    keep(sequences, ALICE, [1, 1])
    keep(sequences, ALICE, [2, 2])
    place = sequences.place(BOB, [3], 5, {})
    assert place is not None
    assert place.evict == (place.sequence,)
    assert sequences.place(BOB, [3], 5, {}) is None


def test_common_prefix_respects_its_limit() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 3], 2) == 2
    assert common_prefix([1, 2], [1, 9], 5) == 1
    assert common_prefix([], [1], 0) == 0


def test_the_last_sequence_left_is_not_dropped_and_shared_from_at_once() -> None:
    """The only one free to be dropped is the very one whose beginning would be shared."""
    sequences = make(count=2, slots=2)
    assert sequences.place(BOB, [9], 10, {}) is not None
    kept = keep(sequences, ALICE, [1, 2, 3, 4, 5, 6])
    place = sequences.place(ALICE, [1, 2, 7], 10, {})
    assert place is not None
    assert (place.sequence, place.evict, place.source, place.reused) == (kept, (kept,), -1, 0)
