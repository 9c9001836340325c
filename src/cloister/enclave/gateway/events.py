"""Server-sent events, gathered whole and padded, so that the length of a token does not show on the wire."""

from cloister.channel.padding import event_padding

__all__ = ["EventBuffer"]

_LONGEST_EVENT = 1 << 18  # bytes; a longer one leaves in parts, unpadded, rather than being held for ever
_BOUNDARIES = (b"\n\n", b"\r\n\r\n", b"\r\r")


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
        return taken + event_padding(len(taken)) if self._pad and taken and cut == whole else taken

    def _boundary(self) -> int:
        return max(at + len(mark) if (at := self._bytes.rfind(mark)) >= 0 else 0 for mark in _BOUNDARIES)
