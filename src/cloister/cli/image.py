"""`cloister image`: build the measured image, and say what a machine will measure when it boots it; the same for SGX."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

import cloister
from cloister.cli import output
from cloister.cli.output import AsJson
from cloister.cli.policy_file import (
    fingerprint,
    grouped,
    key_name,
    read_key,
    signature_file,
    signature_of,
    to_toml,
    write_file,
)
from cloister.deploy.entries import PLATFORMS, Entry, Start, predict_entries
from cloister.deploy.gpt import read_table
from cloister.deploy.gramine import NAME
from cloister.deploy.gramine_sign import SIGSTRUCT_SIZE, parse_sigstruct
from cloister.deploy.pe import MAX_PROGRAM
from cloister.deploy.predict import SERVING, StartedBy
from cloister.deploy.sev_snp import SNP_CPU
from cloister.deploy.uki import parse_image
from cloister.errors import WrongUse
from cloister.evidence.launch import MAX_LAUNCH, LaunchConfig, parse_launch
from cloister.verify import Policy
from cloister.verify.policy import Limits

__all__ = ["register"]

_ANYTHING = {"allow_extra_args": True, "ignore_unknown_options": True}
_PIN = re.compile(r"([a-z][a-z0-9_]{0,31})=([0-9a-f]{1,128})")

_SGX = "sgx"

ImageFile = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGE",
        help="The unified kernel image; of SGX, the folder that `cloister image gramine` made.",
        show_default=False,
    ),
]
Platform = Annotated[str, typer.Option("--platform", metavar="NAME", help=f"One of {', '.join((*PLATFORMS, _SGX))}.")]
StartedByOption = Annotated[
    str, typer.Option("--started-by", metavar="disk|qemu", help="A disk's boot partition, or QEMU's -kernel.")
]
Phase = Annotated[
    list[str] | None,
    typer.Option(
        "--phase",
        metavar="WORDS",
        help="How far systemd came: enter-initrd:leave-initrd:… (may be given again). Absent: a service's.",
        show_default=False,
    ),
]
Disk = Annotated[
    Path | None, typer.Option("--disk", metavar="FILE", help="TDX: the raw disk it lies on.", show_default=False)
]
FirmwareFile = Annotated[
    Path | None, typer.Option("--firmware", metavar="FILE", help="SEV-SNP: the OVMF.", show_default=False)
]
Vcpus = Annotated[
    list[int] | None,
    typer.Option("--vcpus", metavar="N", min=1, help="SEV-SNP: CPUs (may be given again).", show_default=False),
]
Cpu = Annotated[str, typer.Option("--cpu", metavar="NAME", help="SEV-SNP: QEMU's -cpu.")]
Pins = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="NAME=HEX",
        help="A measurement of the cloud's own, as mr_td (may be given again).",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    app.callback()(_family)
    app.command("predict")(predict)
    app.command("policy")(policy)
    app.command("boot")(boot)
    app.command("build", context_settings=_ANYTHING)(build)
    app.command("gramine", context_settings=_ANYTHING if (command := _gramine()) is _gramine_missing else {})(command)


def _family() -> None:
    """Build the measured image, and say what a machine will measure when it boots it."""


def predict(
    image: ImageFile,
    platform: Platform = "vtpm",
    started_by: StartedByOption = "disk",
    phase: Phase = None,
    disk: Disk = None,
    firmware: FirmwareFile = None,
    vcpus: Vcpus = None,
    cpu: Cpu = SNP_CPU,
    pin: Pins = None,
    as_json: AsJson = False,
) -> None:
    """Say what evidence will say of a machine that booted this image, without booting it.

    Nothing external is assumed: no command line, credentials or extensions beside the image, no boot loader before it.
    Where evidence may take one of several values, all are shown.
    """
    about: dict[str, str | int] = {"v": 1, "platform": platform}
    if platform == _SGX:
        entries: tuple[Entry, ...] = (_of_enclave(image)[0],)
    else:
        kernel = _read(image)
        start = _start(platform, started_by, phase, disk, firmware, vcpus, cpu, pin)
        entries, parsed = predict_entries(kernel, start), parse_image(kernel)
        version = ".".join(map(str, parsed.kernel_version))
        about |= {"stub": parsed.stub, "kernel": version, "started_by": started_by}
        output.note(f"systemd-stub {parsed.stub}, Linux {version}, started by {started_by}", "dim")
    if as_json:
        output.json_value({**about, "entries": [dict(entry) for entry in entries]})
        return
    for at, entry in enumerate(entries):
        output.line(platform if not at else f"{platform} (or {at + 1})")
        for name, value in entry.items():
            output.line(f"  {name:<12} {value}")


def policy(
    image: ImageFile,
    deployment: Annotated[str, typer.Option("--deployment", metavar="NAME", help="The deployment's name.")],
    platform: Platform = "vtpm",
    owner_key: Annotated[str, typer.Option("--owner-key", metavar="ed25519:…", help="Whose deployment it is.")] = "",
    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="OWNER.pem", help="The owner's own key: it also signs.", show_default=False),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", metavar="SHA256", help="A model that may run (may be given again).", show_default=False
        ),
    ] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option("--machine", metavar="ID", help="A machine, or an enrolled TPM's key.", show_default=False),
    ] = None,
    started_by: StartedByOption = "disk",
    phase: Phase = None,
    disk: Disk = None,
    firmware: FirmwareFile = None,
    vcpus: Vcpus = None,
    cpu: Cpu = SNP_CPU,
    pin: Pins = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Absent: to standard output.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a policy from predictions: it believes this image, and nothing else, before it ever ran.

    With --key it is signed (FILE.sig). `cloister policy measurements` makes of it what travels with the evidence.
    """
    private = read_key(key) if key else None
    owner = key_name(private) if private else owner_key
    if private and owner_key not in ("", owner):
        raise WrongUse("--key is not the key that --owner-key names.", expected=owner_key, got=owner)
    if not owner:
        raise WrongUse("Whose deployment is it?", expected="--owner-key ed25519:…, or --key OWNER.pem")
    if private and out is None:
        raise WrongUse("A signature is over a file.", hint="-o FILE: the signature goes beside it.")
    if platform == _SGX:
        entry, launch = _of_enclave(image)
        _demand_fitting(launch, deployment, owner)
        model = model or list(launch.models)
        entries: tuple[Entry, ...] = (entry,)
    else:
        start = _start(platform, started_by, phase, disk, firmware, vcpus, cpu, pin)
        entries = predict_entries(_read(image), start)
    written = Policy(
        deployment=deployment,
        owner_key=owner,
        models=frozenset(one.removeprefix("sha256:") for one in model) if model else None,
        platforms=(platform,),
        measurements={platform: entries},
        limits=Limits(platform_ids=frozenset(machine) if machine else None),
    )
    text = to_toml(written, comment=f"Predicted from {output.one_line(image.name, 100)} by `cloister image policy`.")
    signature = signature_file(out) if private and out else None
    if out is not None:
        write_file(out, text)
    if private and signature:
        write_file(signature, signature_of(text.encode(), private))
    if as_json:
        about = {"v": 1, "platform": platform, "deployment": deployment, "owner_key": owner}
        files = {"policy": out and str(out), "signature": signature and str(signature), "toml": text}
        found = [dict(entry) for entry in entries]
        output.json_value({**about, "fingerprint": fingerprint(written), "entries": found, **files})
        return
    if out is None:
        output.write(text)
    else:
        output.line(f"wrote {out}")
    output.note(f"fingerprint {grouped(fingerprint(written))}")
    if not model:
        output.note(
            "names no model: `cloister deploy` adds the app's own; for other clients of an app with one, --model"
        )
    if signature:
        output.line(f"wrote {signature}")
        output.note(f"signed by {owner}")


def _of_enclave(folder: Path) -> tuple[Entry, LaunchConfig]:
    """What an enclave of SGX measures, and the launch config that it measures with: `folder` as `cloister image gramine` made
    and signed it. Raises: WrongUse, MalformedEvidence."""
    signature, launch = folder / f"{NAME}.sig", folder / "launch.json"
    try:
        with signature.open("rb") as file, launch.open("rb") as words:
            signed, said = parse_sigstruct(file.read(SIGSTRUCT_SIZE + 1)), words.read(MAX_LAUNCH + 1)
    except OSError as error:
        hint = "`cloister image gramine DIR` makes one, and signs it where Gramine is installed."
        raise WrongUse(f"{folder} holds no signed enclave: {error.strerror}.", hint=hint) from error
    return signed.entry(said), parse_launch(said)


def _demand_fitting(launch: LaunchConfig, deployment: str, owner: str) -> None:
    """An enclave of SGX measures whose it is: with other words beside it, a policy would believe nothing at all."""
    for name, asked, measured in (
        ("deployment", deployment, launch.deployment),
        ("owner-key", owner, launch.owner_key),
    ):
        if asked != measured:
            raise WrongUse(f"That enclave was built for another --{name}.", expected=measured, got=asked)


def boot(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where cloister.toml is.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="For boot.raw, data.raw and policy.toml.")],
    broker: Annotated[
        str, typer.Option("--broker", metavar="KEY", help="Who releases it: from `cloister broker init`.")
    ],
    platform: Annotated[str, typer.Option("--platform", metavar="NAME", help="Absent: as cloister.toml says.")] = "",
    policy_: Annotated[
        Path | None,
        typer.Option("--policy", metavar="FILE", help="What to believe of the machine.", show_default=False),
    ] = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Absent: as cloister.toml says.")] = "",
    bundle: Annotated[
        Path | None, typer.Option("--bundle", metavar="FILE", help="A bundle of this app that is there already.")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option("--api-keys", metavar="FILE", help="Hashes of API keys, from `cloister keys new`.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the two disks that a machine of the image is given where no `cloister host` starts it, as in a cloud."""
    from cloister.cli.deployments import Wishes  # what an enclave's server needs, as packaging does
    from cloister.cli.image_boot import write_disks

    wishes = Wishes(name=name, platform=platform, policy=policy_, bundle=bundle, api_keys=api_keys, broker=broker)
    write_disks(folder, wishes, out, as_json=as_json)


def build(context: typer.Context) -> None:
    """Build the image (Debian, as root, from a checkout of cloister): what follows goes to packaging/image/build.py."""
    script = Path(cloister.__file__).parents[2] / "packaging" / "image" / "build.py"
    if not script.is_file():
        hint = "Check cloister out, and `pip install -e .` there."
        raise WrongUse("An image is built from a checkout of cloister, not from its package.", hint=hint)
    raise typer.Exit(subprocess.run([sys.executable, str(script), *context.args], check=False).returncode)


def _gramine() -> Callable[..., None]:
    """Its command imports what an enclave's server needs; where that is not installed, this says so."""
    try:
        from cloister.cli.image_gramine import gramine_command
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "cloister":
            raise
        return _gramine_missing
    return gramine_command


def _gramine_missing() -> None:
    """Build an SGX enclave for Gramine: needs what an enclave's server needs."""
    raise WrongUse(
        "`cloister image gramine` needs Python packages that are not installed.", hint="pip install 'cloister[server]'"
    )


def _start(
    platform: str,
    started_by: str,
    phase: list[str] | None,
    disk: Path | None,
    firmware: Path | None,
    vcpus: list[int] | None,
    cpu: str,
    pins: list[str] | None,
) -> Start:
    if started_by not in ("disk", "qemu"):
        raise WrongUse("Nobody starts an image so.", expected="disk or qemu", got=output.one_line(started_by, 40))
    by: StartedBy = "qemu" if started_by == "qemu" else "disk"
    return Start(
        platform=output.one_line(platform, 40),
        started_by=by,
        phases=tuple(tuple(filter(None, words.split(":"))) for words in phase) if phase else SERVING,
        table=_table(disk) if disk else None,
        firmware=_read(firmware) if firmware else b"",
        vcpus=tuple(vcpus or ()),
        cpu=cpu,
        pins=dict(_pin(one) for one in pins or ()),
    )


def _pin(text: str) -> tuple[str, str]:
    match = _PIN.fullmatch(text)
    if match is None:
        raise WrongUse("That is no measurement.", expected="--pin mr_td=HEX", got=output.one_line(text, 60))
    return match[1], match[2]


def _read(path: Path) -> bytes:
    """At most one byte over 1 GiB, which whoever parses it refuses. Raises: WrongUse."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_PROGRAM + 1)
    except OSError as error:
        raise WrongUse(f"{path} cannot be read: {error.strerror}.") from error


def _table(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return read_table(file)
    except OSError as error:
        raise WrongUse(f"{path} cannot be read: {error.strerror}.") from error
