from cloister.verify.factors import Factor, compare, failed, not_checked, passed


def test_compares_with_one_or_any_of_several() -> None:
    assert compare("s", expected="a", got="a", hint="h") == passed("s", "a")
    assert compare("s", expected=["b", "a"], got="a", hint="h") == passed("s", "a")
    assert compare("s", expected=["b", "a"], got="c", hint="h") == failed("s", expected="a or b", got="c", hint="h")


def test_nothing_is_never_a_match_for_nothing() -> None:
    assert compare("s", expected=[], got="", hint="h") == failed("s", expected="nothing", got="nothing", hint="h")


def test_a_string_is_one_value_not_its_characters() -> None:
    assert compare("s", expected="abc", got="a", hint="").verdict == "fail"


def test_plain_data() -> None:
    assert not_checked("s", "why", "x").to_json() == {
        "step": "s",
        "verdict": "not-checked",
        "expected": "",
        "got": "x",
        "hint": "why",
    }
    assert Factor("s", "pass") == passed("s")
