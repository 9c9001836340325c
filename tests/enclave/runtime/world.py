"""An owner, a bundle and an enclave's surroundings in memory: change one thing, and see who notices."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.enclave.pyapp.archives import tar

from cloister.channel.release import Context, Release, seal_release
from cloister.channel.sections import SectionSealer
from cloister.enclave.boot import EnclaveConfig
from cloister.errors import NotTrusted
from cloister.evidence.bundle import Manifest, Section, encode_head, parse_bundle_head
from cloister.evidence.document import Item, parse_document
from cloister.evidence.launch import launch_digest, parse_launch
from cloister.evidence.statement import Statement, parse_statement
from cloister.owner.deployment import launch_bytes, owner_name

CODE = """
import os
def app(environ, start_response):
    start_response("200 OK", [("content-type", "text/plain")])
    return [os.environ.get("TOKEN", "none").encode()]
"""


class Hardware:
    """An `EvidenceSource` that says what it was told."""

    platform = "sim"

    def __init__(self, launch: bytes) -> None:
        self.launch = launch

    def fix_launch(self, launch: bytes) -> None:
        if launch != self.launch:
            raise NotTrusted("another launch config")

    def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
        return {"cpu": Item("application/cbor", report_data)}


def bundle(sections: Mapping[str, bytes], **more: Any) -> tuple[bytes, Mapping[str, bytes]]:
    """The bundle's bytes and its file keys."""
    told = tuple(Section(name, hashlib.sha256(body).hexdigest(), len(body)) for name, body in sections.items())
    manifest = Manifest(**{"name": "hello", "kind": "wsgi", "entry": "main:app", "sections": told, **more})
    keys = {name: os.urandom(32) for name in sections}
    found = encode_head(manifest, os.urandom(16).hex())
    for name, body in sections.items():
        sealer, at = SectionSealer(keys[name], name, len(body)), 0
        while not sealer.ended:
            length = sealer.next_length
            out = bytearray(length + 16)
            sealer.seal_into(memoryview(body)[at : at + length], memoryview(out))
            found, at = found + bytes(out), at + length
    return found, keys


@dataclass(frozen=True)
class Owned:
    """One deployment of one app: everything its owner knows."""

    owner: Ed25519PrivateKey
    content: bytes
    keys: Mapping[str, bytes]
    config: EnclaveConfig = field(default_factory=lambda: EnclaveConfig(platform="sim", api_keys=False))
    deployment: str = "acme"
    release: int = 1
    broker_key: str | None = None

    @property
    def launch(self) -> bytes:
        return launch_bytes(
            parse_bundle_head(self.content),
            owner_key=owner_name(self.owner),
            deployment=self.deployment,
            release=self.release,
            config=self.config.encode(),
            broker_key=self.broker_key,
        )

    def write(self, path: Path) -> Path:
        path.write_bytes(self.content)
        return path

    def message(self, document: bytes, nonce: bytes, contents: Release | None = None, /, **other: Any) -> bytes:
        """The release as this owner would seal and sign it for that document. `other`: of the context, or `owner`."""
        statement_bytes = parse_document(document).items["statement"].content
        statement = parse_statement(statement_bytes)
        assert statement.provision_key is not None
        launch = parse_launch(self.launch)
        context = Context(
            deployment=launch.deployment,
            launch_sha256=launch_digest(self.launch),
            release=launch.release,
            statement_sha256=hashlib.sha256(statement_bytes).digest(),
            nonce=nonce,
        )
        owner = other.pop("owner", self.owner)
        wanted = contents or Release(time_floor=0, keys=self.keys)
        return seal_release(wanted, replace(context, **other), statement.provision_key, owner.sign, entropy=os.urandom)


def owned(sections: Mapping[str, bytes] | None = None, **more: Any) -> Owned:
    content, keys = bundle(sections or {"code": tar({"main.py": CODE})}, **more)
    return Owned(Ed25519PrivateKey.generate(), content, keys)


def statement_of(document: bytes) -> Statement:
    return parse_statement(parse_document(document).items["statement"].content)
