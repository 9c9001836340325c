"""Sizes that tell less: requests and whole responses grow to powers of two, streamed events to multiples of 512."""

__all__ = ["EVENT_MULTIPLE", "MIN_PADDED", "event_padding", "padded_length"]

MIN_PADDED = 1024
EVENT_MULTIPLE = 512
"""A compact chat chunk is 255 to 258 bytes: multiples of 256 would tell some tokens from others."""
_SHORTEST_COMMENT = 3  # ":" and the two line ends that close an event block


def padded_length(length: int) -> int:
    """The smallest power of two that holds `length` bytes, 1 KiB at least."""
    return max(MIN_PADDED, 1 << (length - 1).bit_length()) if length > 0 else MIN_PADDED


def event_padding(length: int) -> bytes:
    """What follows `length` bytes of whole server-sent events, to bring them to a multiple of 512; b"" if they are one.

    A comment in a block of its own: event-stream readers drop it (WHATWG HTML, section 9.2.6), while clients that split
    on blank lines and look for `data:` in front would lose an event with a comment inside. The filler is no secret.
    """
    gap = -length % EVENT_MULTIPLE
    if gap == 0:
        return b""
    if gap < _SHORTEST_COMMENT:
        gap += EVENT_MULTIPLE
    return b":" + b" " * (gap - _SHORTEST_COMMENT) + b"\n\n"
