"""The launch config: what makes a deployment *this* one, fixed before start, its digest in the hardware's own field.

Anyone can boot the genuine image under their own owner key; its measurement matches. The digest of these exact bytes
does not. They are hashed as transported: `encode` of a parsed config may differ from them.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from cloister.evidence.strict_json import Fields, load_object

__all__ = [
    "MAX_LAUNCH",
    "NO_LOGS",
    "OWNER_KEY",
    "PUBLIC",
    "App",
    "LaunchConfig",
    "built_in",
    "launch_digest",
    "parse_launch",
]

MAX_LAUNCH = 64 * 1024

OWNER_KEY = re.compile(r"ed25519:[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")
"""`ed25519:` and 32 bytes in base64url without padding (the last character's spare bits are zero)."""

NO_LOGS, PUBLIC = "none", "public"
"""What leaves in logs: nothing of the app's; or what it writes to its standard output and error, bounded, for anybody to read."""

_DEPLOYMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_WORD = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class App:
    """`kind` is a word such as "llm"; `sha256` (hex) of the app's package, or of its configuration when built in."""

    kind: str
    sha256: str


def built_in(config_sha256: str) -> App:
    """The app of a launch config without a bundle. No manifest is a configuration, so no sealed app's digest is one's."""
    return App("llm", config_sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """`models` are SHA-256 digests (hex) of every model that may be loaded; `release` counts the owner's releases.

    `egress` lists where the enclave may connect to ([] = nowhere); `logs` is a word for what leaves in logs: `NO_LOGS` or
    `PUBLIC`; any other is refused by whoever verifies.
    """

    owner_key: str
    deployment: str
    release: int
    app: App
    models: tuple[str, ...]
    config_sha256: str
    egress: tuple[str, ...] = ()
    logs: str = NO_LOGS
    broker_key: str | None = None

    def encode(self) -> bytes:
        """Made once by whoever deploys, then transported as it is."""
        members: dict[str, Any] = {
            "v": 1,
            "owner_key": self.owner_key,
            "deployment": self.deployment,
            "release": self.release,
            "app": {"kind": self.app.kind, "sha256": self.app.sha256},
            "models": list(self.models),
            "config_sha256": self.config_sha256,
            "egress": list(self.egress),
            "logs": self.logs,
        }
        if self.broker_key is not None:
            members["broker_key"] = self.broker_key
        return json.dumps(members, separators=(",", ":"), ensure_ascii=False).encode()


def launch_digest(data: bytes) -> bytes:
    """SHA-256 of the exact bytes: 32 bytes, `launch_sha256`."""
    return hashlib.sha256(data).digest()


def _parse_app(value: object) -> App:
    fields = Fields(value, what="launch.app")
    app = App(kind=fields.matching("kind", _WORD, "a lower-case word"), sha256=fields.sha256("sha256"))
    fields.end()
    return app


def _key(fields: Fields, name: str) -> str:
    return fields.matching(name, OWNER_KEY, "ed25519: and 43 characters of base64url")


def parse_launch(data: bytes) -> LaunchConfig:
    """Well-formedness only.

    Raises: MalformedEvidence for unknown, repeated or missing keys, wrong types, values out of bounds.
    """
    fields = Fields(load_object(data, max_bytes=MAX_LAUNCH, what="launch"), what="launch")
    fields.integer("v", low=1, high=1)
    launch = LaunchConfig(
        owner_key=_key(fields, "owner_key"),
        deployment=fields.matching("deployment", _DEPLOYMENT, "1 to 63 letters, digits, dots, dashes"),
        release=fields.integer("release"),
        app=_parse_app(fields.take("app")),
        models=fields.sha256s("models"),
        config_sha256=fields.sha256("config_sha256"),
        egress=fields.texts("egress", max_items=64),
        logs=fields.matching("logs", _WORD, "a lower-case word"),
        broker_key=_key(fields, "broker_key") if fields.has("broker_key") else None,
    )
    fields.end()
    return launch
