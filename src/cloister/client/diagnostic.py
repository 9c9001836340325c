"""Text from the untrusted side, made fit to be shown: short, one line, nothing that moves a cursor or turns a line."""

import unicodedata

__all__ = ["printable"]

# Control, format (bidirectional overrides among them), surrogate, private, unassigned; line and paragraph separators.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(data: bytes | str, limit: int = 120) -> str:
    """At most `limit` characters of `data`, as one quoted line; what could paint a terminal becomes a space."""
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    clean = "".join(" " if unicodedata.category(c) in _UNPRINTABLE else c for c in text[: 4 * limit])
    line = " ".join(clean.split())
    return f'"{line[:limit]}…"' if len(line) > limit else f'"{line}"'
