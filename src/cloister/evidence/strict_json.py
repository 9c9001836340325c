"""JSON as bytes that are hashed where they stand: one reading, or none.

Refused: invalid UTF-8, duplicate keys, unknown keys, floats and NaN, integers out of bounds, lone surrogates, control
characters, nesting that exhausts the parser. Nothing is ever re-serialised to be hashed.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from cloister.errors import Malformed, MalformedEvidence

__all__ = ["Fields", "b64url", "from_b64url", "load_object"]

MAX_INTEGER = 2**53 - 1  # what every JSON implementation reads the same way (RFC 8259, section 6)

_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def b64url(data: bytes) -> str:
    """Base64url without padding (RFC 4648, section 5)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def from_b64url(text: str, *, what: str) -> bytes:
    """Exactly one spelling per value: no padding, no white space, no spare bits.

    Raises: MalformedEvidence.
    """
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedEvidence(f"{what} is not base64url.", step=what) from error
    if b64url(data) != text:
        raise MalformedEvidence(f"{what} is not canonical base64url.", step=what)
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_floats(text: str) -> NoReturn:
    raise ValueError(f"{text[:32]} is not an integer")


def load_object(data: bytes, *, max_bytes: int, what: str) -> dict[str, Any]:
    """One JSON object that fills `data`.

    Raises: MalformedEvidence.
    """
    if len(data) > max_bytes:
        raise MalformedEvidence(f"{what} is too long.", step=what, expected=f"{max_bytes} bytes", got=str(len(data)))
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_float=_no_floats,
            parse_constant=_no_floats,
        )
    except (ValueError, RecursionError) as error:
        raise MalformedEvidence(f"{what} is not strict JSON: {error}.", step=what) from error
    if not isinstance(value, dict):
        raise MalformedEvidence(f"{what} is not a JSON object.", step=what)
    return value


class Fields:
    """Reads one object's members by name and type; `end` refuses what nobody asked for.

    Every method raises `error` (MalformedEvidence, or the policy's), naming the member.
    """

    def __init__(self, value: object, *, what: str, error: type[Malformed] = MalformedEvidence) -> None:
        if not isinstance(value, Mapping):
            raise error(f"{what} is not an object.", step=what)
        self._rest = dict(value)
        self._what = what
        self._error = error

    def _refuse(self, name: str, expected: str) -> NoReturn:
        where = f"{self._what}.{name}"
        raise self._error(f"{where} is not {expected}.", step=where, expected=expected)

    def has(self, name: str) -> bool:
        return name in self._rest

    def take(self, name: str) -> object:
        if name not in self._rest:
            raise self._error(f"{self._what}.{name} is missing.", step=f"{self._what}.{name}")
        return self._rest.pop(name)

    def integer(self, name: str, *, low: int = 0, high: int = MAX_INTEGER) -> int:
        value = self.take(name)
        if type(value) is not int or not low <= value <= high:
            self._refuse(name, f"an integer from {low} to {high}")
        return value

    def boolean(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool):
            self._refuse(name, "true or false")
        return value

    def text(self, name: str, *, max_length: int = 256) -> str:
        return self._text(name, self.take(name), max_length)

    def _text(self, name: str, value: object, max_length: int) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= max_length or _CONTROL.search(value):
            self._refuse(name, f"text of 1 to {max_length} characters without control characters")
        return value

    def one_of(self, name: str, choices: Sequence[str]) -> str:
        value = self.take(name)
        if not isinstance(value, str) or value not in choices:
            self._refuse(name, " or ".join(choices))
        return value

    def matching(self, name: str, pattern: re.Pattern[str], expected: str) -> str:
        value = self.take(name)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self._refuse(name, expected)
        return value

    def sha256(self, name: str) -> str:
        """64 lower-case hexadecimal digits."""
        return self.matching(name, _HEX_SHA256, "64 lower-case hexadecimal digits")

    def binary(self, name: str, *, low: int, high: int) -> bytes:
        """Base64url of `low` to `high` bytes."""
        value = self.take(name)
        if not isinstance(value, str) or len(value) > 2 * high + 4:
            self._refuse(name, f"base64url of {low} to {high} bytes")
        data = from_b64url(value, what=f"{self._what}.{name}")
        if not low <= len(data) <= high:
            self._refuse(name, f"base64url of {low} to {high} bytes")
        return data

    def items(self, name: str, *, max_items: int = 16) -> list[object]:
        value = self.take(name)
        if not isinstance(value, list) or len(value) > max_items:
            self._refuse(name, f"a list of at most {max_items} entries")
        return value

    def texts(self, name: str, *, max_items: int = 16, max_length: int = 256) -> tuple[str, ...]:
        """Distinct strings."""
        values = tuple(self._text(name, value, max_length) for value in self.items(name, max_items=max_items))
        if len(set(values)) != len(values):
            self._refuse(name, "a list without repetition")
        return values

    def sha256s(self, name: str, *, max_items: int = 16) -> tuple[str, ...]:
        values = self.texts(name, max_items=max_items, max_length=64)
        if not all(_HEX_SHA256.fullmatch(value) for value in values):
            self._refuse(name, "a list of SHA-256 digests, 64 lower-case hexadecimal digits each")
        return values

    def names(self) -> tuple[str, ...]:
        """The members not read yet."""
        return tuple(self._rest)

    def end(self) -> None:
        if self._rest:
            unknown = ascii(min(self._rest))[:64]
            raise self._error(f"{self._what} has an unknown key: {unknown}.", step=self._what, got=unknown)
