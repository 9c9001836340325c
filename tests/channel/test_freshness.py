import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.channel.freshness import check_date, http_date
from cloister.errors import ClockSkew, CloisterError, MalformedMessage, Replayed

NOW = 1_795_000_000.0


def test_writes_the_http_date() -> None:
    assert http_date(784111777) == b"Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.mark.parametrize("offset", [-120, 0, 120])
def test_accepts_dates_within_two_minutes(offset: int) -> None:
    check_date([(b"date", http_date(NOW + offset))], NOW)


@pytest.mark.parametrize("offset", [-86400, -121, 121, 86400])
def test_rejects_dates_too_far_off_distinguishably(offset: int) -> None:
    with pytest.raises(ClockSkew) as caught:
        check_date([(b"date", http_date(NOW + offset))], NOW)
    assert isinstance(caught.value, Replayed)


def test_a_request_without_a_date_passes() -> None:
    check_date([(b"accept", b"*/*")], NOW)


@pytest.mark.parametrize("value", [b"", b"yesterday", b"\xff", b"Sun, 99 Nov 1994 08:49:37 GMT", b"1795000000"])
def test_rejects_what_is_no_date(value: bytes) -> None:
    with pytest.raises(MalformedMessage):
        check_date([(b"date", value)], NOW)


def test_rejects_two_dates() -> None:
    with pytest.raises(MalformedMessage):
        check_date([(b"date", http_date(NOW))] * 2, NOW)


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_raises_nothing_foreign(value: bytes) -> None:
    with contextlib.suppress(CloisterError):
        check_date([(b"date", value)], NOW)
