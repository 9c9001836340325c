"""`cloister host`: the operator's daemon, and who may use it. Untrusted by whoever deploys to it, and by their users."""

import re
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated
from urllib.parse import urlsplit

import typer

from cloister.cli import output
from cloister.cli.backend import ProcessBackend
from cloister.cli.gramine_backend import GramineBackend
from cloister.cli.local import state_directory
from cloister.cli.operator import HostOption, connect
from cloister.cli.output import AsJson
from cloister.cli.quantities import parse_size
from cloister.cli.vm_backend import VmBackend, VmSettings
from cloister.errors import WrongUse
from cloister.host.access import ConsoleSessions
from cloister.host.api import Host, create_host
from cloister.host.backend import HostBackend
from cloister.host.bundles import Bundles, UploadLimits
from cloister.host.fleet import Fleet, FleetSettings
from cloister.host.process import listen
from cloister.host.qemu import find_accelerator, find_tee
from cloister.host.resources import Capacity
from cloister.host.serving import serve
from cloister.host.store import Store
from cloister.host.tokens import make_token
from cloister.sim import Device

__all__ = ["register"]

DEFAULT_PORT = 8700


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What the operator says of backends. `folder`: the host's state."""

    folder: Path
    image: Path | None
    firmware: Path | None
    disk: Path | None
    mr_td: str


def _vm(given: _Given) -> HostBackend:
    if given.image is None or given.firmware is None:
        hint = "--image FILE --firmware FILE, and --disk FILE where not all of the image is in one file."
        raise WrongUse("A virtual machine boots an image under a firmware.", hint=hint)
    return VmBackend(
        VmSettings(
            kernel=given.image,
            firmware=given.firmware,
            tee=find_tee() or "vtpm",
            accelerator=find_accelerator(),
            root=given.disk,
            mr_td=given.mr_td,
        )
    )


_BACKENDS: Mapping[str, Callable[[_Given], HostBackend]] = MappingProxyType(
    {
        ProcessBackend.name: lambda _: ProcessBackend(Device.open(state_directory() / "sim")),
        GramineBackend.name: lambda given: GramineBackend(given.folder / "gramine"),
        VmBackend.name: _vm,
    }
)

_PORTS = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")

StateFolder = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help="The host's state. Absent: `host` in cloister's own state folder."),
]


def register(app: typer.Typer) -> None:
    app.callback(invoke_without_command=True)(_host)
    tokens = typer.Typer(add_completion=False, rich_markup_mode=None, help="Who may use this host.")
    tokens.command("add")(_add_token)
    tokens.command("list")(_list_tokens)
    tokens.command("remove")(_remove_token)
    app.add_typer(tokens, name="token")
    app.command("console")(_console)


def _host(
    context: typer.Context,
    state: StateFolder = None,
    listen_on: Annotated[
        str, typer.Option("--listen", metavar="ADDRESS", help="Where the API and apps are.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The API's. 0: any free one.")] = DEFAULT_PORT,
    ports: Annotated[str, typer.Option(metavar="FIRST-LAST", help="The apps'.")] = "8500-8999",
    address: Annotated[
        str,
        typer.Option(metavar="TEMPLATE", help="How clients reach an app: https://{name}.example.org, or with {port}."),
    ] = "",
    cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The API's TLS certificate, with its chain (PEM).")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key.")] = None,
    max_bundle: Annotated[str, typer.Option(metavar="SIZE", help="The largest bundle.")] = "256GiB",
    quota: Annotated[str, typer.Option(metavar="SIZE", help="All bundles together.")] = "1TiB",
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="For all apps. Absent: nine tenths of what there is.")
    ] = "",
    backend: Annotated[
        str,
        typer.Option(
            help="What enclaves run in: process (simulated), gramine (SGX), or vm (TDX, SEV-SNP, software TPM)."
        ),
    ] = "process",
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="vm: the measured image's unified kernel.")] = None,
    firmware: Annotated[Path | None, typer.Option(metavar="FILE", help="vm: OVMF, in one file.")] = None,
    disk: Annotated[Path | None, typer.Option(metavar="FILE", help="vm: the image's disk, where it has one.")] = None,
    mr_td: Annotated[str, typer.Option(metavar="HEX", help="vm on TDX: the firmware's measurement.")] = "",
) -> None:
    """Run apps of others in enclaves on this machine, until interrupted. Who may: `cloister host token add NAME`."""
    if context.invoked_subcommand is not None:
        return
    if backend not in _BACKENDS:
        expected = " or ".join(_BACKENDS)
        raise WrongUse("There is no such backend.", expected=expected, got=output.one_line(backend, 40))
    if (cert is None) != (key is None):
        raise WrongUse("TLS takes a certificate and its key.", hint="--cert FILE --key FILE")
    loopback = listen_on in ("127.0.0.1", "::1", "localhost")
    if not loopback and backend == ProcessBackend.name:
        raise WrongUse(
            "The `process` backend simulates its hardware, so its host stays on loopback.",
            hint="Leave --listen away. Clients refuse a simulator on another machine.",
            got=output.one_line(listen_on, 60),
        )
    if not loopback and cert is None:
        hint = "--cert FILE --key FILE, or leave --listen away and put a proxy that speaks TLS in front."
        raise WrongUse("On other addresses than loopback tokens would travel in the clear.", hint=hint)
    folder = _folder(state)
    capacity = Capacity.of_this_machine()
    if memory:
        capacity = Capacity(parse_size(memory), capacity.cpus)
    given = _Given(folder=folder, image=image, firmware=firmware, disk=disk, mr_td=mr_td)
    running = _BACKENDS[backend](given)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with closing(Store(folder / "host.db")) as store, listen(listen_on, port) as sock:
        bundles = Bundles(folder / "bundles", UploadLimits(most=parse_size(max_bundle), quota=parse_size(quota)))
        settings = FleetSettings(
            capacity=capacity,
            listen=listen_on,
            ports=_ports(ports),
            address=_template(address, listen_on),
        )
        fleet = Fleet(folder, store, bundles, running, settings)
        sessions = ConsoleSessions(time.monotonic)
        with closing(fleet):
            fleet.start()
            url = f"{'https' if cert else 'http'}://{_bracketed(listen_on)}:{sock.getsockname()[1]}"
            _announce(url, store, running, sessions)
            serve(
                create_host(Host(store, bundles, fleet, running, capacity, sessions)), sock, certificate=cert, key=key
            )


def _announce(url: str, store: Store, backend: HostBackend, sessions: ConsoleSessions) -> None:
    if isinstance(backend, ProcessBackend):
        output.note(
            output.styled(
                ("SIMULATED", "bold yellow"),
                ("  whoever runs this machine can read everything. For trying out, not for secrets.", ""),
            ),
            hang=2,
        )
        output.note(f"root    {backend.root}")
    elif backend.platform == "vtpm":
        output.note("A software TPM proves nothing: whoever runs this machine can read everything.", "yellow")
    else:
        output.note(f"platform {backend.platform}; clients verify it themselves")
    if not store.tokens():
        output.note("nobody may use it yet: cloister host token add NAME", "yellow")
    output.line(f"console {url}/console#{sessions.token()}")
    output.line(f"ready {url}")


def _folder(state: Path | None) -> Path:
    folder = state_directory() / "host" if state is None else state.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _ports(text: str) -> tuple[int, int]:
    match = _PORTS.fullmatch(text)
    if match is None or not 0 < int(match[1]) <= int(match[2]) < 65536:
        raise WrongUse("Ports are two numbers.", hint="--ports 8500-8999", got=output.one_line(text, 40))
    return int(match[1]), int(match[2])


def _template(text: str, listen_on: str) -> str:
    template = text or f"http://{_bracketed(listen_on)}:{{port}}"
    try:
        good = template.format(name="app", port=1) != template.format(name="other", port=2)
        urlsplit(template.format(name="app", port=1))
    except (ValueError, LookupError, AttributeError):
        good = False
    if not good or not template.startswith(("http://", "https://")):
        raise WrongUse(
            "An address says where an app is by its name or port.", hint="--address 'https://{name}.example.org'"
        )
    return template


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


# Tokens


def _add_token(
    name: Annotated[str, typer.Argument(help="Whose it is.", show_default=False)],
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Make a token, print it once, and keep its hash. It counts at once, the host need not be started anew."""
    token, record = make_token(name, time.time())
    with closing(Store(_folder(state) / "host.db")) as store:
        store.add_token(record)
    if as_json:
        output.json_value({"name": name, "token": token})
        return
    output.line(token)
    output.note("Shown once. Its holder types it into: cloister login URL", "dim")


def _list_tokens(state: StateFolder = None, as_json: AsJson = False) -> None:
    """Names, and since when."""
    with closing(Store(_folder(state) / "host.db")) as store:
        records = store.tokens()
    if as_json:
        output.json_value([{"name": record.name, "created_at": record.created_at} for record in records])
        return
    for record in records:
        since = datetime.fromtimestamp(record.created_at, UTC).strftime("%Y-%m-%d")
        output.line(f"{record.name}  since {since}")


def _remove_token(
    name: Annotated[str, typer.Argument(help="Whose it is.", show_default=False)],
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """From now on it opens nothing."""
    with closing(Store(_folder(state) / "host.db")) as store:
        store.remove_token(name)
    if as_json:
        output.json_value({"removed": name})
    else:
        output.note(f"removed {name}")


def _console(host: HostOption = "", as_json: AsJson = False) -> None:
    """Print an address that opens the host's console in one browser, read-only, within 12 hours."""
    with connect(host) as client:
        address = client.url + client.post("/v1/console", {})["path"]
    if as_json:
        output.json_value({"address": address})
    else:
        output.line(address)
