"""The model's chat template and its control tokens, from what the upstream says or from the model's folder.

Messages are rendered in here, by the built-in engine's own `Preparer`, so that what a user writes becomes no control token
here either; only making tokens of text is the upstream's work.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from cloister.errors import WrongUse

__all__ = ["Tokenize", "UpstreamWords", "Vocabulary", "candidates", "from_folder", "from_properties"]

_MAX_FILE = 64 << 20
_MAX_TEMPLATE = 1 << 20
_MOST_CALLS = 1000
"""Of the upstream's tokenizer, for one prompt: one, and two more for every text of a control token in it."""
_MARKER = re.compile(r"<\|?[^<>\s'\"{}]{1,48}\|?>|\[/?[A-Z_]{2,24}\]")

Tokenize: TypeAlias = Callable[[str, bool, bool], list[int]]
"""A text's tokens; with those that begin a prompt; with its markers parsed."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`template` None: the model takes no conversations. `controls`: texts of control tokens, as far as they are known."""

    template: str | None = None
    bos: str = ""
    eos: str = ""
    controls: tuple[str, ...] = ()


def from_properties(properties: Mapping[str, Any]) -> Vocabulary:
    """What llama-server's `/props` tells. Its control tokens it does not: see `candidates`."""
    template = properties.get("chat_template")
    bos, eos = properties.get("bos_token"), properties.get("eos_token")
    return Vocabulary(
        template=template if isinstance(template, str) and 0 < len(template) <= _MAX_TEMPLATE else None,
        bos=bos if isinstance(bos, str) else "",
        eos=eos if isinstance(eos, str) else "",
    )


def candidates(vocabulary: Vocabulary) -> list[str]:
    """What looks like a control token in a template: those are what a message could forge a turn with."""
    found = _MARKER.findall(vocabulary.template or "")
    return list(dict.fromkeys(text for text in (vocabulary.bos, vocabulary.eos, *found) if text))


def from_folder(folder: Path) -> Vocabulary:
    """`tokenizer_config.json` and, where there is one, `chat_template.jinja`, as models are published.

    Raises: WrongUse.
    """
    try:
        config = json.loads(_read(folder / "tokenizer_config.json"))
        template = config.get("chat_template")
        if (separate := folder / "chat_template.jinja").is_file():
            template = _read(separate)
        added = [token for token in (config.get("added_tokens_decoder") or {}).values() if token.get("special")]
        bos, eos = _text(config.get("bos_token")), _text(config.get("eos_token"))
        controls = dict.fromkeys(text for text in (bos, eos, *(str(token["content"]) for token in added)) if text)
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise WrongUse(
            "The tokenizer's folder cannot be read.",
            hint="It is the model's own, with tokenizer_config.json in it.",
            got=type(error).__name__,
        ) from error
    return Vocabulary(_chosen(template), bos, eos, tuple(controls))


def _read(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise ValueError
    return data.decode()


def _text(value: Any) -> str:
    """A token is written as its text, or as an object that holds it."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""


def _chosen(template: Any) -> str | None:
    """Where there are several, the one for tools, which all know plain conversations too; else the default one."""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("tool_use") or named.get("default")
    return template if isinstance(template, str) and 0 < len(template) <= _MAX_TEMPLATE else None


class UpstreamWords:
    """What a `Preparer` needs of a model, over an upstream's tokenizer. One thread, and not the event loop's.

    `parses_only`: the tokenizer takes every marker in a text for its control token. A text that is to stay one is then cut
    inside each marker.
    """

    def __init__(self, vocabulary: Vocabulary, tokenize: Tokenize, *, context_length: int, parses_only: bool) -> None:
        self._tokenize = tokenize
        self._parses_only = parses_only
        self._markers = _longest_first(vocabulary.controls)
        self._calls = 0
        self.context_length = context_length
        self.chat_template = vocabulary.template
        self.control_texts = vocabulary.controls
        begun, bare = tokenize("a", True, True), tokenize("a", False, True)  # noqa: FBT003
        self.adds_bos = begun[1:] == bare
        self.bos = begun[0] if self.adds_bos else self._single(vocabulary.bos)
        self.eos = self._single(vocabulary.eos)
        self._pieces = {self.bos: vocabulary.bos, self.eos: vocabulary.eos}

    def begin(self) -> None:
        """Another prompt: it may take so many calls anew."""
        self._calls = 0

    def _single(self, text: str) -> int:
        found = self._tokenize(text, False, True) if text else []  # noqa: FBT003
        return found[0] if len(found) == 1 else -1

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Of the tokens that begin and end a text alone."""
        return self._pieces[token].encode() if special else b""

    def beginnings(self) -> None:
        """Nothing to make ready: the upstream follows grammars by itself."""

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Nothing: the upstream knows its vocabulary, and refuses what is not in it."""

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Raises: WrongUse when one prompt needs too many calls of the upstream's; EngineDied."""
        if add_special:
            return self._tokenize(text, add_special, parse_special)
        pieces = self.pieces(text, parse_special=parse_special)
        self._calls += len(pieces)
        if self._calls > _MOST_CALLS:
            raise WrongUse("The messages hold too many texts of control tokens.")
        return [token for piece in pieces for token in self._tokenize(piece, False, parse_special)]  # noqa: FBT003

    def pieces(self, text: str, *, parse_special: bool) -> list[str]:
        """The texts to make tokens of, one after the other."""
        if parse_special or not self._parses_only:
            return [text]
        pieces, start = [], 0
        for match in self._markers.finditer(text) if self._markers is not None else ():
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        found = [piece for piece in (*pieces, text[start:]) if piece]
        if len(found) > _MOST_CALLS:
            raise WrongUse("The text holds too many texts of control tokens.")
        return found


def _longest_first(texts: Sequence[str]) -> "re.Pattern[str] | None":
    ordered = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None
