"""A whole attested deployment in memory: change one thing, and see who notices."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cloister.errors import VerificationFailed
from cloister.evidence.binding import report_data
from cloister.evidence.document import Document, Item
from cloister.evidence.launch import App, LaunchConfig, launch_digest
from cloister.evidence.statement import EngineStatement, ModelStatement, Statement
from cloister.sim import Device, Measurement
from cloister.verify import Factor, Policy, Verified, verify

NOW = 1_800_000_000.0
NONCE = bytes(range(32))
OWNER = "ed25519:" + "A" * 43
OTHER_OWNER = "ed25519:" + "B" * 42 + "A"
MODEL, CONFIG, ENGINE = "11" * 32, "22" * 32, "33" * 32
MEASUREMENT = Measurement(code=f"sha256:{'44' * 32}", interpreter="cpython 3.11.7 sha256:55", engine=f"sha256:{ENGINE}")
KEY_CONFIG = b"\x00\x29" + bytes(41)

LAUNCH = LaunchConfig(
    owner_key=OWNER,
    deployment="acme-chat",
    release=1,
    app=App("llm", "66" * 32),
    models=(MODEL,),
    config_sha256=CONFIG,
)
STATEMENT = Statement(
    purpose="serve",
    aud=("https://chat.example",),
    launch_sha256=launch_digest(LAUNCH.encode()).hex(),
    iat=int(NOW),
    exp=int(NOW) + 3600,
    ohttp_keys=KEY_CONFIG * 2,
    receipt_key=bytes(32),
    engine=EngineStatement(ENGINE, "avx2"),
    models=(ModelStatement("demo", MODEL, "q8_0"),),
)


@dataclass(frozen=True)
class World:
    """`document` makes genuine evidence over whatever it is told; `hardware_launch` is what the hardware was given."""

    device: Device
    statement: Statement = STATEMENT
    launch: LaunchConfig = LAUNCH
    measurement: Measurement = MEASUREMENT
    hardware_launch: bytes | None = None
    pins: Mapping[str, Any] = field(default_factory=dict)

    def with_statement(self, **changes: Any) -> "World":
        return replace(self, statement=replace(self.statement, **changes))

    def with_launch(self, **changes: Any) -> "World":
        """Another launch config, which the statement agrees with."""
        launch = replace(self.launch, **changes)
        digest = launch_digest(launch.encode()).hex()
        return replace(self.with_statement(launch_sha256=digest), launch=launch)

    def document(self, nonce: bytes = NONCE, *, statement: bytes | None = None, bound: bytes | None = None) -> Document:
        """`statement` is transported, `bound` is what the report is over (the same, unless told otherwise)."""
        statement = self.statement.encode() if statement is None else statement
        launch = self.launch.encode()
        digest = launch_digest(launch) if self.hardware_launch is None else self.hardware_launch
        with self.device.launch(self.measurement, digest) as enclave:
            evidence = enclave.report(report_data(nonce, statement if bound is None else bound))
        return Document(
            {"statement": Item("application/json", statement), "launch": Item("application/json", launch), **evidence}
        )

    def policy(self, **pins: Any) -> Policy:
        """Everything pinned to what the world is made of, but for `pins`."""
        defaults: dict[str, Any] = {
            "deployment": "acme-chat",
            "owner_key": OWNER,
            "models": frozenset({MODEL}),
            "config": CONFIG,
            "app": LAUNCH.app.sha256,
            "platforms": ("sim",),
            "measurements": {"sim": (dict(MEASUREMENT.components()),)},
            "simulator_root": self.device.root_pem,
        }
        return Policy(**{**defaults, **self.pins, **pins})

    def verify(self, document: Document | None = None, *, nonce: bytes = NONCE, now: float = NOW) -> Verified:
        document = self.document() if document is None else document
        return verify(document, policy=self.policy(), nonce=nonce, now=now)


def replaced(document: Document, label: str, content: bytes) -> Document:
    """The same document with other bytes under one label."""
    items = dict(document.items)
    items[label] = replace(items[label], content=content)
    return Document(items)


def failures(error: VerificationFailed) -> dict[str, Factor]:
    factors = [factor for factor in error.factors if isinstance(factor, Factor)]
    return {factor.step: factor for factor in factors if factor.verdict == "fail"}


def flips(data: bytes) -> list[bytes]:
    """One flipped bit in each byte; every time another bit."""
    return [data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :] for i in range(len(data))]


def make_device(directory: Path) -> Device:
    return Device.open(directory / "sim", now=NOW)
