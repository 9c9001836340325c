"""The small language in which the corpus is written, and the ways people mistype.

``expand("{hi|hello} {there|}")`` picks one alternative per brace, innermost first. ``rough`` makes a question look typed
by a person: lower case, lost punctuation, a slip of the fingers. Both draw from one ``random.Random``, so a seed fixes
every byte of the corpus.
"""

from __future__ import annotations

import random
import re

INNERMOST = re.compile(r"\{([^{}]*)\}")
SYLLABLES = [
    "ba",
    "be",
    "bo",
    "da",
    "de",
    "do",
    "fa",
    "fi",
    "ga",
    "go",
    "ha",
    "ho",
    "ja",
    "jo",
    "ka",
    "ke",
    "ko",
    "la",
    "le",
    "li",
    "lo",
    "lu",
    "ma",
    "me",
    "mi",
    "mo",
    "na",
    "ne",
    "ni",
    "no",
    "pa",
    "pe",
    "po",
    "ra",
    "re",
    "ri",
    "ro",
    "sa",
    "se",
    "si",
    "so",
    "ta",
    "te",
    "ti",
    "to",
    "tu",
    "va",
    "ve",
    "vi",
    "vo",
    "wa",
    "wi",
    "ya",
    "yo",
    "za",
    "ze",
    "zo",
    "bra",
    "cla",
    "dri",
    "fle",
    "gri",
    "kle",
    "pla",
    "sto",
    "tri",
    "bel",
    "dan",
    "fer",
    "gar",
    "hol",
    "jin",
    "kar",
    "lan",
    "mer",
    "nor",
    "pen",
    "ros",
    "sil",
    "tan",
    "ver",
    "win",
    "zor",
    "ton",
    "ler",
    "mix",
    "nak",
    "rup",
    "ston",
]


def expand(template: str, rng: random.Random) -> str:
    """One random reading of a template; runs of spaces collapse."""
    text = template
    while match := INNERMOST.search(text):
        text = text[: match.start()] + rng.choice(match.group(1).split("|")) + text[match.end() :]
    return re.sub(r" +", " ", text).strip()


def pseudo_word(rng: random.Random) -> str:
    """A word that does not exist, so that copying is learned and not a list of words."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3, 3, 4))))


def mistype(word: str, rng: random.Random) -> str:
    """Swap, drop or double one inner letter."""
    if len(word) < 5 or not word.isalpha():
        return word
    i = rng.randrange(1, len(word) - 2)
    kind = rng.random()
    if kind < 0.4:
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    if kind < 0.8:
        return word[:i] + word[i + 1 :]
    return word[:i] + word[i] + word[i:]


def rough(text: str, rng: random.Random, *, keep_words: bool = False) -> str:
    """What a person may really type for ``text``; ``keep_words`` spares the letters (names, text to copy)."""
    if rng.random() < 0.08 and not keep_words:
        words = text.split(" ")
        i = rng.randrange(len(words))
        words[i] = mistype(words[i], rng)
        text = " ".join(words)
    if rng.random() < 0.35 and not keep_words:
        text = text.lower()
    if rng.random() < 0.35:
        text = text.rstrip("?.! ")
    elif rng.random() < 0.04:
        text = text.rstrip("?.! ") + rng.choice(("??", "!", "...", " ?"))
    if rng.random() < 0.15 and not keep_words:
        text = text.replace("'", "")
    return text or "hello"
