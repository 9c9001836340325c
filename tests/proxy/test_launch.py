from cloister.proxy.launch import Launch


def test_a_token_begins_one_session_and_then_none() -> None:
    launch = Launch()
    token = launch.token()
    begun = launch.begin(token)
    assert begun is not None
    assert launch.knows(begun.cookie, begun.binding)
    assert launch.begin(token) is None


def test_nothing_else_begins_one() -> None:
    launch = Launch()
    token = launch.token()
    for guess in ("", token[:-1], token.swapcase(), Launch().token()):
        assert launch.begin(guess) is None
    assert launch.begin(token) is not None


def test_either_half_alone_opens_nothing() -> None:
    launch = Launch()
    one, other = launch.begin(launch.token()), launch.begin(launch.token())
    assert one is not None
    assert other is not None
    assert not launch.knows(one.cookie, "")
    assert not launch.knows("", one.binding)
    assert not launch.knows(one.cookie, other.binding)
    assert not launch.knows("", "")


def test_tokens_and_halves_are_256_random_bits() -> None:
    launch = Launch()
    made = [launch.token() for _ in range(20)]
    begun = [launch.begin(token) for token in made]
    made += [half for one in begun if one for half in (one.cookie, one.binding)]
    assert len(set(made)) == 60
    assert {len(one) for one in made} == {43}  # of 32 bytes


def test_what_it_keeps_opens_nothing() -> None:
    launch = Launch()
    waiting, used = launch.token(), launch.token()
    begun = launch.begin(used)
    assert begun is not None
    kept = repr(vars(launch))
    assert not [secret for secret in (waiting, used, begun.cookie, begun.binding) if secret in kept]


def test_the_oldest_of_many_sessions_ends() -> None:
    launch = Launch()
    sessions = [launch.begin(launch.token()) for _ in range(65)]
    known = [launch.knows(one.cookie, one.binding) for one in sessions if one]
    assert known == [False, *[True] * 64]
