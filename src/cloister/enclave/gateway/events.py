"""Server-sent events, gathered whole and padded, so that the length of a token does not show on the wire."""

__all__ = ["BLOCK", "EventBuffer", "padding"]

BLOCK = 512  # a compact chat chunk is 255 to 258 bytes: blocks of 256 would tell some tokens from others
_LONGEST_EVENT = 1 << 18  # bytes; a longer one leaves in parts, unpadded, rather than being held for ever
_BOUNDARIES = (b"\n\n", b"\r\n\r\n", b"\r\r")
_SHORTEST_COMMENT = 3  # ":" and the two line ends that close an event block


def padding(length: int) -> bytes:
    """A comment block (WHATWG HTML, 9.2.6: ignored by readers) that fills `length` bytes up to a multiple of 512."""
    gap = -length % BLOCK
    if gap == 0:
        return b""
    if gap < _SHORTEST_COMMENT:
        gap += BLOCK
    return b":" + b" " * (gap - _SHORTEST_COMMENT) + b"\n\n"


class EventBuffer:
    """Collects the bytes of an event stream and gives them out at event boundaries only."""

    def __init__(self, *, pad: bool) -> None:
        self._pad = pad
        self._bytes = bytearray()

    def __len__(self) -> int:
        return len(self._bytes)

    def add(self, data: bytes) -> None:
        self._bytes += data

    def take(self, *, everything: bool = False) -> bytes:
        """All whole events so far, padded together; with `everything`, also a last one that was left open (unpadded:
        a comment there would change what a reader makes of it)."""
        whole = self._boundary()
        cut = len(self._bytes) if everything or (whole == 0 and len(self._bytes) > _LONGEST_EVENT) else whole
        taken = bytes(self._bytes[:cut])
        del self._bytes[:cut]
        return taken + padding(len(taken)) if self._pad and taken and cut == whole else taken

    def _boundary(self) -> int:
        return max(at + len(mark) if (at := self._bytes.rfind(mark)) >= 0 else 0 for mark in _BOUNDARIES)
