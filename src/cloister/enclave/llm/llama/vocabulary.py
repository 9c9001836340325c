"""How much of a text one token can stand for: what is longer than that, times the context, need not be tokenized."""

import ctypes
from typing import Any, Protocol

__all__ = ["longest_text"]

_STRIPS = 1 << 7 | 1 << 8  # LLAMA_TOKEN_ATTR_LSTRIP, _RSTRIP: such a token swallows the blanks beside it
_RAW = 1 << 0 | 1 << 3 | 1 << 4  # LLAMA_TOKEN_ATTR_UNKNOWN, _CONTROL, _USER_DEFINED: found in a text as it stands
_KINDS = ("llama", "gpt2", "gemma4")
"""Tokenizers that leave nothing out and change nothing; others drop blanks and accents, or have one token for any word."""
_BYTES = (*range(0xC0), *range(0xC2, 0xF5))
"""All that UTF-8 is made of: where one of them is no token, a text with it may be shortened."""


class Tokenizer(Protocol):
    """What is needed of a model: `llama.model.Model` has it all."""

    @property
    def context(self) -> Any: ...

    @property
    def vocabulary(self) -> int: ...

    def tokenize(self, text: str) -> list[int]: ...


def longest_text(library: Any, model: Tokenizer) -> int | None:
    """Bytes of a text that one token stands for at most; None where a token may stand for any number of them.

    Takes a moment: it looks at every token. Does not see merges that lead to what is no token; no tokenizer that models are
    made with makes such.
    """
    handle = library.llama_get_model(model.context)
    vocab = library.llama_model_get_vocab(handle)
    kind = ctypes.create_string_buffer(16)
    library.llama_model_meta_val_str(handle, b"tokenizer.ggml.model", kind, len(kind))
    if kind.value.decode(errors="replace") not in _KINDS:
        return None
    texts = [library.llama_vocab_get_text(vocab, token) or b"" for token in range(model.vocabulary)]
    attributes = [library.llama_vocab_get_attr(vocab, token) for token in range(model.vocabulary)]
    blank = [texts[token] for token in model.tokenize(" ")]
    encoded = kind.value == b"gpt2" and blank == [_ALPHABET[ord(" ")].encode()]
    single = {_ALPHABET[byte].encode() if encoded else b"<0x%02X>" % byte for byte in _BYTES}
    if not single <= {*texts} or any(attribute & _STRIPS for attribute in attributes):
        return None
    return max(
        len(text.decode(errors="replace")) if encoded and not attribute & _RAW else len(text)
        for text, attribute in zip(texts, attributes, strict=True)
    )


def _byte_alphabet() -> tuple[str, ...]:
    """GPT-2's printable letter for each byte: its tokens are written in them."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in plain else next(others)) for byte in range(256))


_ALPHABET = _byte_alphabet()
