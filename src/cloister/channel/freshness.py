"""The date inside a sealed request. It only ever rejects: the host owns the enclave's clock, so it never vouches."""

from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime

from cloister.errors import ClockSkew, MalformedMessage

__all__ = ["DATE_TOLERANCE", "check_date", "http_date"]

DATE_TOLERANCE = 120.0
"""Seconds, before and after."""


def http_date(now: float) -> bytes:
    """`now` in Unix seconds as the value of a `date` header field (RFC 9110, section 5.6.7)."""
    return format_datetime(datetime.fromtimestamp(now, UTC), usegmt=True).encode()


def check_date(headers: Iterable[tuple[bytes, bytes]], now: float) -> None:
    """Refuses a request whose `date` is more than 120 s from `now`. One without a `date` passes.

    The gateway answers ClockSkew inside the channel, 400 with type `…http-problem-types#date` (RFC 9458, section
    6.5.2); the client then seals the request afresh, once. Replays are `KeyRing`'s business, not this function's.

    Raises: ClockSkew, MalformedMessage for a `date` that is none, or for two.
    """
    dates = [value for name, value in headers if name == b"date"]
    if len(dates) > 1:
        raise MalformedMessage("The request has more than one date.", step="date")
    if dates and abs(_parse(dates[0]) - now) > DATE_TOLERANCE:
        raise ClockSkew(
            "The request's date is too far from the enclave's clock.",
            hint="Set this machine's clock, or ask the operator about the enclave's.",
            step="date",
        )


def _parse(value: bytes) -> float:
    try:
        moment = parsedate_to_datetime(value.decode("ascii"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise MalformedMessage("The request's date is not a date.", step="date") from error
