"""What an owner's machine knows of a deployment: what was launched, the policy that pins it, and what to release to it.

A record of each rests in the owner's state folder, so that `cloister restart` can release anew: the launch config, the
bundle's head and where the app's folder is. It holds no key and no secret.
"""

import base64
import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cloister.channel.release import ApiKeyHash, Release
from cloister.cli import image_gramine, output
from cloister.cli.keys import read_keys
from cloister.cli.local import Plan, owner_key, policy_for, state_directory, write_root
from cloister.cli.package import model_of, pack
from cloister.cli.policy_file import load_policy, to_toml, write_file
from cloister.cli.sealed import config_for
from cloister.cli.trust import configured_signers
from cloister.enclave.llm.llama.library import library_dir
from cloister.errors import MalformedEvidence, WrongUse
from cloister.evidence.bundle import MAX_HEAD, NAME, BundleHead, parse_bundle_head
from cloister.evidence.launch import OWNER_KEY, LaunchConfig, built_in, parse_launch
from cloister.evidence.simulated import PLATFORM
from cloister.models.download import resolve
from cloister.owner import filekeys
from cloister.owner import secrets as secret_file
from cloister.owner.appfile import AppFile, read_appfile
from cloister.owner.deployment import launch_bytes, next_release, owner_name
from cloister.owner.filekeys import write_private
from cloister.owner.package import manifest_of
from cloister.owner.provision import contents
from cloister.sim import Device, measure
from cloister.verify import Policy

__all__ = [
    "Deployment",
    "Wishes",
    "load_record",
    "prepare",
    "prepare_public",
    "release_for",
    "save_record",
    "write_policy",
]

_UNCONFINED = "app-unconfined"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """The options of `cloister deploy` that decide what is launched. "" and None: as `cloister.toml` says."""

    name: str = ""
    platform: str = ""
    policy: Path | None = None
    bundle: Path | None = None
    api_keys: Path | None = None
    broker: str = ""
    tls: bool = False


_OF_SEALED_APPS = ("policy", "bundle", "api_keys", "broker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One release of an app, decided before the host is asked. `bundle`: file and SHA-256 of a sealed app, and its `head`;
    None with a public `model` of `weights` bytes, for which nothing is released."""

    name: str
    launch: bytes
    config: bytes
    policy: Policy
    kind: str
    bundle: tuple[Path, str] | None = None
    head: bytes = b""
    folder: Path | None = None
    api_keys: Path | None = None
    model: str | None = None
    weights: int = 0

    @property
    def fragment(self) -> str:
        """What makes an address name its owner and deployment."""
        return f"#owner={self.policy.owner_key}&deployment={self.name}"

    @property
    def policy_file(self) -> Path:
        return _folder() / f"{self.name}.policy.toml"


def prepare(folder: Path, wishes: Wishes) -> tuple[Deployment, AppFile]:
    """Packages the app unless a bundle of it is named, or there already, and counts one release more.

    Raises: WrongUse; MalformedApp; what packaging raises.
    """
    app = read_appfile(folder)
    name = _checked(wishes.name or app.name)
    if wishes.broker and not OWNER_KEY.fullmatch(wishes.broker):
        raise WrongUse("That is no broker's key.", hint="`cloister broker init` shows it.", step="broker")
    state = state_directory()
    platform = wishes.platform or app.platform
    if not platform:
        hint = f'platform = "{PLATFORM}" in cloister.toml, or --platform {PLATFORM}, to try it out without protection.'
        raise WrongUse("The app does not say which TEE it shall run in.", hint=hint, step="platform")
    app = replace(app, platform=platform)  # what its requirements are fetched for
    file = wishes.policy or app.policy
    if platform != PLATFORM and file is None:
        raise _no_policy()
    path = wishes.bundle or _packaged(app, folder / f"{app.name}.cloister", state)
    head_bytes, head = _head(path)
    if head.manifest.name != app.name:
        raise WrongUse("That bundle is of another app.", expected=app.name, got=head.manifest.name, step="bundle")
    with_keys = wishes.api_keys is not None
    asked = {name: True for name, wanted in (("api_keys", with_keys), ("tls", wishes.tls)) if wanted}
    config = config_for(head, platform, **asked).encode()
    launch = launch_bytes(
        head,
        owner_key=owner_name(owner_key()),
        deployment=name,
        release=next_release(state, name),
        config=config,
        broker_key=wishes.broker or None,
    )
    return (
        Deployment(
            name=name,
            launch=launch,
            config=config,
            policy=_policy(launch, _read_policy(file, platform), tls=wishes.tls),
            kind=head.manifest.kind,
            bundle=(path, _digest(path)),
            head=head_bytes,
            folder=folder.absolute(),
            api_keys=None if wishes.api_keys is None else wishes.api_keys.absolute(),
        ),
        app,
    )


def prepare_public(model: str, wishes: Wishes) -> Deployment:
    """The built-in app with a model that everybody may have: nothing to seal, so nothing to release."""
    given = [f"--{name.replace('_', '-')}" for name in _OF_SEALED_APPS if getattr(wishes, name)]
    if given:
        raise WrongUse(
            f"Only with an app of your own: {', '.join(given)}.", hint="cloister init --template llm", step="model"
        )
    if not wishes.name:
        raise WrongUse("The app needs a name.", hint=f"cloister deploy --model {model} --name chat", step="name")
    _checked(wishes.name)
    if wishes.platform not in (PLATFORM, image_gramine.PLATFORM):
        raise WrongUse(
            "A model without an app of your own runs in SGX, or in a simulated TEE.",
            hint=f"--platform {image_gramine.PLATFORM} or {PLATFORM}, or `cloister init --template llm`",
            step="platform",
        )
    in_sgx = wishes.platform == image_gramine.PLATFORM
    if in_sgx and wishes.tls:
        raise WrongUse("No enclave of SGX has a TLS listener.", hint="Deploy it without --tls.", step="tls")
    with output.download_bar() as bar:
        found = resolve(model, progress=bar)
    output.note("measuring the code that will run", "dim")
    plan = Plan.make(found, platform=wishes.platform, engine="thread" if in_sgx else "process", tls=wishes.tls)
    config = plan.config.digest().hex()
    launch = LaunchConfig(
        owner_key=plan.owner,
        deployment=wishes.name,
        release=next_release(state_directory(), wishes.name),
        app=built_in(config),
        models=(plan.model_digest,),
        config_sha256=config,
    )
    return Deployment(
        name=wishes.name,
        launch=launch.encode(),
        config=plan.config.encode(),
        policy=_measured_policy(plan, launch) if in_sgx else _simulated_policy(plan, wishes.name),
        kind="llm",
        model=model,
        weights=found.path.stat().st_size,
    )


def _simulated_policy(plan: Plan, name: str) -> Policy:
    return replace(policy_for(plan, Device.open(state_directory() / "sim").root_pem), deployment=name)


def _measured_policy(plan: Plan, launch: LaunchConfig) -> Policy:
    """What the host will start is built here too, to know what it will measure. Raises: WrongUse without Gramine."""
    output.note("measuring the enclave that the host will start", "dim")
    image = image_gramine.Image(launch=launch.encode(), config=plan.config.encode(), model=plan.model.path)
    return Policy(
        deployment=launch.deployment,
        owner_key=launch.owner_key,
        app=launch.app.sha256,
        models=frozenset(launch.models),
        config=launch.config_sha256,
        platforms=(image_gramine.PLATFORM,),
        measurements={image_gramine.PLATFORM: (image_gramine.measure(image),)},
        tolerate_insecure=frozenset(plan.config.insecure),
    )


def release_for(deployment: Deployment, secrets: Path | None) -> Release:
    """Keys, secrets and settings, as they stand on this machine now.

    Raises: WrongUse when the app's folder, its keys or a secret are not here; MalformedApp.
    """
    if deployment.folder is None or not deployment.folder.is_dir():
        hint = "Deploy it again from where it is now."
        raise WrongUse("The app's folder is not here any more.", hint=hint, step="release")
    app, head = read_appfile(deployment.folder), parse_bundle_head(deployment.head)
    beside = deployment.folder / secret_file.FILE
    named = head.manifest.secrets  # what the bundle asks for, whatever the app's file says by now
    values = secret_file.read_secrets(named, os.environ, secrets or (beside if beside.is_file() else None))
    keys = filekeys.load(state_directory(), head)
    hashes = () if deployment.api_keys is None else read_keys(deployment.api_keys)
    return contents(
        app,
        keys,
        secrets=values,
        now=time.time(),
        api_keys=tuple(ApiKeyHash(key.name, key.sha256) for key in hashes),
    )


# The record


def save_record(deployment: Deployment, host: str) -> None:
    """And the policy beside it, for clients on this machine. Of a public model on hardware the policy alone: there is nothing
    to release. Raises: OSError."""
    if deployment.bundle is None or deployment.folder is None:
        if deployment.policy.simulator_root is None:
            write_policy(deployment, deployment.policy_file)
        return
    members = {
        "v": 1,
        "host": host,
        "bundle": [str(deployment.bundle[0].absolute()), deployment.bundle[1]],
        "head": base64.b64encode(deployment.head).decode(),
        "launch": base64.b64encode(deployment.launch).decode(),
        "config": base64.b64encode(deployment.config).decode(),
        "folder": str(deployment.folder),
        "api_keys": None if deployment.api_keys is None else str(deployment.api_keys),
    }
    write_private(_folder() / f"{deployment.name}.json", json.dumps(members, indent=1).encode())
    write_policy(deployment, deployment.policy_file)


def write_policy(deployment: Deployment, path: Path) -> None:
    """What a client needs to know. Raises: OSError."""
    root = state_directory() / "sim-root.pem" if deployment.policy.simulator_root is not None else None
    text = to_toml(deployment.policy, comment=f"Everything that is known of {deployment.name}, as deployed.", root=root)
    write_file(path, text)


def load_record(name: str, host: str, policy: Path | None) -> Deployment | None:
    """None when this machine did not deploy an app of that name there. Raises: WrongUse for a damaged record."""
    path = _folder() / f"{name}.json"
    if not NAME.fullmatch(name) or not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
        if found["host"] != host:
            return None
        launch, config, head = (base64.b64decode(found[part]) for part in ("launch", "config", "head"))
        folder, keys = Path(found["folder"]), found["api_keys"]
        deployed = parse_launch(launch)
        said = json.loads(config)
        platform, tls = str(said["platform"]), said.get("tls") is True
        file, sha256 = found["bundle"]
    except (ValueError, KeyError, TypeError, MalformedEvidence) as error:
        raise WrongUse(f"{path} is damaged.", hint="Deploy the app again.", step="record") from error
    return Deployment(
        name=name,
        launch=launch,
        config=config,
        policy=_policy(launch, _read_policy(policy or _named_policy(folder), platform, kept_as=name), tls=tls),
        kind=deployed.app.kind,
        bundle=(Path(file), str(sha256)),
        head=head,
        folder=folder,
        api_keys=None if keys is None else Path(keys),
    )


def _checked(name: str) -> str:
    """Raises: WrongUse for a name that a host would not take, nor a folder."""
    if not NAME.fullmatch(name):
        raise WrongUse("An app's name has lower-case letters, digits and dashes: 1 to 63 of them.", step="name")
    return name


def _folder() -> Path:
    path = state_directory() / "deployments"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def _named_policy(folder: Path) -> Path | None:
    return read_appfile(folder).policy if folder.is_dir() else None


def _read_policy(file: Path | None, platform: str, *, kept_as: str = "") -> Policy | None:
    """What is believed of real hardware: the file's word, or else that of the deployment's last start. None where it is
    simulated. Raises: WrongUse without either."""
    if platform == PLATFORM:
        return None
    kept = _folder() / f"{kept_as}.policy.toml"
    if file is not None:
        return load_policy(file, configured_signers())
    if kept_as and kept.is_file():
        return load_policy(kept)
    raise _no_policy()


def _no_policy() -> WrongUse:
    hint = '--policy FILE, or policy = "FILE" in cloister.toml; `cloister image policy` writes one.'
    return WrongUse("What to believe of the host's hardware is not said.", hint=hint, step="policy")


def _policy(launch_bytes_: bytes, believed: Policy | None, *, tls: bool) -> Policy:
    """What the owner knows is pinned: on real hardware beside what is `believed` of it, on simulated hardware beside
    this machine's own simulator and the code that is installed here. `tls`: the owner asked for a TLS
    listener, so that is tolerated."""
    launch = parse_launch(launch_bytes_)
    asked = {"tls"} if tls else set[str]()
    pins: dict[str, Any] = {
        "owner_key": launch.owner_key,
        "broker_key": launch.broker_key,
        "logs": launch.logs,
        "deployment": launch.deployment,
        "app": launch.app.sha256,
        "config": launch.config_sha256,
        "models": frozenset(launch.models) or None,
    }
    if believed is not None:
        return replace(believed, tolerate_insecure=believed.tolerate_insecure | asked, **pins)
    device = Device.open(state_directory() / "sim")
    write_root(device)
    return Policy(
        platforms=(PLATFORM,),
        measurements={PLATFORM: (measure(library_dir()).components(),)},
        simulator_root=device.root_pem,
        tolerate_insecure=frozenset({"api-keys-off", _UNCONFINED, *asked}),
        **pins,
    )


def _packaged(app: AppFile, path: Path, state: Path) -> Path:
    """The bundle that is there already, if it is of this very app and its keys are here: an upload that was cut goes on.
    Else a new one."""
    with contextlib.suppress(WrongUse, MalformedEvidence):
        _, head = _head(path)
        filekeys.load(state, head)
        model = resolve(model_of(app)) if app.model else None
        same = manifest_of(app, model=model).encode() == head.manifest_bytes
        if same and head.total == path.stat().st_size:
            output.note(f"{path.name} is this very app: used as it is", "dim")
            return path
    return pack(app, path, state).path


def _head(path: Path) -> tuple[bytes, BundleHead]:
    """Raises: WrongUse; MalformedEvidence for what is no bundle."""
    try:
        with path.open("rb") as file:
            start = file.read(MAX_HEAD)
    except OSError as error:
        raise WrongUse(f"{path} cannot be read: {error.strerror}.", step="bundle") from error
    head = parse_bundle_head(start)
    return start[: head.length], head


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
