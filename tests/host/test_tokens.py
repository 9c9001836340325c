import hmac

import pytest

from cloister.errors import WrongUse
from cloister.host.tokens import make_token, name_of


def test_a_token_is_known_by_its_name_and_rests_as_a_digest() -> None:
    token, record = make_token("me", 5.0)
    other, another = make_token("you", 5.0)
    assert token != other
    assert token not in repr(record)
    assert name_of(token, [another, record]) == "me"
    assert record.created_at == 5.0


@pytest.mark.parametrize("change", ["", " ", "x", "\n", "\x00", "\udcff", "é"])
def test_what_is_not_the_token_is_nobodys(change: str) -> None:
    token, record = make_token("me", 5.0)
    for wrong in (change, token + change if change else token[:-1], record.sha256, token.upper()):
        assert name_of(wrong, [record]) is None
    assert name_of(token, []) is None


def test_every_record_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make_token(f"n{number}", 0.0) for number in range(5)]
    compared = []

    def counting(one: str, two: str) -> bool:
        compared.append(one)
        return hmac.compare_digest(one, two)

    monkeypatch.setattr("cloister.host.tokens.hmac", type("m", (), {"compare_digest": staticmethod(counting)}))
    assert name_of(made[0][0], [record for _, record in made]) == "n0"
    assert len(compared) == 5


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 65, "a\n", "ä"])
def test_a_name_is_a_plain_word(name: str) -> None:
    with pytest.raises(WrongUse):
        make_token(name, 0.0)
