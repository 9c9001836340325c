"""What an enclave says about itself: exact UTF-8 JSON bytes, whose SHA-256 stands in the hardware's report.

The parsed `Statement` is for reading. Hash and transport the bytes you were given: `encode` of a parsed statement may
differ from them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from cloister.evidence.strict_json import Fields, b64url, load_object

__all__ = ["INSECURE_NAMES", "MAX_STATEMENT", "EngineStatement", "ModelStatement", "Statement", "parse_statement"]

MAX_STATEMENT = 64 * 1024
MAX_KEY_CONFIGS = 16 * 1024

INSECURE_NAMES = frozenset({"api-keys-off", "app-unconfined", "ehbp", "padding-off", "plaintext", "tls", "upstream"})
"""Every weakened setting that a statement may name. A verifier refuses any other."""

Purpose = Literal["serve", "provision", "key-join"]


@dataclass(frozen=True, slots=True)
class EngineStatement:
    """`sha256` (hex) over the engine's libraries (`evidence.manifest`); `variant` is the rung that runs."""

    sha256: str
    variant: str


@dataclass(frozen=True, slots=True)
class ModelStatement:
    """`sha256` (hex) of the bytes that were loaded; `lineage_sha256` of the record of where they come from."""

    name: str
    sha256: str
    quantization: str
    lineage_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """Digests are 64 lower-case hexadecimal digits, times whole Unix seconds, keys raw bytes.

    `aud` holds origins, a hint only. `ohttp_keys` is the body of `application/ohttp-keys` (empty unless serving).
    `ehbp_key` is an X25519 key, for EHBP and nothing else; None where that is off.
    `tls_spki` is the SHA-256 of the SubjectPublicKeyInfo of the key that ends TLS inside; None where that is off, and then
    `aud` is empty today. `insecure` names weakened settings.
    """

    purpose: Purpose
    aud: tuple[str, ...]
    launch_sha256: str
    iat: int
    exp: int
    ohttp_keys: bytes
    receipt_key: bytes
    engine: EngineStatement
    models: tuple[ModelStatement, ...]
    egress: tuple[str, ...] = ()
    code: Literal["open", "sealed"] = "open"
    key_scope: Literal["replica", "group"] = "replica"
    group_policy_sha256: str | None = None
    ehbp_key: bytes | None = None
    provision_key: bytes | None = None
    tls_spki: str | None = None
    insecure: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """Made once by the enclave, then transported as it is. Keys that are absent are left out."""
        members = {
            "v": 1,
            "purpose": self.purpose,
            "aud": list(self.aud),
            "launch_sha256": self.launch_sha256,
            "iat": self.iat,
            "exp": self.exp,
            "ohttp_keys": b64url(self.ohttp_keys),
            "ehbp_key": _optional_key(self.ehbp_key),
            "provision_key": _optional_key(self.provision_key),
            "tls_spki": self.tls_spki,
            "receipt_key": b64url(self.receipt_key),
            "engine": {"sha256": self.engine.sha256, "variant": self.engine.variant},
            "models": [_model_members(model) for model in self.models],
            "egress": list(self.egress),
            "code": self.code,
            "key_scope": self.key_scope,
            "group_policy_sha256": self.group_policy_sha256,
            "insecure": list(self.insecure),
        }
        return json.dumps(_present(members), separators=(",", ":"), ensure_ascii=False).encode()


def _optional_key(key: bytes | None) -> str | None:
    return None if key is None else b64url(key)


def _present(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


def _model_members(model: ModelStatement) -> dict[str, Any]:
    return _present(
        {
            "name": model.name,
            "sha256": model.sha256,
            "quantization": model.quantization,
            "lineage_sha256": model.lineage_sha256,
        }
    )


def _parse_engine(value: object) -> EngineStatement:
    fields = Fields(value, what="statement.engine")
    engine = EngineStatement(sha256=fields.sha256("sha256"), variant=fields.text("variant", max_length=64))
    fields.end()
    return engine


def _parse_model(value: object) -> ModelStatement:
    fields = Fields(value, what="statement.models")
    model = ModelStatement(
        name=fields.text("name"),
        sha256=fields.sha256("sha256"),
        quantization=fields.text("quantization", max_length=64),
        lineage_sha256=fields.sha256("lineage_sha256") if fields.has("lineage_sha256") else None,
    )
    fields.end()
    return model


def _x25519(fields: Fields, name: str) -> bytes | None:
    return fields.binary(name, low=32, high=32) if fields.has(name) else None


def parse_statement(data: bytes) -> Statement:
    """Well-formedness only: every member's type and bounds. What it claims is judged by `verify`.

    Raises: MalformedEvidence for unknown, repeated or missing keys, wrong types, values out of bounds.
    """
    fields = Fields(load_object(data, max_bytes=MAX_STATEMENT, what="statement"), what="statement")
    fields.integer("v", low=1, high=1)
    statement = Statement(
        purpose=cast("Purpose", fields.one_of("purpose", ("serve", "provision", "key-join"))),
        aud=fields.texts("aud"),
        launch_sha256=fields.sha256("launch_sha256"),
        iat=fields.integer("iat"),
        exp=fields.integer("exp"),
        ohttp_keys=fields.binary("ohttp_keys", low=0, high=MAX_KEY_CONFIGS),
        receipt_key=fields.binary("receipt_key", low=32, high=32),
        engine=_parse_engine(fields.take("engine")),
        models=tuple(_parse_model(value) for value in fields.items("models")),
        egress=fields.texts("egress", max_items=64),
        code=cast("Literal['open', 'sealed']", fields.one_of("code", ("open", "sealed"))),
        key_scope=cast("Literal['replica', 'group']", fields.one_of("key_scope", ("replica", "group"))),
        group_policy_sha256=fields.sha256("group_policy_sha256") if fields.has("group_policy_sha256") else None,
        ehbp_key=_x25519(fields, "ehbp_key"),
        provision_key=fields.binary("provision_key", low=32, high=2048) if fields.has("provision_key") else None,
        tls_spki=fields.sha256("tls_spki") if fields.has("tls_spki") else None,
        insecure=fields.texts("insecure", max_length=64),
    )
    fields.end()
    return statement
