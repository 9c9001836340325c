"""`cloister deploy`: an app onto an operator's host, verified before anything secret leaves; and `cloister restart`."""

import base64
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from cloister.cli import image_gramine, output
from cloister.cli.deployments import (
    Deployment,
    Wishes,
    load_record,
    prepare,
    prepare_public,
    release_for,
    save_record,
)
from cloister.cli.local import owner_key, state_directory
from cloister.cli.operator import AppName, HostClient, HostOption, connect
from cloister.cli.output import AsJson
from cloister.cli.quantities import parse_moment, parse_size
from cloister.cli.trust import Trust, summary
from cloister.client import Session
from cloister.client.memory import FileMemory
from cloister.deploy.gramine import power_of_two
from cloister.enclave.boot import parse_config
from cloister.errors import CloisterError, EngineDied, Unreachable, WrongUse
from cloister.evidence.launch import parse_launch
from cloister.host.qemu import Tee
from cloister.host.resources import TIERS, Resources
from cloister.host.store import Restart
from cloister.owner.appfile import FILE, AppFile
from cloister.owner.provision import provision
from cloister.verify import Verified

__all__ = ["register", "restart_command"]

_POLL = 0.3
_LOST = frozenset({"failed", "stopped", "expired"})
_RELEASED = frozenset({"opening", "loading", "ready"})
_TELLS = 3.0  # seconds after which a host knows at the latest that an enclave has taken a release
_ROOM_OF_MODEL = 2 << 30  # bytes of memory beside a model's own

_Release = Callable[[dict[str, Any]], None]
"""What is called for an app that waits for its keys."""

Wait = Annotated[float, typer.Option("--wait", metavar="SECONDS", help="For how long it may take to get ready.")]
SecretFile = Annotated[
    Path | None,
    typer.Option("--secrets", metavar="FILE", help="Values of its secrets; absent: secrets.toml, the environment."),
]


def register(app: typer.Typer) -> None:
    app.command()(deploy)


def restart_command(app: typer.Typer) -> None:
    app.command()(_restart)


def deploy(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help=f"Where {FILE} is.")] = Path(),
    host: HostOption = "",
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help=f"What it is called; absent: as {FILE} says.")
    ] = "",
    platform: Annotated[str, typer.Option(help="`sim` accepts a simulated TEE on this machine.")] = "",
    policy: Annotated[
        Path | None, typer.Option("--policy", metavar="FILE", help="What to believe of the host's hardware.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", metavar="FILE", help="A bundle of this app that is there already.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="No app of your own: a public model, fetched by the host.")
    ] = "",
    secrets: SecretFile = None,
    api_keys: Annotated[
        Path | None, typer.Option("--api-keys", metavar="FILE", help="Hashes of API keys, from `cloister keys new`.")
    ] = None,
    broker: Annotated[
        str, typer.Option("--broker", metavar="KEY", help="Who else may release its keys: from `cloister broker init`.")
    ] = "",
    tier: Annotated[str, typer.Option(help=f"What it may take: {', '.join(TIERS)}.")] = "",
    memory: Annotated[str, typer.Option(metavar="SIZE", help="The most memory that it may take.")] = "",
    cores: Annotated[int, typer.Option(min=0, help="On how many it may run.")] = 0,
    expires: Annotated[str, typer.Option("--expires", metavar="WHEN", help="12h, 7d, 2027-01-31, or never.")] = "",
    restart: Annotated[
        Restart, typer.Option("--restart", help="Whether the host starts it again when it ends by itself.")
    ] = "always",
    tls: Annotated[
        bool, typer.Option("--tls", help="Weaker, and so named to all clients: a TLS listener too, inside the enclave.")
    ] = False,
    wait: Wait = 600.0,
    as_json: AsJson = False,
) -> None:
    """Package an app, bring it to a host, verify the enclave that waits there, release its keys to it, and wait until it
    answers. An app of that name is replaced, under the same address."""
    wishes = Wishes(
        name=name, platform=platform, policy=policy, bundle=bundle, api_keys=api_keys, broker=broker, tls=tls
    )
    with connect(host) as client:
        client.get("/v1/host")  # before the work of packaging: is it there, and am I let in?
        if model and secrets is not None:
            raise WrongUse("A public model has no secrets.", hint="cloister init --template llm", step="secrets")
        made, app = (prepare_public(model, wishes), None) if model else prepare(folder, wishes)
        if app is not None:
            release_for(made, secrets)  # what is missing is said before anything is uploaded
        limits = _limits(app, made, tier, memory, cores)
        _upload(client, made)
        started = client.post("/v1/apps", {**_request(made, limits, _ends(expires, app)), "restart": restart})
        save_record(made, client.url)  # of what the host took: what it refused pins nothing
        shown, verified = _serve(client, made, started, secrets, wait)
    _tell(shown, made, verified, as_json)


def _restart(
    name: AppName,
    host: HostOption = "",
    policy: Annotated[
        Path | None, typer.Option("--policy", metavar="FILE", help="What to believe of the host's hardware.")
    ] = None,
    secrets: SecretFile = None,
    wait: Wait = 600.0,
    as_json: AsJson = False,
) -> None:
    """End the enclave if it runs, start another, release its keys anew if it has any, and wait until it answers.

    For a sealed app, from the machine that deployed it: only there are its keys. From any, where its broker watches.
    """
    with connect(host) as client:
        made = load_record(name, client.url, policy)
        awaited: _Release | None = None
        if made is None:
            awaited = _released_by_others(client.get(client.app(name)), client.url)
        else:
            release_for(made, secrets)  # what is missing is said before anything is stopped
        started = client.post(client.app(name, "restart"))
        if made is None:
            shown, verified = _follow(client, started, wait, awaited), None
        else:
            save_record(made, client.url)  # the code may be another than when it was deployed, and the policy with it
            shown, verified = _serve(client, made, started, secrets, wait)
    if verified is not None and made is not None:
        _tell(shown, made, verified, as_json)
    elif as_json:
        output.json_value(shown)
    else:
        output.line(f"{output.one_line(str(shown['name']), 60)}  {output.one_line(str(shown['state']), 20)}")


# What is asked for


def _limits(app: AppFile | None, made: Deployment, tier: str, memory: str, cores: int) -> Resources:
    """Flags, then a tier, then the app's file, then what such an app usually takes."""
    if tier and tier not in TIERS:
        raise WrongUse("There is no such tier.", expected=", ".join(TIERS), got=output.one_line(tier, 40), step="tier")
    asked = TIERS.get(tier)
    wanted = app.resources if app is not None else None
    given = wanted.memory << 20 if wanted is not None and wanted.memory else _usual(made)
    counted = wanted.cores if wanted is not None and wanted.cores else 1
    return Resources(
        parse_size(memory) if memory else asked.memory_bytes if asked else given,
        cores or (asked.cores if asked else counted),
    )


def _usual(made: Deployment) -> int:
    """Bytes. A virtual machine's are all its memory: while the model is loaded, its file lies in there beside the weights
    (`models.memory`). An enclave of SGX has a power of two. Elsewhere the file is not counted, which nobody maps."""
    if made.kind != "llm":
        return TIERS["small"].memory_bytes
    size = made.bundle[0].stat().st_size if made.bundle is not None else made.weights
    platform = parse_config(made.config).platform
    if platform in get_args(Tee):
        return 2 * size + _ROOM_OF_MODEL
    return power_of_two(size + _ROOM_OF_MODEL) if platform == image_gramine.PLATFORM else size + _ROOM_OF_MODEL


def _ends(expires: str, app: AppFile | None) -> float | None:
    if expires:
        return parse_moment(expires)
    return None if app is None or app.expiry is None else time.time() + app.expiry


def _request(made: Deployment, limits: Resources, expires_at: float | None) -> dict[str, Any]:
    return {
        "name": made.name,
        "launch": base64.b64encode(made.launch).decode(),
        "config": base64.b64encode(made.config).decode(),
        "bundle": made.bundle[1] if made.bundle else None,
        "model": made.model,
        "memory_bytes": limits.memory_bytes,
        "cores": limits.cores,
        "expires_at": expires_at,
        "replace": True,
    }


def _upload(client: HostClient, made: Deployment) -> None:
    if made.bundle is None:
        return
    path, sha256 = made.bundle
    with output.download_bar() as bar:
        client.upload(path, sha256, lambda done, total: bar(path.name, done, total))


def _released_by_others(app: dict[str, Any], url: str) -> _Release | None:
    """Of an app that this machine did not deploy to the host at `url`; None: nothing has to be released.

    Raises: WrongUse for a sealed one without a broker: once stopped, it would not serve any more.
    """
    if app["bundle"] is None:
        return None
    if app["broker_key"] is None:
        hint = f"cloister restart on the machine that deployed it, with --host as it was then (here it is {url})."
        message = "The app is sealed, and its keys are not here: it was not stopped, as it could not start again."
        raise WrongUse(message, hint=hint, step="release")
    return lambda _app: output.note("its broker, if it watches, releases its keys to it", "dim")


# Once it has been started


def _serve(
    client: HostClient, made: Deployment, started: dict[str, Any], secrets: Path | None, wait: float
) -> tuple[dict[str, Any], Verified]:
    """From its start until it answers: released when it waits, and verified as every client does."""

    def hand_over(app: dict[str, Any]) -> None:
        owner, release = owner_key(), release_for(made, secrets)
        try:
            provision(str(app["address"]), policy=made.policy, owner=owner, release=release, complete=Trust().complete)
        except CloisterError:
            if parse_launch(made.launch).broker_key is None or not _was_released(client, made.name):
                raise
            output.note("its broker was first, and has released its keys to it", "dim")  # `verify` judges it, below
        else:
            output.note("verified, and its keys released to it", "dim")

    app = _follow(client, started, wait, hand_over if made.bundle is not None else None)
    session = Session(str(app["address"]), policy=made.policy, memory=FileMemory(), complete=Trust().complete)
    with session:
        return app, session.verify()


def _was_released(client: HostClient, name: str) -> bool:
    """By the host's word, which hears of it a moment later."""
    until = time.monotonic() + _TELLS
    while (state := client.get(client.app(name))["state"]) == "waiting" and time.monotonic() < until:
        time.sleep(_POLL)
    return state in _RELEASED


def _follow(client: HostClient, app: dict[str, Any], wait: float, release: _Release | None = None) -> dict[str, Any]:
    """Until it is ready. `release` is called when it waits for its keys, once for each start.

    Raises: EngineDied when it will not become ready; Unreachable after `wait` seconds; what `release` raises.
    """
    until = time.monotonic() + wait
    told, released = "", 0
    while app["state"] != "ready":
        state = str(app["state"])
        if state in _LOST:
            raise EngineDied(
                f"The app is {state} on the host. {output.one_line(str(app['detail']), 300)}",
                hint=f"cloister logs {app['name']}",
                step="deploy",
            )
        if (
            state == "restarting" and released
        ):  # it was not ready in time, say: with another release it would be no better
            raise EngineDied(
                f"The app ended before it was ready. {output.one_line(str(app['detail']), 300)}",
                hint=f"cloister logs {app['name']}; then `cloister restart`.",
                step="deploy",
            )
        if state != told:
            output.note(f"{output.one_line(state, 20)}  {output.one_line(str(app['detail']))}", "dim")
            told = state
        if state == "waiting" and release is None:
            hint = "cloister restart, on the machine that deployed it."
            raise Unreachable("The app waits for its owner's keys.", hint=hint, step="release")
        if state == "waiting" and release is not None and released != app["starts"]:
            released = app["starts"]
            release(app)
        if time.monotonic() > until:
            raise Unreachable(f"The app is still {state} after {wait:.0f} s.", hint=f"cloister logs -f {app['name']}")
        time.sleep(_POLL)
        app = client.get(client.app(str(app["name"])))
    return app


def _tell(app: dict[str, Any], made: Deployment, verified: Verified, as_json: bool) -> None:
    """The address names owner and deployment. On simulated hardware a client needs its root too."""
    address = f"{output.one_line(str(app['address']), 200).rstrip('/')}/{made.fragment}"
    words = ["cloister", "ask", address, "Who are you?"] if made.kind == "llm" else ["cloister", "connect", address]
    if made.bundle is not None or not verified.simulated:
        words += ["--policy", str(made.policy_file)]
    else:
        words += ["--dangerously-trust-simulator", str(state_directory() / "sim-root.pem")]
    if as_json:
        output.json_value({"app": app, "url": address, "try": shlex.join(words), "verification": verified.to_json()})
        return
    for part in summary(verified):
        output.note(part, hang=2)
    if app.get("tls"):
        listeners = ", ".join(output.one_line(str(origin), 80) for origin in app["tls"])
        output.note(
            f"TLS, which is weaker: {listeners}; its certificate: cloister verify … --save-cert cert.pem", hang=2
        )
    output.line(f"ready {address}")
    output.line(shlex.join(words))
