"""Reading typed fields out of a JSON object. Every refusal names the field and never repeats its value."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from cloister.enclave.llm.envelope import Refused

__all__ = ["Fields", "parse_object", "refuse"]

MAX_DEPTH = 64
MAX_VALUES = 100_000
"""Values in one body; what is passed on takes hundreds of bytes each, however short it was written."""
_TOKENS = (1, 2)
"""How deep arrays of token ids stand: as one prompt, or among several. Their numbers count as no values."""
MAX_TOKEN_ID = 2**31 - 1


def refuse(param: str | None, message: str, code: str = "invalid_value") -> NoReturn:
    raise Refused(400, code, message, param=param)


def parse_object(body: bytes) -> "Fields":
    """Strict JSON: UTF-8, one object, finite numbers, no lone surrogates, no deeper than `MAX_DEPTH`, and at most
    `MAX_VALUES` values beside token ids.

    Raises:
        Refused: 400 `invalid_json`; 413 `request_too_large` for too many values.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_not_json, parse_float=_finite)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8 form
    except (ValueError, RecursionError):  # covers UnicodeError, JSONDecodeError and overlong integers
        raise Refused(400, "invalid_json", "The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise Refused(400, "invalid_json", "The body must be a JSON object.")
    _limit_size(value)
    return Fields(value)


def _limit_size(value: Any) -> None:
    """What is passed on (a message's extra fields) is encoded and walked again, perhaps on a deeper stack."""
    level, count = [value], 0
    for depth in range(MAX_DEPTH):
        inner: list[Any] = []
        for holder in level:
            items = holder.values() if isinstance(holder, dict) else holder
            tokens = depth in _TOKENS and isinstance(holder, list)
            count += sum(type(item) is not int for item in items) if tokens else len(items)
            inner += [item for item in items if isinstance(item, dict | list)]
        if count > MAX_VALUES:
            raise Refused(413, "request_too_large", f"The body may hold {MAX_VALUES} values at most.")
        level = inner
    if level:
        raise Refused(400, "invalid_json", f"The body is nested deeper than {MAX_DEPTH} levels.")


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError
    return value


def _not_json(_constant: str) -> NoReturn:
    raise ValueError


class Fields:
    """A JSON object, field by field. `null` counts as absent, as OpenAI's clients send it. All raise `Refused`."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values = values
        self._where = where

    def name(self, field: str) -> str:
        return f"{self._where}{field}"

    def get(self, field: str) -> Any:
        return self.values.get(field)

    def has(self, field: str) -> bool:
        return self.values.get(field) is not None

    def text(self, field: str) -> str | None:
        value = self.get(field)
        if value is not None and not isinstance(value, str):
            refuse(self.name(field), f"'{self.name(field)}' must be a string.", "invalid_type")
        return value

    def flag(self, field: str, *, default: bool = False) -> bool:
        value = self.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            refuse(self.name(field), f"'{self.name(field)}' must be true or false.", "invalid_type")
        return value

    def integer(self, field: str, low: int, high: int) -> int | None:
        value = self.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            refuse(self.name(field), f"'{self.name(field)}' must be an integer.", "invalid_type")
        if not low <= value <= high:
            refuse(self.name(field), f"'{self.name(field)}' must be from {low} to {high}.")
        return value

    def number(self, field: str, default: float, low: float, high: float) -> float:
        value = self.get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(self.name(field), f"'{self.name(field)}' must be a number.", "invalid_type")
        if not low <= value <= high or not math.isfinite(value):
            refuse(self.name(field), f"'{self.name(field)}' must be from {low:g} to {high:g}.")
        return float(value)

    def object(self, field: str) -> "Fields":
        value = self.get(field)
        if value is None:
            return Fields({}, f"{self.name(field)}.")
        if not isinstance(value, dict):
            refuse(self.name(field), f"'{self.name(field)}' must be an object.", "invalid_type")
        return Fields(value, f"{self.name(field)}.")

    def array(self, field: str) -> Sequence[Any]:
        value = self.get(field)
        if value is None:
            return ()
        if not isinstance(value, list):
            refuse(self.name(field), f"'{self.name(field)}' must be an array.", "invalid_type")
        return value

    def tokens(self, field: str, values: Sequence[Any]) -> tuple[int, ...]:
        """Token ids; whether the model's vocabulary has them is the engine's business."""
        if any(type(token) is not int or not 0 <= token <= MAX_TOKEN_ID for token in values):
            refuse(self.name(field), f"'{self.name(field)}' must hold token ids.")
        return tuple(values)
