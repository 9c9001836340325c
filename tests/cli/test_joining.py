"""A replica that asks to be let into its key group: when it gives up."""

import pytest

from cloister.cli.local import Joining
from cloister.errors import NotTrusted


def refuse(joining: Joining, times: int) -> None:
    for _ in range(times):
        joining._refuse(NotTrusted("No.", step="nonce"))


def test_who_never_served_gives_up_after_a_few_refusals_and_says_why() -> None:
    given_up: list[bool] = []
    joining = Joining("http://joiner", "http://member", lambda: given_up.append(True))
    refuse(joining, 2)
    assert not given_up
    refuse(joining, 1)
    assert given_up == [True]
    assert joining.refusal is not None
    assert "No." in str(joining.refusal)


def test_who_serves_goes_on_with_keys_of_its_own() -> None:
    joining = Joining("http://joiner", "http://member", lambda: pytest.fail("it was ended"))
    refuse(joining, 2)
    joining.serves()
    refuse(joining, 50)
    assert joining.refusal is None
