"""`cloister image gramine DIR`: an enclave for SGX as a folder, with its measurement, before any machine has run it."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cloister import private_file
from cloister.cli import output
from cloister.cli.keys import read_keys
from cloister.cli.local import Plan, state_directory
from cloister.cli.output import AsJson
from cloister.cli.policy_file import read_file
from cloister.cli.quantities import parse_size
from cloister.deploy.gramine import (
    ENGINE,
    MODEL,
    NAME,
    CpuFeatures,
    Enclave,
    Gramine,
    Memory,
    most_threads,
    power_of_two,
    render,
)
from cloister.deploy.gramine_files import collect, stage
from cloister.deploy.gramine_sign import Signed, find_gramine, make_signing_key, sign
from cloister.enclave.boot import Boot, EnclaveConfig, KeyHash, parse_config
from cloister.enclave.llm.llama.config import KV_TYPES
from cloister.enclave.llm.llama.library import library_dir
from cloister.errors import WrongUse
from cloister.evidence.launch import launch_digest, parse_launch
from cloister.models.download import resolve
from cloister.models.gguf import read_description
from cloister.models.memory import estimate
from cloister.models.store import LocalModel
from cloister.sim.measure import code_files

__all__ = ["Image", "boot_lines", "build", "gramine_command", "measure", "signing_key"]

PLATFORM = "sgx"

_OURS = 1 << 30
"""Bytes for the interpreter, its libraries and the threads' stacks, beside what the model takes."""

_DEFAULT_GRAMINE = Gramine(
    "/usr/lib/x86_64-linux-gnu/gramine/libsysdb.so", "/usr/lib/x86_64-linux-gnu/gramine/runtime/glibc"
)
"""Where its Debian package puts it, for a manifest that is signed elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What to build. `launch`, `config`: exact bytes. `size`: of the enclave in bytes, a power of two, 0 for what the model
    needs, which comes out the same for everybody. `most`: bytes that it may take, 0 for any number."""

    launch: bytes
    config: bytes
    model: Path
    size: int = 0
    most: int = 0
    edmm: bool = False
    preheat: bool = False
    cpu: CpuFeatures = field(default_factory=CpuFeatures)


def build(folder: Path, image: Image, gramine: Gramine) -> int:
    """Lays the enclave out in `folder`: its files, and `cloister.manifest`. How many files it may open, beside Gramine's.

    Raises: WrongUse for a config that does not belong to the launch config or is not for SGX, a model that the launch config
    does not name or that does not fit, and a folder that is in use.
    """
    config = _fitting_config(image)
    description = read_description(image.model)
    needed = estimate(
        description,
        context=config.context_length,
        streams=config.slots,
        kv_type=config.kv_type,
        available=0,
    )
    size = _fitting_size(image, power_of_two(needed.resident + _OURS))
    digests = stage(folder, collect(code_files(), library_dir(), image.model), image.launch)
    enclave = Enclave(
        launch=image.launch,
        files=digests,
        gramine=gramine,
        memory=Memory(size=size, edmm=image.edmm, preheat=image.preheat),
        threads=most_threads(len(description.tensors)),
        cpu=image.cpu,
    )
    if digests[MODEL] not in parse_launch(image.launch).models:
        raise WrongUse("The launch config names another model.", step="launch.models", got=digests[MODEL])
    (folder / f"{NAME}.manifest").write_text(render(enclave))
    return len(digests) + 1


def _fitting_size(image: Image, least: int) -> int:
    given = min(image.size or least, image.most or least)
    if given < least:
        raise WrongUse(
            "There is less memory than an enclave with this model takes.",
            hint="Give it more, or serve fewer --slots, or a smaller --context.",
            step="memory",
            expected=f"{least >> 20} MiB, a power of two",
            got=f"{given >> 20} MiB",
        )
    return image.size or least


def measure(image: Image) -> dict[str, str | int]:
    """The entry for a policy's measurements of `sgx`: what anybody measures who builds this image. Nothing of it is kept.

    Raises: what `build` and `sign` raise.
    """
    gramine = find_gramine()
    with tempfile.TemporaryDirectory() as folder:
        image_folder = Path(folder) / "image"
        build(image_folder, image, gramine)
        signed = sign(image_folder, signing_key())
    return signed.entry(image.launch)


def _fitting_config(image: Image) -> EnclaveConfig:
    config = parse_config(image.config)
    if hashlib.sha256(image.config).hexdigest() != parse_launch(image.launch).config_sha256:
        raise WrongUse("The config is not the one that the launch config names.", step="config")
    if config.platform != PLATFORM or config.engine != "thread" or config.upstream is not None:
        raise WrongUse(
            "This config is not for an enclave of SGX.",
            step="config",
            expected='platform "sgx", engine "thread", no upstream',
            got=f"platform {config.platform!r}, engine {config.engine!r}",
            hint="In SGX a child process would be another enclave, so the engine runs in a thread.",
        )
    return config


def boot_lines(image: Image, name: str, keys: Sequence[KeyHash], *, host: str, port: int) -> bytes:
    """What the enclave reads on standard input: where to listen, and the boot line."""
    boot = Boot(
        launch=image.launch,
        config=image.config,
        listen_fd=-1,
        model_path=MODEL,
        model_name=name,
        engine_dir=ENGINE,
        api_keys=tuple(keys),
    )
    return json.dumps({"host": host, "port": port}).encode() + b"\n" + boot.encode()


def signing_key() -> Path:
    """This user's key for SGX, made on the first use. Raises: WrongUse."""
    path = state_directory() / "sgx-signing.pem"
    if not path.exists():
        private_file.write_once(path, make_signing_key())
    private_file.refuse_shared(path)
    return path


def gramine_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Made here; must not be there yet.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="default, tiny, a .gguf file, or hf.co/org/repo[:quant].")] = "default",
    launch: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The launch config. Absent: one of this user's own.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The enclave's config that the launch config names.")
    ] = None,
    deployment: Annotated[str, typer.Option(metavar="NAME", help="Of a launch config of one's own.")] = "local",
    context: Annotated[int | None, typer.Option(min=64, help="Tokens per conversation.")] = None,
    slots: Annotated[int, typer.Option(min=1, max=64, help="Conversations answered at the same time.")] = 16,
    kv_type: Annotated[str, typer.Option(help="The cache's numbers: f16, or q8_0 in half the memory.")] = "f16",
    api_keys: Annotated[Path | None, typer.Option(help="Hashes of API keys, from `cloister keys new`.")] = None,
    host: Annotated[str, typer.Option(help="The address that the enclave will listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="And its port.")] = 8484,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="The enclave's. Absent: what the model needs.")] = "",
    edmm: Annotated[bool, typer.Option("--edmm", help="Add memory as it is used; needs SGX2 and Linux 6.0.")] = False,
    preheat: Annotated[bool, typer.Option("--preheat", help="Touch all memory at the start.")] = False,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Only write it, for a machine that has Gramine to sign.")
    ] = False,
    dangerously_without_api_keys: Annotated[bool, typer.Option(help="Let everybody ask who can reach it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build an SGX enclave for Gramine, sign it, and say what it measures."""
    if kv_type not in KV_TYPES:
        raise WrongUse("The cache has no such type.", expected=" or ".join(KV_TYPES), got=output.one_line(kv_type, 40))
    if folder.exists():
        raise WrongUse("There is something of that name already.", hint="Name a folder that is not there yet.")
    if (launch is None) != (config is None):
        raise WrongUse("A launch config and its config belong together.", hint="--launch FILE --config FILE")
    keys = read_keys(api_keys) if api_keys else ()
    if launch is None and not (keys or dangerously_without_api_keys):
        hint = "`cloister keys new` makes them. To go without: --dangerously-without-api-keys"
        raise WrongUse("An enclave on real hardware asks for API keys, and none were given.", hint=hint)
    gramine = _DEFAULT_GRAMINE if unsigned else find_gramine()
    with output.download_bar() as bar:
        found = resolve(model, progress=bar)
    if launch is not None and config is not None:
        words, settings = read_file(launch), read_file(config)
    else:
        words, settings = _own(found, keys, deployment, context_length=context, slots=slots, kv_type=kv_type)
    image = Image(
        launch=words,
        config=settings,
        model=found.path,
        size=power_of_two(parse_size(memory)) if memory else 0,
        edmm=edmm,
        preheat=preheat,
    )
    count = build(folder, image, gramine)
    private_file.write(folder / "boot", boot_lines(image, found.name, keys, host=host, port=port))
    (folder / "config.json").write_bytes(settings)
    (folder / "launch.json").write_bytes(words)
    signed = None if unsigned else sign(folder.absolute(), signing_key())
    _tell(folder, count, words, signed, as_json=as_json)


def _own(model: LocalModel, keys: Sequence[KeyHash], deployment: str, **settings: Any) -> tuple[bytes, bytes]:
    """A launch config of this user's own, and the config that it names."""
    plan = Plan.make(model, keys=keys, platform=PLATFORM, engine="thread", **settings)
    return replace(plan, deployment=deployment).launch(), plan.config.encode()


def _tell(folder: Path, count: int, launch: bytes, signed: Signed | None, *, as_json: bool) -> None:
    launch_sha256 = launch_digest(launch).hex()
    if as_json:
        measured = {} if signed is None else {"mr_enclave": signed.mr_enclave, "mr_signer": signed.mr_signer}
        output.json_value({"v": 1, "folder": str(folder), "files": count, "launch_sha256": launch_sha256, **measured})
        return
    output.note(f"{count} files, each named with its digest in {folder}/{NAME}.manifest")
    if signed is None:
        command = f"gramine-sgx-sign --manifest {NAME}.manifest --output {NAME}.manifest.sgx --key KEY.pem"
        output.note(f"not signed; on a machine with Gramine, in that folder: {command}")
        return
    output.note("start   (cat boot; cat) | gramine-sgx cloister, in that folder", hang=8)
    output.line("[measurements]")
    output.line(f'sgx = [{{ mr_enclave = "{signed.mr_enclave}", launch_sha256 = "{launch_sha256}" }}]')
