"""Sizes and times as people write them."""

import re
import time
from datetime import UTC, datetime

from cloister.errors import WrongUse

__all__ = ["parse_moment", "parse_size", "show_moment", "show_size"]

_SIZE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,3})?) ?(B|[KMGT]i?B?)?")
_POWERS = {"B": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SPAN = re.compile(r"([0-9]{1,5})(m|h|d|w)")
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_size(text: str) -> int:
    """Bytes of "2GiB", "500M", "1024"; every unit is a power of 1024. Raises: WrongUse."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise WrongUse("That is no size.", hint="Such as 512MiB or 20GiB.", got=text[:40])
    return int(float(match[1]) * 1024 ** _POWERS[(match[2] or "B")[0]])


def show_size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def parse_moment(text: str, now: float | None = None) -> float | None:
    """Unix seconds of "7d" (from now: m, h, d, w), "2027-01-31" or "2027-01-31T12:00Z" (UTC); None of "never".

    Raises: WrongUse.
    """
    if text == "never":
        return None
    if match := _SPAN.fullmatch(text):
        return (time.time() if now is None else now) + int(match[1]) * _SECONDS[match[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise WrongUse("That is no time.", hint="Such as 12h, 7d, 2027-01-31 or never.", got=text[:40]) from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def show_moment(seconds: float | None) -> str:
    return "never" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
