"""A bundle's plaintext head: what is in it, and where. Ciphertext follows, section after section.

    bundle   = "cloister-bundle" || 00 || u32(len envelope) || envelope || u32(len manifest) || manifest || sections
    envelope = {"v":1,"id":hex32,"chunk":1048576}                      random for every packaging
    manifest = {"v":1,"name":…,"kind":…,…,"sections":[…]}              the same bytes for the same app

The manifest's SHA-256 is what a launch config names as its app. It holds the digest of every section's plaintext, and no
secret. The envelope only tells one packaging from another: nothing rests on it. Pure: callers read and write the files.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from cloister.errors import MalformedEvidence
from cloister.evidence.launch import NO_LOGS, PUBLIC
from cloister.evidence.strict_json import Fields, load_object

__all__ = [
    "CHUNK",
    "DOMAIN",
    "ENTRY",
    "HEALTH",
    "MAX_HEAD",
    "NAME",
    "SECRET_NAME",
    "SECTIONS",
    "BundleHead",
    "Kind",
    "Manifest",
    "Placement",
    "Resources",
    "Section",
    "encode_head",
    "parse_bundle_head",
    "parse_manifest",
]

Kind: TypeAlias = Literal["llm", "asgi", "wsgi"]
KINDS: tuple[Kind, ...] = ("llm", "asgi", "wsgi")

SECTIONS = ("code", "requirements", "model")
"""In this order: the app's folder as a tar, its dependencies as a tar of wheels, a model file as it is."""

MAX_MANIFEST = 64 * 1024
MAX_ENVELOPE = 4 * 1024
_MAGIC = b"cloister-bundle\0"
MAX_HEAD = len(_MAGIC) + 8 + MAX_ENVELOPE + MAX_MANIFEST
"""Bytes within which a head ends, if there is one."""

CHUNK = 1 << 20
"""Bytes of plaintext in every chunk of a section but its last."""

_TAG = 16
_MAX_SECTION = 1 << 42

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
SECRET_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_ID = re.compile(r"[0-9a-f]{32}")
ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
HEALTH = re.compile(r"/[!-~]{0,255}")
DOMAIN = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.){1,16}[a-z]{2,63}")
_PYTHON = re.compile(r"3\.[0-9]{1,2}")


@dataclass(frozen=True, slots=True)
class Section:
    """`sha256` (hex) and `size` (bytes) of the plaintext."""

    name: str
    sha256: str
    size: int

    @property
    def sealed_size(self) -> int:
        """Bytes in the bundle: each chunk of 1 MiB, and the last, carries a tag."""
        return self.size + _TAG * max(1, -(-self.size // CHUNK))


@dataclass(frozen=True, slots=True)
class Resources:
    """What the app asks for: `memory` in MiB, `cores`, and of a model `context` in tokens; None: whatever there is."""

    memory: int | None = None
    cores: int | None = None
    context: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`entry` is `module:variable`, "" for the built-in app. `model`: what the model is called, "" without one.

    `health`: the path inside that answers 2xx when the app can work, "" for none. `python`: the minor version that the
    requirements were chosen for, "" without any. `secrets` are names; `egress` is where the app may connect to; `logs` is what
    leaves of its own words: `NO_LOGS`, which is not written, or `PUBLIC`. `domain`: the name under which its users find it, ""
    for none.
    """

    name: str
    kind: Kind
    sections: tuple[Section, ...]
    entry: str = ""
    model: str = ""
    health: str = ""
    python: str = ""
    secrets: tuple[str, ...] = ()
    egress: tuple[str, ...] = ()
    logs: str = NO_LOGS
    domain: str = ""
    resources: Resources = Resources()

    def encode(self) -> bytes:
        """The same bytes for the same app, whoever packages it, and whenever."""
        resources = {
            name: value
            for name in ("memory", "cores", "context")
            if (value := getattr(self.resources, name)) is not None
        }
        members: dict[str, Any] = {
            "v": 1,
            "name": self.name,
            "kind": self.kind,
            "entry": self.entry,
            "model": self.model,
            "health": self.health,
            "python": self.python,
            "secrets": list(self.secrets),
            "egress": list(self.egress),
            "logs": "" if self.logs == NO_LOGS else self.logs,
            "domain": self.domain,
            "resources": resources,
            "sections": [{"name": one.name, "sha256": one.sha256, "size": one.size} for one in self.sections],
        }
        present = {name: value for name, value in members.items() if value != "" or name in ("name", "kind")}
        return json.dumps(present, separators=(",", ":"), ensure_ascii=False).encode()

    @property
    def origins(self) -> tuple[str, ...]:
        """Where its users find it, for the statement."""
        return (f"https://{self.domain}",) if self.domain else ()

    @property
    def sha256(self) -> str:
        """What the launch config names: SHA-256 (hex) of `encode()`."""
        return hashlib.sha256(self.encode()).hexdigest()

    @property
    def models(self) -> tuple[str, ...]:
        """The digests (hex) that the launch config names as its models."""
        return tuple(one.sha256 for one in self.sections if one.name == "model")

    def section(self, name: str) -> Section | None:
        return next((one for one in self.sections if one.name == name), None)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a section's ciphertext lies in the bundle: `offset` and `length` in bytes."""

    section: Section
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class BundleHead:
    """`manifest_bytes` are the exact ones that stand there; `id` (32 hexadecimal digits) names this packaging; `length` in
    bytes, where the ciphertext begins."""

    manifest: Manifest
    manifest_bytes: bytes
    id: str
    length: int

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the manifest: what the launch config must name."""
        return hashlib.sha256(self.manifest_bytes).hexdigest()

    @property
    def placements(self) -> tuple[Placement, ...]:
        offset = self.length
        found = []
        for section in self.manifest.sections:
            found.append(Placement(section, offset, section.sealed_size))
            offset += section.sealed_size
        return tuple(found)

    @property
    def total(self) -> int:
        """Bytes of the whole bundle."""
        return self.length + sum(section.sealed_size for section in self.manifest.sections)


def encode_head(manifest: Manifest, bundle_id: str) -> bytes:
    envelope = json.dumps({"v": 1, "id": bundle_id, "chunk": CHUNK}, separators=(",", ":")).encode()
    body = manifest.encode()
    return _MAGIC + len(envelope).to_bytes(4, "big") + envelope + len(body).to_bytes(4, "big") + body


def parse_bundle_head(data: bytes) -> BundleHead:
    """From a bundle's beginning (`MAX_HEAD` bytes, or all there are); what follows the head is not looked at.

    Does not check that the digests are true, nor that the ciphertext is there: `BundleHead.total` says how long the
    bundle must be.

    Raises: MalformedEvidence, also when the manifest is not in its one spelling.
    """
    if not data.startswith(_MAGIC):
        raise MalformedEvidence("This is not a cloister bundle.", step="bundle", hint="`cloister package` makes one.")
    at = len(_MAGIC)
    envelope, at = _framed(data, at, MAX_ENVELOPE)
    body, at = _framed(data, at, MAX_MANIFEST)
    fields = Fields(load_object(envelope, max_bytes=MAX_ENVELOPE, what="bundle"), what="bundle")
    fields.integer("v", low=1, high=1)
    bundle_id = fields.matching("id", _ID, "32 lower-case hexadecimal digits")
    fields.integer("chunk", low=CHUNK, high=CHUNK)
    fields.end()
    return BundleHead(parse_manifest(body), body, bundle_id, at)


def _framed(data: bytes, at: int, most: int) -> tuple[bytes, int]:
    length = int.from_bytes(data[at : at + 4], "big")
    end = at + 4 + length
    if length > most or end > len(data):
        raise MalformedEvidence("The bundle's head is cut off, or too long.", step="bundle")
    return data[at + 4 : end], end


def parse_manifest(data: bytes) -> Manifest:
    """Raises: MalformedEvidence for unknown, repeated or missing members, wrong types, another spelling than the one."""
    fields = Fields(load_object(data, max_bytes=MAX_MANIFEST, what="manifest"), what="manifest")
    fields.integer("v", low=1, high=1)
    manifest = Manifest(
        name=fields.matching("name", NAME, "1 to 63 lower-case letters, digits, dashes"),
        kind=cast("Kind", fields.one_of("kind", KINDS)),
        entry=_optional(fields, "entry", ENTRY, "module:variable"),
        model=fields.text("model", max_length=128) if fields.has("model") else "",
        health=_optional(fields, "health", HEALTH, "a path"),
        python=_optional(fields, "python", _PYTHON, "a minor version of Python 3"),
        secrets=fields.texts("secrets", max_items=64, max_length=64),
        egress=fields.texts("egress", max_items=64),
        logs=fields.one_of("logs", (PUBLIC,)) if fields.has("logs") else NO_LOGS,
        domain=_optional(fields, "domain", DOMAIN, "a domain name"),
        resources=_parse_resources(fields.take("resources")),
        sections=tuple(_parse_section(value) for value in fields.items("sections", max_items=len(SECTIONS))),
    )
    fields.end()
    _check(manifest)
    if manifest.encode() != data:
        raise MalformedEvidence("The manifest is not in its one spelling.", step="manifest")
    return manifest


def _optional(fields: Fields, name: str, pattern: re.Pattern[str], expected: str) -> str:
    return fields.matching(name, pattern, expected) if fields.has(name) else ""


def _parse_resources(value: object) -> Resources:
    fields = Fields(value, what="manifest.resources")
    found = Resources(
        memory=fields.integer("memory", low=1, high=1 << 24) if fields.has("memory") else None,
        cores=fields.integer("cores", low=1, high=1024) if fields.has("cores") else None,
        context=fields.integer("context", low=64, high=1 << 24) if fields.has("context") else None,
    )
    fields.end()
    return found


def _parse_section(value: object) -> Section:
    fields = Fields(value, what="manifest.sections")
    section = Section(
        name=fields.one_of("name", SECTIONS),
        sha256=fields.sha256("sha256"),
        size=fields.integer("size", high=_MAX_SECTION),
    )
    fields.end()
    return section


def _check(manifest: Manifest) -> None:
    """What members say about each other."""
    names = [section.name for section in manifest.sections]
    needed = {"model"} if manifest.kind == "llm" else {"code"}
    wrong = (
        names != [name for name in SECTIONS if name in names]
        or not needed <= set(names)
        or (manifest.kind == "llm" and set(names) != needed)
        or (manifest.kind != "llm") != bool(manifest.entry)
        or ("model" in names) != bool(manifest.model)
        or ("requirements" in names) != bool(manifest.python)
        or (manifest.kind == "llm" and manifest.logs != NO_LOGS)
        or not all(SECRET_NAME.fullmatch(name) for name in manifest.secrets)
    )
    if wrong:
        raise MalformedEvidence("The manifest's members contradict each other.", step="manifest")
