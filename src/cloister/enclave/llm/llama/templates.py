"""The model's own chat template: untrusted code out of the model file, run in jinja2's sandbox under a deadline.

What a user writes never becomes a control token: see `placeholders`.
"""

import contextlib
import ctypes
import datetime
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NoReturn

import jinja2
import jinja2.compiler
import jinja2.exceptions
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.sandbox

from cloister.enclave.llm.llama.placeholders import ControlTexts, Placeholders, Segment
from cloister.errors import MalformedModel, WrongUse

__all__ = ["ChatTemplate"]

DEADLINE = 1.0
"""Seconds that one prompt's rendering may take."""
_MOST = 16 << 20
"""Characters that one value inside a template may grow to."""


_DEEPEST = 64
"""Levels of a past call's arguments; deeper ones stay the text that they are."""


class _RefusedError(Exception):
    """The template called raise_exception."""


class _Deadline(BaseException):
    """Raised in the rendering thread by the watchdog; no handler for Exception can swallow it."""


class ChatTemplate:
    """`render` turns messages into segments to tokenize. One at a time; any thread.

    `control`: the texts of the model's control tokens.
    """

    def __init__(self, source: str, *, control: Sequence[str], bos: str, eos: str) -> None:
        self._environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self._environment.globals |= {"raise_exception": self._refuse, "strftime_now": _strftime_now}
        self._environment.filters |= {"tojson": _tojson, "indent": _indent}
        for name in _GROWING_FILTERS:
            del self._environment.filters[name]
        del self._environment.globals["lipsum"]
        self._source = source
        self._control = ControlTexts(control)
        self._words = {"bos_token": bos, "eos_token": eos}
        self._compiled: jinja2.Template | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        answer: bool = True,
        deadline: float = DEADLINE,
    ) -> list[Segment]:
        """With `answer`, the text ends where the assistant is to speak. Past calls and `tools` are in OpenAI's form.

        Raises: MalformedModel (the template is broken, or takes too long), WrongUse (it refuses these messages)."""
        mark = Placeholders(self._control)
        plain, offered = mark.hide(adapted(messages, self._source)), mark.hide(list(tools)) or None
        try:
            text = under_deadline(lambda: self._render(plain, offered, answer), deadline)
        except _Deadline:
            raise MalformedModel("The model's chat template ran too long.", expected=f"{deadline:g} s") from None
        except _RefusedError as error:
            raise WrongUse(f"The model's chat template refuses these messages.{error}") from None
        except Exception as error:  # noqa: BLE001 - the template is foreign code: whatever it raises is its fault
            raise MalformedModel("The model's chat template failed.", got=type(error).__name__) from None
        return mark.reveal(text)

    def _render(self, messages: Any, tools: Any, answer: bool) -> str:
        if self._compiled is None:
            self._compiled = self._environment.from_string(self._source)
        return self._compiled.render(messages=messages, add_generation_prompt=answer, tools=tools, **self._words)

    def _refuse(self, reason: object) -> NoReturn:
        """Only words that stand in the template itself are passed on: others may be somebody's message."""
        known = isinstance(reason, str) and 0 < len(reason) <= 300 and reason in self._source
        raise _RefusedError(f" It says: {reason}" if known else "")


_READS_OBJECT = re.compile(
    r"""arguments['"\]\s]*(?:is\s+mapping|\.items\(|\|\s*(?:tojson|items|dictsort))|(?:call|function|calls)['"\]\s]*\|\s*tojson"""
)
_NAMES_ARGUMENTS = re.compile(r"""set\s+(\w{1,40})\s*=\s*[\w.\['"\]]{0,80}\barguments\b""")
_MOST_NAMES = 16
_NINE = re.compile(r"[A-Za-z0-9]{9}")


def adapted(messages: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """The messages as a template of this source reads them, where they hold calls of tools or their results.

    Fields that hold nothing are left out, as some templates ask only whether they are there. Arguments become an object
    where the template puts them into JSON itself, and JSON elsewhere. A template that knows nothing of calls finds them
    as text, and results as words of the user.
    """
    present = [{key: value for key, value in message.items() if value not in (None, [])} for message in messages]
    if not any("tool_calls" in message or message.get("role") == "tool" for message in present):
        return present
    knows_calls, short = "tool_calls" in source, "[TOOL_CALLS]" in source
    as_objects = not knows_calls or _reads_objects(source)
    found: list[dict[str, Any]] = []
    for one in present:
        if "tool_call_id" in one and short:
            one["tool_call_id"] = _nine_characters(one["tool_call_id"])
        if "tool_calls" in one:
            one["tool_calls"] = [_adapted_call(call, as_objects=as_objects, short=short) for call in one["tool_calls"]]
            if not knows_calls:
                calls = [call.get("function") for call in one.pop("tool_calls")]
                one["content"] = "\n".join(filter(None, [one.get("content"), json.dumps(calls, ensure_ascii=False)]))
        if one.get("role") == "tool" and "tool" not in source:
            one["role"] = "user"
            if found and found[-1].get("role") == "user":
                one["content"] = f"{found.pop()['content']}\n{one['content']}"
        found.append(one)
    return found


def _reads_objects(source: str) -> bool:
    """Whether this template takes a call's arguments for an object, under their own name or another."""
    if _READS_OBJECT.search(source):
        return True
    names = {match[1] for match in islice(_NAMES_ARGUMENTS.finditer(source), _MOST_NAMES)}
    return any(re.search(rf"\b{name}\s*(?:\.items\(|\|\s*(?:items|tojson))", source) for name in names)


def _adapted_call(call: Mapping[str, Any], *, as_objects: bool, short: bool) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if as_objects and isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(arguments)
            if isinstance(read, dict) and _is_shallow(read):
                function["arguments"] = read
    elif not as_objects and not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": function, **({"id": _nine_characters(call.get("id"))} if short else {})}


def _is_shallow(value: Any) -> bool:
    """Whether what follows may go through it level by level, in calls of itself."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            item
            for holder in level
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, dict | list)
        ]
    return not level


def _nine_characters(name: Any) -> str:
    """Mistral's templates refuse other identifiers. The same for the same `name`."""
    text = str(name)
    return text if _NINE.fullmatch(text) else hashlib.sha256(text.encode()).hexdigest()[:9]


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """`~` goes through the environment, as the other operators do in a sandbox."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:  # noqa: N802
        self.write("environment.concat_bounded((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


def _bounded_join(parts: Iterable[str]) -> str:
    texts = list(parts)
    if sum(map(len, texts)) > _MOST:
        raise OverflowError
    return "".join(texts)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, and no operator or filter that makes a large value of a small number.

    Does not bound what `replace` and `join` make of texts that are large already: a hostile model file can so exhaust
    the memory of its own engine.
    """

    code_generator_class = _CodeGenerator
    concat = staticmethod(_bounded_join)
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
        return _bounded_join(str(part) for part in parts)

    def wrap_str_format(self, value: Any) -> None:
        """No allowance for str.format: a width in it makes a text of any length."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes) and attr in _GROWING:
            return False
        return super().is_safe_attribute(obj, attr, value)


_GROWING_FILTERS = ("batch", "center", "format", "round", "slice", "wordwrap")
"""These make a large value out of a small number in one step. `indent` and `tojson` do too, and are bounded below."""
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


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    """jinja2's own, for a width in proportion. It takes a text for a width too, which is not needed."""
    _refuse_wide(width)
    return jinja2.filters.do_indent(text, width, first, blank)


def _refuse_wide(width: int | None) -> None:
    if width is not None and (not isinstance(width, int) or width > 32):
        raise OverflowError


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    _refuse_wide(indent)
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
