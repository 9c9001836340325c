"""One release of a deployment: its number, and the launch config that the hardware will hold."""

import base64
import hashlib
import json
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from filelock import FileLock

from cloister import private_file
from cloister.errors import WrongUse
from cloister.evidence.bundle import BundleHead
from cloister.evidence.launch import App, LaunchConfig

__all__ = ["launch_bytes", "next_release", "owner_name"]


def owner_name(key: Ed25519PrivateKey) -> str:
    """As it stands in a launch config."""
    return "ed25519:" + base64.urlsafe_b64encode(key.public_key().public_bytes_raw()).rstrip(b"=").decode()


def launch_bytes(
    head: BundleHead,
    *,
    owner_key: str,
    deployment: str,
    release: int,
    config: bytes,
    broker_key: str | None = None,
) -> bytes:
    """For a bundle. `config`: the exact bytes of the enclave's configuration. `broker_key`: who else may release to it."""
    return LaunchConfig(
        owner_key=owner_key,
        deployment=deployment,
        release=release,
        app=App(head.manifest.kind, head.sha256),
        models=head.manifest.models,
        config_sha256=hashlib.sha256(config).hexdigest(),
        egress=head.manifest.egress,
        logs=head.manifest.logs,
        broker_key=broker_key,
    ).encode()


def next_release(state: Path, deployment: str) -> int:
    """One more than ever before on this machine; written down before anybody hears of it. Several processes at once get
    different ones. Raises: WrongUse."""
    path = state / "releases.json"
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(path.with_name("releases.lock")):
            numbers = json.loads(path.read_bytes()) if path.exists() else {}
            number = int(numbers.get(deployment, 0)) + 1
            private_file.write(path, json.dumps({**numbers, deployment: number}).encode())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        hint = "If it is damaged, write into it the highest number that was deployed."
        raise WrongUse(f"{path} cannot be read and written.", step="release", hint=hint) from error
    return number
