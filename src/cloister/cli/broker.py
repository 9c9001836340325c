"""`cloister broker`: hands keys and secrets to enclaves that verify, so that they can restart without their owner's laptop."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated

import httpx2
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloister.channel.release import ApiKeyHash
from cloister.cli import output
from cloister.cli.keys import read_keys
from cloister.cli.local import state_directory
from cloister.cli.output import AsJson
from cloister.cli.policy_file import load_policy
from cloister.cli.trust import Trust, configured_signers
from cloister.errors import CloisterError, WrongUse
from cloister.evidence.bundle import MAX_HEAD, BundleHead, parse_bundle_head
from cloister.evidence.launch import OWNER_KEY
from cloister.evidence.strict_json import from_b64url
from cloister.owner import filekeys
from cloister.owner import secrets as secret_file
from cloister.owner.appfile import FILE, AppFile, read_appfile
from cloister.owner.broker import Broker, Watch
from cloister.owner.broker_log import Entry, read_entries
from cloister.owner.broker_state import BrokerKeys, Record, Records, make_root, read_root
from cloister.owner.joining import carry, keep_together
from cloister.verify import Policy

__all__ = ["register"]

_LOG, _ROOT, _RECORDS = "log.jsonl", "root", "records"
_SLOWEST = 60.0
_TIMEOUT = httpx2.Timeout(30.0)

Folder = Annotated[
    Path | None,
    typer.Option(
        "--folder", metavar="DIR", help="Where it keeps log and records; absent: in the owner's state folder."
    ),
]
Root = Annotated[
    Path | None, typer.Option("--root", metavar="FILE", help="Where its root secret is; absent: in its folder.")
]
Name = Annotated[str, typer.Argument(metavar="DEPLOYMENT", show_default=False)]
LogFile = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="Absent: this machine's broker's.", show_default=False)
]
KeyName = Annotated[
    str, typer.Option("--key", metavar="KEY", help="Whose log it is (ed25519:…); absent: this machine's broker's.")
]


def register(app: typer.Typer) -> None:
    app.callback()(_family)
    app.command("init")(init)
    app.command("add")(add)
    app.command("revoke")(revoke)
    app.command("serve")(serve)
    app.command("join")(join)
    log = typer.Typer(add_completion=False, help="Show the broker's log, and say whether it is whole.")
    log.command("show")(log_show)
    log.command("verify")(log_verify)
    app.add_typer(log, name="log")


def _family() -> None:
    """Release keys and secrets to verified enclaves, while their owner's own machine sleeps."""


def init(folder: Folder = None, root: Root = None, as_json: AsJson = False) -> None:
    """Make the broker's root secret, unless there is one, and show the broker's key: what a deployment names as its broker."""
    place = _folder(folder)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    make_root(root or place / _ROOT)
    broker = _broker(folder, root)
    broker.begin()
    if as_json:
        output.json_value({"broker_key": broker.name, "folder": str(place)})
    else:
        output.line(broker.name)
        output.note("cloister deploy --broker KEY names it; then: cloister broker add DEPLOYMENT", "dim")


def add(
    deployment: Name,
    folder_of_app: Annotated[Path, typer.Argument(metavar="[DIR]", help=f"Where its {FILE} is.")] = Path(),
    bundle: Annotated[
        Path | None, typer.Option("--bundle", metavar="FILE", help="What was deployed; absent: DIR/NAME.cloister.")
    ] = None,
    bundle_keys: Annotated[
        Path | None,
        typer.Option("--bundle-keys", metavar="FILE", help="Its keys; absent: from the owner's state folder."),
    ] = None,
    secrets: Annotated[
        Path | None,
        typer.Option("--secrets", metavar="FILE", help="Values of its secrets; absent: secrets.toml, the environment."),
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option("--api-keys", metavar="FILE", help="Hashes of API keys, from `cloister keys new`.")
    ] = None,
    folder: Folder = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Hand over what the broker may release for a deployment, in the place of what it had: file keys, secrets, settings.

    An app's expiry counts from now, and not from each start.
    """
    app = read_appfile(folder_of_app)
    head = _head(bundle or folder_of_app / f"{app.name}.cloister")
    if head.manifest.name != app.name:
        raise WrongUse("That bundle is of another app.", expected=app.name, got=head.manifest.name, step="bundle")
    beside = folder_of_app / secret_file.FILE
    file = secrets or (beside if beside.is_file() else None)
    record = Record(
        deployment=deployment,
        app=head.sha256,
        keys=_bundle_keys(bundle_keys, head),
        secrets=secret_file.read_secrets(head.manifest.secrets, os.environ, file),
        settings=app.settings,
        api_keys=() if api_keys is None else tuple(ApiKeyHash(key.name, key.sha256) for key in read_keys(api_keys)),
        expires=_ends(app),
    )
    _broker(folder, root).add(record)
    if as_json:
        names = {"keys": sorted(record.keys), "secrets": sorted(record.secrets)}
        output.json_value({"deployment": deployment, "app": record.app, "expires": record.expires, **names})
    else:
        output.line(f"{deployment}: handed over, for app sha256:{record.app}")


def revoke(deployment: Name, folder: Folder = None, root: Root = None, as_json: AsJson = False) -> None:
    """Release nothing for a deployment any more, and forget its keys and secrets. What serves already goes on."""
    _broker(folder, root).revoke(deployment)
    if as_json:
        output.json_value({"revoked": deployment})
    else:
        output.line(f"{deployment}: revoked")


def serve(
    policy: Annotated[Path, typer.Option("--policy", metavar="FILE", help="What an enclave must prove.")],
    watch: Annotated[list[str], typer.Option("--watch", metavar="URL", help="Where to look; may be repeated.")],
    every: Annotated[float, typer.Option("--every", metavar="SECONDS", min=0.1, help="How often to look.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once at each, and end.")] = False,
    folder: Folder = None,
    root: Root = None,
) -> None:
    """Watch addresses, and release to the enclaves that wait there and verify. Ctrl+C ends it."""
    broker = _broker(folder, root)
    applied = broker.fit(load_policy(policy, configured_signers()))
    for url in watch:
        _demand_address(url)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stop = threading.Event()
    if once:
        stop.set()
    output.note(f"{broker.name} watches {len(watch)} {'address' if len(watch) == 1 else 'addresses'}", "dim")
    with ThreadPoolExecutor(len(watch)) as pool:
        try:
            watching = [pool.submit(_watch, broker, applied, url, every, stop) for url in watch]
            wait(watching, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
        for one in watching:
            one.result()


def join(
    joiner: Annotated[str, typer.Argument(metavar="JOINER", help="Address of the replica.", show_default=False)],
    member: Annotated[
        str, typer.Argument(metavar="MEMBER", help="Address of a member, no balancer's.", show_default=False)
    ],
    policy: Annotated[Path, typer.Option("--policy", metavar="FILE", help="What the replica must prove.")],
    keep: Annotated[
        bool, typer.Option("--keep", help="Go on, so that their keys stay the same. Ctrl+C ends it.")
    ] = False,
    folder: Folder = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Have a replica let into its key group, if it verifies. The group's secret passes sealed, from enclave to enclave."""
    broker, trust = _broker(folder, root), Trust()
    applied = broker.fit(load_policy(policy, configured_signers()))
    for url in (joiner, member):
        _demand_address(url)

    def authorise(request: bytes) -> bytes:
        return broker.authorise(request, joiner, policy=applied, complete=trust.complete)

    with httpx2.Client(timeout=_TIMEOUT, follow_redirects=False, trust_env=False) as client:
        carry(client, joiner=joiner, member=member, authorise=authorise)
        if as_json:
            output.json_value({"joined": joiner, "member": member})
        else:
            output.line(f"joined {output.one_line(joiner, 120)}", "green")
        if keep:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            keep_together(
                client, joiner=joiner, member=member, authorise=authorise, stopped=threading.Event().wait,
                on_refusal=output.show_error,
            )  # fmt: skip


def _watch(broker: Broker, policy: Policy, url: str, every: float, stop: threading.Event) -> None:
    """Each address by itself, so that one that is slow keeps no other waiting. After a refusal ever more seldom."""
    pause, told = every, ""
    trust = Trust()
    while True:
        with httpx2.Client(timeout=_TIMEOUT, follow_redirects=False, trust_env=False) as client:
            try:
                seen = broker.look(url, policy=policy, client=client, complete=trust.complete)
            except CloisterError as error:
                seen = Watch("refused", error=error)
        words = f"{seen.outcome} {seen.deployment} {seen.error.message if seen.error else ''}"
        if seen.outcome == "released" or (words != told and seen.outcome != "nothing"):
            _tell(url, seen)
        told = words
        failed = seen.outcome in ("refused", "declined", "unsure")
        pause = min(2 * pause, max(every, _SLOWEST)) if failed else every
        if stop.wait(pause):
            return


def _tell(url: str, seen: Watch) -> None:
    what = " ".join(word for word in (seen.outcome, seen.deployment, output.one_line(url, 120)) if word)
    output.line(what, "green" if seen.outcome == "released" else "yellow")
    if seen.error is not None:
        output.show_error(seen.error)


def log_show(
    file: LogFile = None, key: KeyName = "", folder: Folder = None, root: Root = None, as_json: AsJson = False
) -> None:
    """Every line, verified."""
    entries, _ = _entries(file, key, folder, root)
    for entry in entries:
        if as_json:
            output.line(json.dumps(entry.to_json()))
        else:
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry.time))
            rest = " ".join(f"{name}={value}" for name, value in entry.details.items())
            output.line(f"{entry.number:>6}  {moment}  {entry.event:<9}  {output.one_line(rest, 1000)}")


def log_verify(
    file: LogFile = None, key: KeyName = "", folder: Folder = None, root: Root = None, as_json: AsJson = False
) -> None:
    """Say whether the log is whole: no line changed, missing, put in between or in another order."""
    entries, own = _entries(file, key, folder, root)
    last: Entry | None = None
    for last in entries:  # noqa: B007 (the last one is wanted)
        pass
    if last is None:
        raise WrongUse("The log is empty.", step="log")
    if as_json:
        output.json_value({"lines": last.number, "sha256": last.digest, "broker_key": own})
        return
    output.line(f"whole: {last.number} lines, the last one sha256:{last.digest}, by {own}")
    output.note("Lines cut off at its very end cannot be seen: compare number and digest with a copy kept elsewhere.")


# Where things are


def _folder(folder: Path | None) -> Path:
    return folder or state_directory() / "broker"


def _broker(folder: Path | None, root: Path | None) -> Broker:
    place = _folder(folder)
    keys = BrokerKeys.derive(read_root(root or place / _ROOT))
    return Broker(keys, Records(place / _RECORDS, keys.records), place / _LOG)


def _entries(file: Path | None, key: str, folder: Path | None, root: Path | None) -> tuple[Iterator[Entry], str]:
    """And whose they are."""
    path = file or _folder(folder) / _LOG
    own = key or BrokerKeys.derive(read_root(root or _folder(folder) / _ROOT)).name
    if not OWNER_KEY.fullmatch(own):
        raise WrongUse("That is no broker's key.", expected="ed25519: and 43 characters", step="key")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WrongUse(f"{path} cannot be read.", got=error.strerror, step="log") from error
    public = Ed25519PublicKey.from_public_bytes(from_b64url(own.removeprefix("ed25519:"), what="key"))
    return read_entries(data, public), own


def _head(path: Path) -> BundleHead:
    """Raises: WrongUse; MalformedEvidence for what is no bundle."""
    try:
        with path.open("rb") as file:
            return parse_bundle_head(file.read(MAX_HEAD))
    except OSError as error:
        hint = "--bundle FILE: what `cloister package` or `cloister deploy` made."
        raise WrongUse(f"{path} cannot be read.", got=error.strerror, hint=hint, step="bundle") from error


def _bundle_keys(file: Path | None, head: BundleHead) -> Mapping[str, bytes]:
    keys = filekeys.load(state_directory(), head) if file is None else filekeys.read(file)
    sections = {section.name for section in head.manifest.sections}
    if set(keys) != sections:
        raise WrongUse("These are not the keys of that bundle.", expected=", ".join(sorted(sections)), step="keys")
    return keys


def _ends(app: AppFile) -> int | None:
    return None if app.expiry is None else int(time.time()) + app.expiry


def _demand_address(url: str) -> None:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = None
    if parsed is None or parsed.scheme not in ("http", "https") or not parsed.host or parsed.fragment:
        expected = "http://… or https://…, without #…"
        raise WrongUse("This is no address to watch.", step="watch", expected=expected, got=output.one_line(url, 80))
