"""The enclave's own attestation document: a statement over its current keys, and fresh evidence that binds it."""

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.channel.bhttp import Request
from cloister.channel.keys import KeyRing
from cloister.enclave.attest import EvidenceSource, GpuSource
from cloister.enclave.gateway.certificate import TlsKey
from cloister.enclave.gateway.receipts import PendingReceipt, asked_for
from cloister.enclave.llm.engine import EngineInfo
from cloister.errors import CloisterError, NotTrusted
from cloister.evidence.binding import gpu_nonce, report_data
from cloister.evidence.document import Document, Item
from cloister.evidence.endorsements import AMD_CHAIN, Endorsements, parse_endorsements
from cloister.evidence.endorsements import MEDIA_TYPE as ENDORSEMENTS_MEDIA_TYPE
from cloister.evidence.launch import LaunchConfig, parse_launch
from cloister.evidence.receipt import SALT_LENGTH
from cloister.evidence.statement import EngineStatement, ModelStatement, Statement

__all__ = ["Attestation", "Runs", "Witness", "check_launch"]


def check_launch(launch: bytes, config: bytes, source: EvidenceSource) -> LaunchConfig:
    """The enclave compares its own report first: what it was told must be what stands in hardware.

    Raises NotTrusted when the hardware's field holds another launch config or this one names another config.
    """
    parsed = parse_launch(launch)
    if parsed.config_sha256 != hashlib.sha256(config).hexdigest():
        raise NotTrusted("The config handed over is not the one named in the launch config.")
    source.fix_launch(launch)
    return parsed


@dataclass(frozen=True, slots=True)
class Runs:
    """What runs here where it is not our engine with one model: the engine's libraries that lie here, and the models."""

    engine: EngineStatement
    models: tuple[ModelStatement, ...] = ()


@dataclass(frozen=True, slots=True)
class Witness:
    """What makes evidence over a statement: the hardware, GPUs beside it, and what the host shipped for verifiers."""

    source: EvidenceSource
    launch: bytes
    gpus: GpuSource | None = None
    endorsements: Callable[[], bytes] = bytes

    async def document(self, nonce: bytes, statement: bytes) -> bytes:
        """The encoded CMW collection over `nonce` (0 or 32 bytes) and exactly these bytes of a statement."""
        items = {
            "statement": Item("application/json", statement),
            "launch": Item("application/json", self.launch),
            **await asyncio.to_thread(self._evidence, nonce, statement),
        }
        return Document(items).encode()

    def _evidence(self, nonce: bytes, statement: bytes) -> dict[str, Item]:
        """The GPUs' first, since the CPU's covers it."""
        gpus = {} if self.gpus is None else dict(self.gpus.collect(gpu_nonce(nonce, statement)))
        bound = report_data(nonce, statement, [item.content for item in gpus.values()])
        items = {**self.source.collect(bound, nonce=nonce), **gpus}
        if shipped := self.endorsements():
            items["endorsements"] = _endorsed(items.get("endorsements"), shipped)
        return items


@dataclass(slots=True)
class Attestation:
    """`document(nonce)` makes evidence anew each time; the statement lives as long as the keys it names, and as the
    engine that `info` tells of: one that had to be restarted may run as another variant.

    `endorsements` gives what the host shipped for verifiers, b"" for nothing: it completes the driver's own, and a client
    believes neither before it has judged them. `lineage_sha256` (hex): of the record that came with the model. `aud`: origins
    under which its users find it. `egress` as
    the launch config has it; `code` "sealed" where nobody but the owner can read what runs. `tls` is replaced in time too.
    `group_policy_sha256` (hex): of the policy of the key group whose ring this is; None for a ring of this replica's own."""

    source: EvidenceSource
    ring: KeyRing
    launch: bytes
    info: Callable[[], EngineInfo | Runs]
    insecure: tuple[str, ...]
    gpus: GpuSource | None = None
    lineage_sha256: str | None = None
    endorsements: Callable[[], bytes] = bytes
    aud: tuple[str, ...] = ()
    egress: tuple[str, ...] = ()
    code: Literal["open", "sealed"] = "open"
    tls: TlsKey | None = None
    group_policy_sha256: str | None = None
    clock: Callable[[], float] = time.time
    receipt_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    _statement: bytes = field(default=b"", init=False)
    _made_for: tuple[bytes, EngineInfo | Runs, str | None] | None = field(default=None, init=False)
    _valid: dict[str, Statement] = field(default_factory=dict, init=False)

    async def document(self, nonce: bytes) -> bytes:
        """The encoded CMW collection over `nonce` (0 or 32 bytes)."""
        witness = Witness(self.source, self.launch, self.gpus, self.endorsements)
        return await witness.document(nonce, self._current())

    def receipt(self, request: Request) -> PendingReceipt | None:
        """Begins the receipt that a request asks for: of a statement that is valid, and true of the engine that runs now.
        None where none is asked for, or of another statement, or while the engine is away."""
        if (digest := asked_for(request.headers)) is None:
            return None
        with contextlib.suppress(CloisterError):
            self._current()
        now = self.clock()
        statement = self._valid.get(digest)
        if statement is None or statement.exp < now:
            return None
        return PendingReceipt(
            request.content,
            os.urandom(SALT_LENGTH),
            statement_sha256=digest,
            models=tuple(model.sha256 for model in statement.models),
            iat=int(now),
            sign=self.receipt_key.sign,
        )

    def _current(self) -> bytes:
        now = self.clock()
        self.ring.rotate(now)
        made_for = self.ring.ohttp_keys, self.info(), self._tls_spki(now)
        if made_for != self._made_for:
            statement = self._make(now, made_for[1])
            self._statement = statement.encode()
            same_engine = self._made_for is not None and self._made_for[1] == made_for[1]
            kept = self._valid.items() if same_engine else ()
            self._valid = {digest: old for digest, old in kept if old.exp > now}
            self._valid[hashlib.sha256(self._statement).hexdigest()] = statement
            self._made_for = made_for
        return self._statement

    def _tls_spki(self, now: float) -> str | None:
        if self.tls is None:
            return None
        self.tls.rotate(now)
        return self.tls.spki_sha256

    def _runs(self, info: EngineInfo | Runs) -> Runs:
        if isinstance(info, Runs):
            return info
        model = ModelStatement(info.model.name, info.model.sha256, info.model.quantization, self.lineage_sha256)
        return Runs(EngineStatement(info.sha256, info.variant), (model,))

    def _make(self, now: float, info: EngineInfo | Runs) -> Statement:
        runs = self._runs(info)
        receipt = self.receipt_key.public_key().public_bytes_raw()
        return Statement(
            purpose="serve",
            aud=tuple(dict.fromkeys((*self.aud, *(() if self.tls is None else self.tls.origins)))),
            launch_sha256=hashlib.sha256(self.launch).hexdigest(),
            iat=int(now),
            exp=int(self.ring.expires_at),
            ohttp_keys=self.ring.ohttp_keys,
            receipt_key=receipt,
            ehbp_key=self.ring.ehbp_key,
            tls_spki=None if self.tls is None else self.tls.spki_sha256,
            engine=runs.engine,
            models=runs.models,
            egress=self.egress,
            code=self.code,
            key_scope="replica" if self.group_policy_sha256 is None else "group",
            group_policy_sha256=self.group_policy_sha256,
            insecure=self.insecure,
        )


def _endorsed(driver: Item | None, shipped: bytes) -> Item:
    """The driver's certificates of this very chip, and all else as the operator shipped it: a host's table holds no
    revocation list, or an old one. A simulator's own are of another kind, and complete."""
    if driver is None:
        return Item(ENDORSEMENTS_MEDIA_TYPE, shipped)
    if driver.media_type != ENDORSEMENTS_MEDIA_TYPE:
        return driver
    own, given = parse_endorsements(driver.content), parse_endorsements(shipped)
    return Endorsements(
        intel=given.intel or own.intel,
        amd=own.amd if len(own.amd) == AMD_CHAIN else given.amd or own.amd,
        amd_crl=given.amd_crl or own.amd_crl,
        tpm_crls=given.tpm_crls or own.tpm_crls,
        rims=given.rims or own.rims,
    ).item()
