"""CBOR maps of our own making (RFC 8949): definite lengths, shortest forms, no tags, no repeated keys, nothing after."""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import cbor2

from cloister.errors import MalformedEvidence

__all__ = ["load_map"]

MAX_DEPTH = 8


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("tags are not allowed")


class _NoTags(Mapping[int, Any]):
    """Answers every tag, built in or not, with a refusal: shared references could make values that never end."""

    def __getitem__(self, tag: int) -> Any:
        return _refuse_tag

    def __iter__(self) -> Iterator[int]:
        return iter(())

    def __len__(self) -> int:
        return 0


def load_map(
    data: bytes, *, keys: frozenset[str], optional: frozenset[str] = frozenset(), max_bytes: int, what: str
) -> dict[str, Any]:
    """One map with exactly `keys`, and perhaps some of `optional`, that fills `data`; its values are of any plain type,
    for the caller to check.

    Raises: MalformedEvidence.
    """
    if len(data) > max_bytes:
        raise MalformedEvidence(f"{what} is too long.", step=what, expected=f"{max_bytes} bytes", got=str(len(data)))
    try:
        value = cbor2.loads(
            data,
            semantic_decoders=_NoTags(),
            max_depth=MAX_DEPTH,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
        canonical = cbor2.dumps(value)
    except (cbor2.CBORError, ValueError) as error:
        raise MalformedEvidence(f"{what} is not strict CBOR.", step=what) from error
    if canonical != data:
        raise MalformedEvidence(f"{what} is not strict CBOR: another encoding of the same value.", step=what)
    if not isinstance(value, dict) or not keys <= value.keys() <= keys | optional:
        raise MalformedEvidence(f"{what} is not a map of exactly {', '.join(sorted(keys | optional))}.", step=what)
    return value
