"""The attestation document: a CMW JSON collection of labelled evidence (RFC 9999; PROTOCOL, "Attestation document")."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cloister.errors import MalformedEvidence
from cloister.evidence.strict_json import b64url, from_b64url, load_object

__all__ = ["MAX_DOCUMENT", "MEDIA_TYPE", "Document", "Item", "gpu_labels", "parse_document"]

MEDIA_TYPE = "application/cmw+json"

MAX_ITEM = 64 * 1024
MAX_LOG = 1024 * 1024
MAX_DOCUMENT = 4 * 1024 * 1024

_LABEL = re.compile(r"statement|launch|cpu|eventlog|runtime|tpm|endorsements|provenance|gpu-(?:0|[1-9][0-9]?)")
_MEDIA_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,126}/[a-z0-9][a-z0-9!#$&^_.+-]{0,126}")
_LARGE = frozenset({"eventlog", "endorsements", "provenance"})
"""Logs, revocation lists and bundles grow with the platform's history; everything else fits in 64 KiB."""


@dataclass(frozen=True, slots=True)
class Item:
    """One CMW record. `indicator` is CMW's bit set (reference values 1, endorsements 2, evidence 4, results 8)."""

    media_type: str
    content: bytes
    indicator: int | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """Label -> item, in transported order. Says nothing about what the items hold, nor whether any of it is true."""

    items: Mapping[str, Item]

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", MappingProxyType(dict(self.items)))
        for label, item in self.items.items():
            _check(label, item)

    def encode(self) -> bytes:
        """The bytes `parse_document` reads. Raises: MalformedEvidence when the document is over 4 MiB."""
        records = {label: _record(item) for label, item in self.items.items()}
        data = json.dumps(records, separators=(",", ":")).encode()
        if len(data) > MAX_DOCUMENT:
            raise MalformedEvidence("The attestation document is over 4 MiB.", step="document")
        return data


def gpu_labels(document: Document) -> tuple[str, ...]:
    """`gpu-0`, `gpu-1`, … as they stand in the document, by number."""
    labels = [label for label in document.items if label.startswith("gpu-")]
    return tuple(sorted(labels, key=lambda label: int(label.removeprefix("gpu-"))))


def parse_document(data: bytes) -> Document:
    """Total and bounded: any bytes give a `Document` or MalformedEvidence.

    Refused: more than 4 MiB; an item over 64 KiB (event log, endorsements, provenance: 1 MiB); an unknown or repeated
    label; a record that is not `["media/type", base64url]` or `["media/type", base64url, indicator]`.
    """
    collection = load_object(data, max_bytes=MAX_DOCUMENT, what="document")
    return Document({label: _item(label, record) for label, record in collection.items()})


def _record(item: Item) -> list[str | int]:
    record: list[str | int] = [item.media_type, b64url(item.content)]
    if item.indicator is not None:
        record.append(item.indicator)
    return record


def _item(label: str, record: object) -> Item:
    if not isinstance(record, list) or len(record) not in (2, 3):
        raise MalformedEvidence("A record of the document is not [type, value, indicator].", step=_step(label))
    media_type, content, *rest = record
    indicator = rest[0] if rest else None
    if not isinstance(media_type, str) or not isinstance(content, str) or (rest and type(indicator) is not int):
        raise MalformedEvidence("A record of the document has members of wrong types.", step=_step(label))
    return Item(media_type, from_b64url(content, what=_step(label)), indicator)


def _step(label: str) -> str:
    return f"document.{ascii(label)[1:33]}"


def _check(label: str, item: Item) -> None:
    if not _LABEL.fullmatch(label):
        raise MalformedEvidence(f"The document has an unknown label: {ascii(label)[:40]}.", step="document")
    if not _MEDIA_TYPE.fullmatch(item.media_type):
        raise MalformedEvidence(f"The media type of {label} is not one.", step=f"document.{label}")
    limit = MAX_LOG if label in _LARGE else MAX_ITEM
    if len(item.content) > limit:
        raise MalformedEvidence(
            f"{label} is too long.", step=f"document.{label}", expected=f"{limit} bytes", got=str(len(item.content))
        )
    if item.indicator is not None and not 0 < item.indicator < 16:
        raise MalformedEvidence(f"The indicator of {label} is not one.", step=f"document.{label}")
