"""GBNF, the notation of llama.cpp for grammars: read and judged under limits, in words that repeat nothing of it."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias

from cloister.errors import WrongUse

__all__ = ["MAX_GRAMMAR", "TOP", "Chars", "Choice", "Node", "Repeat", "Rule", "Series", "read_grammar"]

MAX_GRAMMAR = 256 << 10
"""Characters."""
_MOST_RULES = 4096
_DEEPEST_GROUP = 48
_MOST_TIMES = 1 << 16
"""The largest number in `{m,n}`."""
_MOST_PASSES = 64
"""Passes over all rules in which facts about them must settle."""
TOP = 0x110000
_ESCAPES = {"n": 10, "r": 13, "t": 9, "\\": 92, '"': 34, "[": 91, "]": 93, "-": 45, "^": 94, "'": 39, "/": 47}
_DIGITS = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True, slots=True, eq=False)
class Chars:
    """One character. `bounds`: where the allowed runs begin and end (exclusive), in turn, ascending.

    `leads`: the first bytes of their UTF-8 forms.
    """

    bounds: tuple[int, ...]
    leads: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        leads = set[int]()
        for low, end in zip(self.bounds[::2], self.bounds[1::2], strict=True):
            leads.update(range(_lead(low), _lead(end - 1) + 1))
        object.__setattr__(self, "leads", frozenset(leads))

    def has(self, code: int) -> bool:
        return bisect_right(self.bounds, code) % 2 == 1

    def meets(self, low: int, high: int) -> bool:
        """Whether some character from `low` to `high` is allowed."""
        at = bisect_right(self.bounds, low)
        return at % 2 == 1 or (at < len(self.bounds) and self.bounds[at] <= high)


def _lead(code: int) -> int:
    """The first byte of a character's UTF-8 form."""
    if code < 0x80:
        return code
    if code < 0x800:
        return 0xC0 | code >> 6
    return 0xE0 | code >> 12 if code < 0x10000 else 0xF0 | code >> 18


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One after the other."""

    items: tuple["Node", ...]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """One of them."""

    options: tuple["Node", ...]


@dataclass(frozen=True, slots=True, eq=False)
class Repeat:
    """`most` None: without end."""

    item: "Node"
    least: int
    most: int | None


@dataclass(slots=True, eq=False)
class Rule:
    """A name for its body."""

    name: str
    body: "Node | None" = None


Node: TypeAlias = Chars | Series | Choice | Repeat | Rule


def read_grammar(text: str) -> Rule:
    """The rule `root`, with all that it needs.

    Raises: WrongUse when the text cannot be read or is beyond a limit; for want of a `root`; for a rule that never comes
    to an end, calls itself before any character, or repeats what may be empty.
    """
    if len(text) > MAX_GRAMMAR:
        raise WrongUse("The grammar is too long.", expected=f"{MAX_GRAMMAR} characters at most", got=str(len(text)))
    rules = _Reader(text).read()
    if "root" not in rules:
        raise WrongUse("The grammar has no rule named root.")
    _check(list(rules.values()))
    return rules["root"]


class _Reader:
    """Reads GBNF as llama.cpp does, but for tokens by number or name."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._rules: dict[str, Rule] = {}
        self._chars: dict[tuple[int, ...], Chars] = {}

    def read(self) -> dict[str, Rule]:
        self._skip(lines=True)
        while self._at < len(self._text):
            rule = self._rule(self._name())
            self._skip()
            self._expect("::=")
            if rule.body is not None:
                self._fail("names a rule twice")
            self._skip(lines=True)
            rule.body = self._choice()
            if self._at < len(self._text) and self._peek() not in "\r\n":
                self._fail()
            self._skip(lines=True)
        return self._rules

    def _fail(self, what: str = "cannot be read") -> NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        raise WrongUse(f"The grammar {what}, at line {line}.")

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        char = self._peek()
        if not char:
            self._fail("ends too early")
        self._at += 1
        return char

    def _expect(self, word: str) -> None:
        if not self._text.startswith(word, self._at):
            self._fail()
        self._at += len(word)

    def _skip(self, *, lines: bool = False) -> None:
        """Blanks and comments; with `lines`, line ends too."""
        while char := self._peek():
            if char == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif char in " \t" or (lines and char in "\r\n"):
                self._at += 1
            else:
                return

    def _name(self) -> str:
        start = self._at
        while (char := self._peek()) and char.isascii() and (char.isalnum() or char in "-_"):
            self._at += 1
        if start == self._at:
            self._fail()
        return self._text[start : self._at]

    def _rule(self, name: str) -> Rule:
        if name not in self._rules:
            if len(self._rules) == _MOST_RULES:
                self._fail(f"has more than {_MOST_RULES} rules")
            self._rules[name] = Rule(name)
        return self._rules[name]

    def _choice(self) -> Node:
        options = [self._series()]
        while self._peek() == "|":
            self._at += 1
            self._skip(lines=True)
            options.append(self._series())
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _series(self) -> Node:
        items: list[Node] = []
        while (char := self._peek()) and char not in "|)\r\n":
            item = self._item(char)
            self._skip(lines=self._depth > 0)
            if (char := self._peek()) and char in "*+?{":
                item = self._repeat(item, self._next())
                self._skip(lines=self._depth > 0)
            items.append(item)
        return items[0] if len(items) == 1 else Series(tuple(items))

    def _item(self, char: str) -> Node:
        if char == '"':
            self._at += 1
            found: list[Node] = []
            while self._peek() != '"':
                code = self._code()
                found.append(self._one((code, code + 1)))
            self._at += 1
            return found[0] if len(found) == 1 else Series(tuple(found))
        if char == "[":
            self._at += 1
            return self._class()
        if char == ".":
            self._at += 1
            return self._one((0, TOP))
        if char != "(":
            return self._rule(self._name())
        self._at += 1
        self._depth += 1
        if self._depth > _DEEPEST_GROUP:
            self._fail(f"is nested deeper than {_DEEPEST_GROUP} groups")
        self._skip(lines=True)
        inner = self._choice()
        self._expect(")")
        self._depth -= 1
        return inner

    def _one(self, bounds: tuple[int, ...]) -> Chars:
        if bounds not in self._chars:
            self._chars[bounds] = Chars(bounds)
        return self._chars[bounds]

    def _code(self) -> int:
        char = self._next()
        if char != "\\":
            return ord(char)
        kind = self._next()
        if kind in _ESCAPES:
            return _ESCAPES[kind]
        digits = self._text[self._at : self._at + _DIGITS.get(kind, 0)]
        if kind not in _DIGITS or len(digits) < _DIGITS[kind] or not all(d in "0123456789abcdefABCDEF" for d in digits):
            self._fail("holds an unknown escape")
        self._at += len(digits)
        code = int(digits, 16)
        if code >= TOP:
            self._fail("holds an unknown escape")
        return code

    def _class(self) -> Chars:
        runs: list[tuple[int, int]] = []
        negated = self._peek() == "^"
        self._at += negated
        while self._peek() != "]":
            low = high = self._code()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._code()
            if low > high:
                self._fail("holds a range that is none")
            runs.append((low, high + 1))
        self._at += 1
        return self._one(_bounds(runs, negated=negated))

    def _repeat(self, item: Node, kind: str) -> Node:
        if kind != "{":
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[kind]
            return Repeat(item, least, most)
        self._skip()
        least = self._number()
        most = least
        self._skip()
        if self._peek() == ",":
            self._at += 1
            self._skip()
            most = None if self._peek() == "}" else self._number()
        self._skip()
        self._expect("}")
        if most is not None and most < least:
            self._fail("holds a range that is none")
        return Series(()) if most == 0 else Repeat(item, least, most)

    def _number(self) -> int:
        digits = ""
        while (char := self._peek()) and char in "0123456789" and len(digits) < 8:
            digits += self._next()
        if not digits or int(digits) > _MOST_TIMES:
            self._fail(f"repeats something not 0 to {_MOST_TIMES} times")
        return int(digits)


def _bounds(runs: list[tuple[int, int]], *, negated: bool) -> tuple[int, ...]:
    merged: list[int] = []
    for low, end in sorted(runs):
        if merged and low <= merged[-1]:
            merged[-1] = max(merged[-1], end)
        else:
            merged += [low, end]
    if not negated:
        return tuple(merged)
    flipped = [*([] if merged[:1] == [0] else [0]), *merged[int(merged[:1] == [0]) :]]
    return tuple(flipped[:-1] if flipped[-1:] == [TOP] else [*flipped, TOP])


# Judging.


def _check(rules: Sequence[Rule]) -> None:
    """Raises: WrongUse."""
    if any(rule.body is None for rule in rules):
        raise WrongUse("The grammar uses a rule that it does not define.")
    ending = _settle(rules, _ends)
    if len(ending) < len(rules):
        raise WrongUse("The grammar has a rule that never comes to an end.")
    empty = _settle(rules, _may_be_empty)
    calls: dict[Rule, set[Rule]] = {}
    for rule in rules:
        _check_repeats(rule, empty)
        calls[rule] = set(_first_rules(rule.body, empty))
    if _cyclic(calls):
        raise WrongUse("The grammar has a rule that calls itself before any character.")


def _settle(rules: Sequence[Rule], holds: Callable[[Node | None, set[Rule]], bool]) -> set[Rule]:
    """The rules of which `holds` says so, given those of which it did."""
    found: set[Rule] = set()
    for turn in range(_MOST_PASSES):
        before = len(found)
        for rule in rules if turn % 2 else reversed(rules):
            if rule not in found and holds(rule.body, found):
                found.add(rule)
        if len(found) == before:
            return found
    raise WrongUse("The grammar's rules depend on each other in too long chains.")


def _ends(node: Node | None, known: set[Rule]) -> bool:
    match node:
        case Chars():
            return bool(node.bounds)
        case Series():
            return all(_ends(item, known) for item in node.items)
        case Choice():
            return any(_ends(option, known) for option in node.options)
        case Repeat():
            return node.least == 0 or _ends(node.item, known)
    return node in known


def _may_be_empty(node: Node | None, known: set[Rule]) -> bool:
    match node:
        case Chars():
            return False
        case Series():
            return all(_may_be_empty(item, known) for item in node.items)
        case Choice():
            return any(_may_be_empty(option, known) for option in node.options)
        case Repeat():
            return node.least == 0 or _may_be_empty(node.item, known)
    return node in known


def _inner(node: Node | None) -> Sequence[Node]:
    """What a node is made of, but for rules."""
    match node:
        case Series():
            return node.items
        case Choice():
            return node.options
        case Repeat():
            return (node.item,)
    return ()


def _check_repeats(rule: Rule, empty: set[Rule]) -> None:
    todo = [rule.body]
    while todo:
        node = todo.pop()
        if isinstance(node, Repeat) and node.most != 1 and _may_be_empty(node.item, empty):
            raise WrongUse("The grammar repeats something that may be empty.")
        todo += _inner(node)


def _first_rules(node: Node | None, empty: set[Rule]) -> Iterator[Rule]:
    """The rules that `node` may call before any character."""
    if isinstance(node, Rule):
        yield node
    for item in _inner(node):
        yield from _first_rules(item, empty)
        if isinstance(node, Series) and not _may_be_empty(item, empty):
            return


def _cyclic(calls: dict[Rule, set[Rule]]) -> bool:
    """Whether some rule can be reached from itself: true when leaves can be taken away no more, and some are left."""
    callers: dict[Rule, list[Rule]] = {rule: [] for rule in calls}
    for rule, called in calls.items():
        for other in called:
            callers[other].append(rule)
    left = {rule: len(called) for rule, called in calls.items()}
    leaves = [rule for rule, count in left.items() if not count]
    taken = 0
    while leaves:
        taken += 1
        for caller in callers[leaves.pop()]:
            left[caller] -= 1
            if not left[caller]:
                leaves.append(caller)
    return taken < len(calls)
