"""Pieces of collateral: what is asked for, what a source says to that, and what of it has been checked."""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Protocol
from urllib.parse import urlsplit

from cloister.errors import MalformedEvidence, NotTrusted

__all__ = [
    "MAX_PIECE",
    "Answer",
    "CollateralSource",
    "Key",
    "Piece",
    "Pieces",
    "check_form",
    "check_fresh",
    "refuse",
    "text_of",
]

MAX_PIECE = 512 * 1024
"""Bytes of one answer; an answer and its issuers' certificates are tens of kilobytes at most."""

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_VENDORS = MappingProxyType({"intel": "Intel", "amd": "AMD", "nvidia": "NVIDIA", "tpm": "TPM"})
_WORDS = MappingProxyType(
    {
        "pck-crl": "PCK revocation list",
        "root-crl": "root revocation list",
        "tcb-info": "TCB info",
        "tcb-info-early": "TCB info, early",
        "qe-identity": "QE identity",
        "qe-identity-early": "QE identity, early",
        "vcek": "VCEK",
        "vcek-ca": "VCEK's CA",
        "vcek-crl": "VCEK revocation list",
        "vlek": "VLEK",
        "vlek-ca": "VLEK's CA",
        "vlek-crl": "VLEK revocation list",
        "gpu-driver": "driver manifest",
        "gpu-cc-driver": "driver manifest",
        "gpu-vbios": "VBIOS manifest",
        "switch-bios": "switch manifest",
        "crl": "revocation list",
    }
)


@dataclass(frozen=True, slots=True)
class Key:
    """One piece for one platform. `vendor`, `kind` and `platform` hold lower-case letters, digits and single dashes.

    `platform`: "tdx-" or "sgx-" and the FMSPC; "tdx" or "sgx"; the CA ("processor", "platform"); AMD's product;
    product, chip and TCB version of one AMD processor; chip and driver, or board and VBIOS, of an NVIDIA device; a TPM
    list's address in base32.
    """

    vendor: str
    kind: str
    platform: str

    def __post_init__(self) -> None:
        for part in (self.vendor, self.kind, self.platform):
            if not _NAME.fullmatch(part):
                raise MalformedEvidence("This names no collateral.", step="collateral", got=ascii(part)[:64])

    @property
    def what(self) -> str:
        """In words: "Intel PCK revocation list"."""
        return f"{_VENDORS.get(self.vendor, self.vendor)} {_WORDS.get(self.kind, self.kind)}"

    @property
    def about(self) -> str:
        """The platform in words: "TDX 00906ed50000"; a chip by the first digits of its id."""
        if self.vendor == "tpm":
            return urlsplit(text_of(self.platform)).hostname or "nowhere"
        name, *rest = self.platform.split("-")
        if self.vendor == "intel":
            return " ".join((name.upper() if name in ("sgx", "tdx") else name, *rest))
        if self.vendor == "nvidia":
            return f"{name} {('.' if self.kind.endswith('-driver') else ' ').join(rest)}".upper()
        return " ".join((name.capitalize(), *(f"{part[:12]}…" for part in rest[:1])))

    def __str__(self) -> str:
        return f"{self.what} ({self.about})"


def text_of(platform: str) -> str:
    """What a platform in base32 says: of a TPM's revocation list, its address. "" for what says nothing."""
    try:
        return base64.b32decode(platform.upper() + "=" * (-len(platform) % 8)).decode("ascii")
    except ValueError:
        return ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A source's own words, none of which is believed. `chain`: the issuers as PEM, where they come beside the body."""

    body: bytes
    chain: bytes = b""


@dataclass(frozen=True, slots=True)
class Piece:
    """An answer that was checked: its signature leads to the pinned root and it is fresh.

    `issued` and `next_update` in Unix seconds. For a certificate they bound its validity. `revoked` holds the serial
    numbers of a revocation list. Whether it fits one machine's evidence is for `cloister.verify` to judge.
    """

    key: Key
    answer: Answer
    issued: float
    next_update: float
    revoked: frozenset[int] = frozenset()


class CollateralSource(Protocol):
    """Somewhere that collateral may come from; `name` is shown to people."""

    @property
    def name(self) -> str: ...

    def get(self, key: Key) -> Answer | None:
        """What it has under this key; None when nothing. Checks nothing. Raises: Unreachable, Malformed."""
        ...


Pieces = Mapping[str, Piece]
"""Kind -> piece: what was found before, and the next one is checked against."""


def refuse(key: Key, message: str, *, expected: str = "", got: str = "", hint: str = "") -> NotTrusted:
    """For `raise refuse(…) from …`."""
    hint = hint or "Whoever answered is not the vendor, or the answer was changed on the way. Nothing was kept."
    return NotTrusted(message, step=f"collateral.{key.kind}", expected=expected or None, got=got or None, hint=hint)


def check_form(key: Key, form: re.Pattern[str]) -> None:
    """Raises: MalformedEvidence for a key that `form` ("kind platform") does not know, as only a file's name could be."""
    if not form.fullmatch(f"{key.kind} {key.platform}"):
        raise MalformedEvidence(f"{key} is no collateral that is known here.", step="collateral")


def check_fresh(key: Key, issued: float, next_update: float, now: float) -> None:
    """Raises: NotTrusted unless it was issued before now, and its next issue is still to come."""
    if not next_update >= now:
        hint = "The vendor has published a newer one: fetch it with `cloister collateral fetch`."
        raise refuse(key, f"{key} is out of date.", expected=f"valid on {_day(now)}", got=_day(next_update), hint=hint)
    if not issued <= now:
        hint = "It is newer than the time it is judged at: a clock is wrong, or an old document is judged."
        raise refuse(
            key, f"{key} is not issued yet.", expected=f"issued before {_day(now)}", got=_day(issued), hint=hint
        )


def _day(at: float) -> str:
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return "never"
