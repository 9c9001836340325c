"""From token bytes to the text that may be shown: whole characters only, and never any of a stop string."""

import codecs
from dataclasses import dataclass, field

from cloister.enclave.llm.engine import Delta, TokenLogprob

__all__ = ["TextStream"]

_MOST_TOKENS = 1024
"""Tokens that may be held back; their log-probabilities can take thousands of bytes each."""


@dataclass(slots=True)
class _Held:
    """One token that is not shown yet: where its text begins among what is held back."""

    start: int
    logprob: TokenLogprob | None


@dataclass(slots=True)
class TextStream:
    """Feed it one token's bytes at a time; `stopped` turns true when a stop string is complete.

    Bytes that are no UTF-8 become U+FFFD. Text is held back while it may still be the beginning of a stop string, or of
    a character, and its tokens with it; where these become many (control tokens have no text), they go before it.
    """

    stop: tuple[str, ...] = ()
    stopped: bool = False
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )
    _text: str = ""
    _tokens: list[_Held] = field(default_factory=list)

    def feed(self, piece: bytes, logprob: TokenLogprob | None = None) -> Delta | None:
        """What may be shown now, if anything."""
        self._tokens.append(_Held(len(self._text), logprob))
        self._text += self._decoder.decode(piece)
        inside = bool(self._decoder.getstate()[0])  # a character
        found = min((at for at in (self._text.find(s) for s in self.stop) if at >= 0), default=-1)
        if found >= 0:
            self.stopped = True
            return self._release(found, whole=False, last=True)
        keep = max((_overlap(self._text, s) for s in self.stop), default=0)
        whole = not (keep or inside) or len(self._tokens) > _MOST_TOKENS
        return self._release(len(self._text) - keep, whole=whole)

    def finish(self) -> Delta | None:
        """The rest, when generation ends for another reason than a stop string."""
        if self.stopped:
            return None
        self._text += self._decoder.decode(b"", final=True)
        return self._release(len(self._text), whole=True)

    def _release(self, end: int, *, whole: bool, last: bool = False) -> Delta | None:
        """Show the text before `end`, with the tokens that began before it; with `whole`, every token."""
        shown = [t for t in self._tokens if whole or t.start < end]
        self._tokens = [] if last else self._tokens[len(shown) :]
        text, self._text = self._text[:end], self._text[end:]
        for token in self._tokens:
            token.start -= end
        if not shown and not text:
            return None
        logprobs = tuple(t.logprob for t in shown if t.logprob is not None)
        return Delta(text, len(shown), logprobs)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
