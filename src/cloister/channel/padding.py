"""Sizes that tell less: requests and whole responses grow to powers of two, streamed events to multiples of 512."""

from cloister.errors import WrongUse

__all__ = ["EVENT_MULTIPLE", "MIN_PADDED", "pad_event", "padded_event_length", "padded_length"]

MIN_PADDED = 1024
EVENT_MULTIPLE = 512


def padded_length(length: int) -> int:
    """The smallest power of two that holds `length` bytes, 1 KiB at least."""
    return max(MIN_PADDED, 1 << (length - 1).bit_length()) if length > 0 else MIN_PADDED


def padded_event_length(length: int) -> int:
    """The smallest multiple of 512 that `length` bytes reach with a comment line, or without any."""
    # One byte cannot be a comment line (":" and its line end are two), so that gap takes 512 more.
    gap = -length % EVENT_MULTIPLE
    return length + (gap + EVENT_MULTIPLE if gap == 1 else gap)


def pad_event(events: bytes) -> bytes:
    """Whole server-sent events, with a comment line in front that brings them to a multiple of 512 bytes.

    A comment line is dropped by every event-stream reader (WHATWG HTML, section 9.2.6). The filler is no secret.

    Raises: WrongUse unless `events` ends in a blank line: a comment inside a line would change it.
    """
    if not events.endswith((b"\n\n", b"\r\r", b"\r\n\r\n")):
        raise WrongUse("Only whole server-sent events can be padded.", step="padding")
    gap = padded_event_length(len(events)) - len(events)
    return b":" + b"." * (gap - 2) + b"\n" + events if gap else events
