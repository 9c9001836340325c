"""Regular expressions of JSON schemas as GBNF: what such a string looks like between its quotes in JSON.

An expression may match anywhere in a string; here it makes up all of it, which is one of the ways.
"""

import os
from collections.abc import Collection, Sequence
from typing import NoReturn

__all__ = ["PatternError", "gbnf_of_pattern", "literal", "one_of"]

MAX_PATTERN = 1024
_ENDLESS = 1024
"""Times for `*` and `+`, which would otherwise have no end."""
_DEEPEST = 12
_MOST_TIMES = 1 << 14

_TOP = 0x10FFFF
_ASCII = 0x7E
"""Where readers disagree about which letters, digits and blanks of other scripts belong to `\\w`, `\\d` and `\\s`, what is
not of them is taken from here."""

_Runs = list[tuple[int, int]]
_DIGIT: _Runs = [(48, 57)]
_WORD: _Runs = [(48, 57), (65, 90), (95, 95), (97, 122)]
_SPACE: _Runs = [(9, 13), (32, 32)]
_SETS = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12}
_ESCAPED = {34: '\\"', 92: "\\\\", 10: "\\n", 13: "\\r", 9: "\\t", 12: "\\f"}
"""Characters that stand in a JSON string with a backslash before them."""
_PLAIN: _Runs = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0xA0, 0xD7FF), (0xE000, 0xFFFD), (0x10000, 0x10FFFD)]


class PatternError(Exception):
    """The expression is beyond what is understood here."""


def literal(text: str) -> str:
    """`text` as a GBNF literal."""
    named = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(named.get(c) or (c if c >= " " else f"\\x{ord(c):02x}") for c in text) + '"'


def one_of(texts: Collection[str], levels: int = 8) -> str:
    """One of these texts as GBNF. What several begin with stands there once: few of many are possible at any time."""
    groups: dict[str, list[str]] = {}
    for text in dict.fromkeys(texts):
        groups.setdefault(text[:1], []).append(text)
    options: list[str] = []
    for group in groups.values():
        shared = os.path.commonprefix(group)  # noqa: RUF071 - these are no paths
        if len(group) == 1 or not levels:
            options += map(literal, group)
        else:
            options.append(f"{literal(shared)} {one_of([text[len(shared) :] for text in group], levels - 1)}")
    return f"( {' | '.join(options)} )"


def gbnf_of_pattern(pattern: str) -> str:
    """Literals, classes, groups, alternatives and repetitions; `^` and `$` at the ends.

    Raises: PatternError for anything else (looking around, references, Unicode classes), and for long ones.
    """
    if len(pattern) > MAX_PATTERN:
        raise PatternError
    return _Translator(pattern).translate()


class _Translator:
    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._depth = 0
        self._named_set = False

    def translate(self) -> str:
        found = self._choice()
        if self._at < len(self._text):
            self._fail()
        return found

    def _fail(self) -> NoReturn:
        raise PatternError

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        char = self._peek()
        if not char:
            self._fail()
        self._at += 1
        return char

    def _takes(self, word: str) -> bool:
        if not self._text.startswith(word, self._at):
            return False
        self._at += len(word)
        return True

    def _choice(self) -> str:
        options = [self._series()]
        while self._takes("|"):
            options.append(self._series())
        return f"({' | '.join(options)})"

    def _series(self) -> str:
        items: list[str] = []
        if self._depth == 0:
            self._takes("^")
        while (char := self._peek()) and char not in "|)":
            if self._takes("$"):
                if self._depth or self._peek() not in ("", "|"):
                    self._fail()
                break
            items.append(self._atom(self._next()) + self._times())
        return " ".join(items) or '""'

    def _atom(self, char: str) -> str:
        if char == "(":
            return self._group()
        if char == "[":
            return _emit(self._class())
        if char == ".":
            return _emit(_without([(10, 10), (13, 13), (0x2028, 0x2029)]))
        if char == "\\":
            return _emit(self._escape())
        if char in "*+?{^":
            self._fail()
        return _emit([(ord(char), ord(char))])

    def _group(self) -> str:
        if not self._takes("?:") and self._peek() == "?":
            self._fail()
        self._depth += 1
        if self._depth > _DEEPEST:
            self._fail()
        inner = self._choice()
        self._depth -= 1
        if not self._takes(")"):
            self._fail()
        return inner

    def _times(self) -> str:
        char = self._peek()
        if not char or char not in "*+?{":
            return ""
        self._at += 1
        least, most = {"*": (0, _ENDLESS), "+": (1, _ENDLESS), "?": (0, 1)}.get(char) or self._counts()
        self._takes("?")  # how eagerly it repeats makes no difference to what it matches
        if self._peek() and self._peek() in "*+{":
            self._fail()
        return f"{{{least},{most}}}"

    def _counts(self) -> tuple[int, int]:
        inner, found, rest = self._text[self._at :].partition("}")
        low, comma, high = inner.partition(",")
        if (
            not found
            or not low.isdecimal()
            or not low.isascii()
            or (high and not (high.isdecimal() and high.isascii()))
        ):
            self._fail()
        self._at = len(self._text) - len(rest)
        least = int(low[:9])
        most = least if not comma else int(high[:9]) if high else max(least, _ENDLESS)
        if not least <= most <= _MOST_TIMES or most == 0:
            self._fail()
        return least, most

    def _escape(self) -> _Runs:
        char = self._next()
        if char.lower() in _SETS:
            self._named_set = True
            return _SETS[char] if char in _SETS else _without(_SETS[char.lower()], _ASCII)
        if char in _CONTROLS:
            return [(_CONTROLS[char], _CONTROLS[char])]
        if char in ("x", "u"):
            digits = self._text[self._at : self._at + (2 if char == "x" else 4)]
            self._at += len(digits)
            if len(digits) not in (2, 4) or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
                self._fail()
            return [(int(digits, 16), int(digits, 16))]
        if char.isalnum():  # \b, \p, \1 and their like
            self._fail()
        return [(ord(char), ord(char))]

    def _class(self) -> _Runs:
        negated = self._takes("^")
        runs: _Runs = []
        self._named_set = False
        first = True
        while first or self._peek() != "]":
            first = False
            low = self._member()
            single = len(low) == 1 and low[0][0] == low[0][1]
            if single and self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._member()
                if len(high) != 1 or high[0][0] != high[0][1] or high[0][0] < low[0][0]:
                    self._fail()
                low = [(low[0][0], high[0][0])]
            runs += low
        self._at += 1
        if not negated:
            return runs
        return _without(runs, _ASCII if self._named_set else _TOP)

    def _member(self) -> _Runs:
        char = self._next()
        return self._escape() if char == "\\" else [(ord(char), ord(char))]


def _without(runs: Sequence[tuple[int, int]], top: int = _TOP) -> _Runs:
    """All characters but these, up to `top`."""
    left: _Runs = []
    at = 0
    for low, high in sorted(runs):
        if low > at:
            left.append((at, low - 1))
        at = max(at, high + 1)
    return [*left, (at, top)] if at <= top else left


def _emit(runs: Sequence[tuple[int, int]]) -> str:
    """One of these characters, as it stands in a JSON string. Control characters without a short escape are left out."""
    plain = [
        (max(low, start), min(high, end)) for low, high in runs for start, end in _PLAIN if low <= end and high >= start
    ]
    options = [f"[{''.join(f'{_code(low)}-{_code(high)}' for low, high in plain)}]"] if plain else []
    options += [literal(text) for code, text in _ESCAPED.items() if any(low <= code <= high for low, high in runs)]
    if not options:
        raise PatternError
    return options[0] if len(options) == 1 else f"({' | '.join(options)})"


def _code(code: int) -> str:
    return chr(code) if chr(code).isascii() and chr(code).isalnum() else f"\\U{code:08x}"
