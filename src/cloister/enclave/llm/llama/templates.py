"""The model's own chat template: untrusted code out of the model file, run in jinja2's sandbox under a deadline.

What a user writes never becomes a control token: see `Rendered`.
"""

import ctypes
import datetime
import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.compiler
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from cloister.errors import MalformedModel, WrongUse

__all__ = ["ChatTemplate", "Segment"]

DEADLINE = 1.0
"""Seconds that one prompt's rendering may take."""
_MOST = 16 << 20
"""Characters that one value inside a template may grow to."""

Segment = tuple[str, bool]
"""Text, and whether control tokens in it are the template's own, and so meant."""


class _RefusedError(Exception):
    """The template called raise_exception."""


class _Deadline(BaseException):
    """Raised in the rendering thread by the watchdog; no handler for Exception can swallow it."""


class ChatTemplate:
    """`render` turns messages into segments to tokenize. One at a time; any thread.

    `control`: the texts of the model's control tokens. Where one of them stands inside a message, a placeholder
    that cannot be guessed goes through the template in its place, and comes out as a segment of plain text. The
    rest of a message goes through as it is, so that templates which look at it (trim, split, `in`) see it.
    """

    def __init__(self, source: str, *, control: Sequence[str], bos: str, eos: str) -> None:
        self._environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self._environment.globals |= {"raise_exception": self._refuse, "strftime_now": _strftime_now}
        self._environment.filters["tojson"] = _tojson
        for name in ("center", "format"):  # these make large texts out of a small number in one step
            del self._environment.filters[name]
        self._source = source
        self._control = _pattern(control)
        self._words = {"bos_token": bos, "eos_token": eos}
        self._compiled: jinja2.Template | None = None

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True, deadline: float = DEADLINE
    ) -> list[Segment]:
        """With `answer`, the text ends where the assistant is to speak.

        Raises: MalformedModel (the template is broken, or takes too long), WrongUse (it refuses these messages)."""
        mark = Placeholders(self._control)
        plain = mark.hide(list(messages))
        try:
            text = under_deadline(lambda: self._render(plain, answer), deadline)
        except _Deadline:
            raise MalformedModel("The model's chat template ran too long.", expected=f"{deadline:g} s") from None
        except _RefusedError as error:
            raise WrongUse(f"The model's chat template refuses these messages.{error}") from None
        except Exception as error:  # noqa: BLE001 - the template is foreign code: whatever it raises is its fault
            raise MalformedModel("The model's chat template failed.", got=type(error).__name__) from None
        return mark.reveal(text)

    def _render(self, messages: Any, answer: bool) -> str:
        if self._compiled is None:
            self._compiled = self._environment.from_string(self._source)
        return self._compiled.render(messages=messages, add_generation_prompt=answer, tools=None, **self._words)

    def _refuse(self, reason: object) -> NoReturn:
        """Only words that stand in the template itself are passed on: others may be somebody's message."""
        known = isinstance(reason, str) and 0 < len(reason) <= 300 and reason in self._source
        raise _RefusedError(f" It says: {reason}" if known else "")


def _pattern(control: Sequence[str]) -> re.Pattern[str] | None:
    """Matches a control token's text; at a message's ends also part of one, which its neighbour might complete."""
    if not control:
        return None
    ordered = sorted(control, key=len, reverse=True)
    whole = [re.escape(text) for text in ordered]
    heads = sorted({re.escape(text[:n]) for text in ordered for n in range(2, len(text))}, key=len, reverse=True)
    tails = sorted({re.escape(text[-n:]) for text in ordered for n in range(2, len(text))}, key=len, reverse=True)
    parts = ["|".join(whole)]
    if heads:
        parts += [rf"(?:{'|'.join(heads)})(?=\s*\Z)", rf"\A(?:{'|'.join(tails)})"]
    return re.compile("|".join(parts))


class Placeholders:
    """Stand-ins for control-token texts in one conversation."""

    def __init__(self, control: re.Pattern[str] | None) -> None:
        self._control = control
        self._nonce = str(int.from_bytes(os.urandom(12), "big"))
        self._hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        """A copy of `value` (what JSON can hold) with stand-ins in all its strings."""
        if isinstance(value, str):
            return self._control.sub(self._stand_in, value) if self._control else value
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(inner) for inner in value]
        return value

    def _stand_in(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"\ufdd0{self._nonce}:{len(self._hidden) - 1}\ufdd1"  # noncharacters, with a number nobody knows

    def reveal(self, text: str) -> list[Segment]:
        """The rendered text in order: the template's, with True, and the hidden pieces as plain text, with False."""
        if not self._hidden:
            return [(text, True)]
        segments: list[Segment] = []
        pieces = re.split(f"\ufdd0{self._nonce}:([0-9]{{1,9}})\ufdd1", text)
        for at, piece in enumerate(pieces):
            if at % 2:
                index = int(piece)
                segments.append((self._hidden[index] if index < len(self._hidden) else "", False))
            elif piece:
                segments.append((piece, True))
        return segments


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """`~` goes through the environment, as the other operators do in a sandbox."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:  # noqa: N802
        self.write("environment.concat_bounded((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, and no single operation whose result is out of all proportion to what it was given."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and _magnitude(left) * max(_magnitude(right), 1) > 64:
            raise OverflowError
        if operator == "*" and (_size(left) or 1) * (_size(right) or 1) * _times(left, right) > _MOST:
            raise OverflowError
        if operator == "%" and isinstance(left, str):
            raise jinja2.exceptions.SecurityError("formatting")
        if operator == "+" and _size(left) + _size(right) > _MOST:
            raise OverflowError
        return super().call_binop(context, operator, left, right)

    def concat_bounded(self, parts: tuple[Any, ...]) -> str:
        texts = [str(part) for part in parts]
        if sum(map(len, texts)) > _MOST:
            raise OverflowError
        return "".join(texts)

    def wrap_str_format(self, value: Any) -> None:
        """No allowance for str.format: a width in it makes a text of any length."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes) and attr in _GROWING:
            return False
        return super().is_safe_attribute(obj, attr, value)


_GROWING = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs", "format", "format_map", "translate"})


def _size(value: Any) -> int:
    """Length of what has one, 0 of what has not; a large integer counts by its bits."""
    if isinstance(value, str | bytes | list | tuple):
        return len(value)
    return value.bit_length() // 8 if isinstance(value, int) else 0


def _times(left: Any, right: Any) -> int:
    """How many copies `left * right` makes of a sequence."""
    if isinstance(left, str | bytes | list | tuple) and isinstance(right, int):
        return max(right, 0)
    if isinstance(right, str | bytes | list | tuple) and isinstance(left, int):
        return max(left, 0)
    return 1


def _magnitude(value: Any) -> float:
    return float(value.bit_length()) if isinstance(value, int) else 1.0 if isinstance(value, float) else 0.0


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    allowed = {key: options[key] for key in ("ensure_ascii", "separators", "sort_keys") if key in options}
    return json.dumps(value, indent=indent, **{"ensure_ascii": False, **allowed})


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100:
        raise OverflowError
    return datetime.datetime.now(tz=datetime.UTC).strftime(pattern)


def under_deadline(work: Callable[[], str], seconds: float) -> str:
    """Run `work` here; after `seconds` raise `_Deadline` in the midst of it.

    The interpreter delivers an exception to a thread between two of its instructions, so this reaches any loop in a
    template, in a child process and in a thread of a larger one alike. One long instruction is not interrupted: the
    sandbox above bounds those.
    """
    lock = threading.Lock()
    state = {"running": True, "fired": False}
    thread = threading.get_ident()

    def fire() -> None:
        with lock:
            if state["running"]:
                state["fired"] = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Deadline))

    timer = threading.Timer(seconds, fire)
    timer.daemon = True
    timer.start()
    failure: Exception | None = None
    result = ""
    try:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - kept until the watchdog is known to be silent
            failure = error
        with lock:
            state["running"] = False
        while state["fired"]:  # it fired while `work` returned: meet it here, not somewhere later
            pass
    finally:
        timer.cancel()
    if failure is not None:
        raise failure
    return result
