"""`cloister serve MODEL`: an enclave on this machine."""

import asyncio
import contextlib
import ipaddress
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cloister.cli import output
from cloister.cli.keys import read_keys
from cloister.cli.local import LocalEnclave, Plan, group_policy_for, state_directory, write_root
from cloister.cli.progress import loading_bar
from cloister.enclave.attest.detect import Machine, detect
from cloister.enclave.llm.llama.config import KV_TYPES
from cloister.enclave.llm.llama.library import library_dir
from cloister.enclave.llm.upstream import Address, find_model, parse_address
from cloister.errors import EngineDied, MalformedModel, WrongUse
from cloister.evidence.simulated import PLATFORM
from cloister.host.process import names_of
from cloister.models.download import resolve
from cloister.models.gguf import read_description
from cloister.models.memory import available_memory, estimate, judge
from cloister.models.store import LocalModel
from cloister.private_file import write_once
from cloister.sim import Device, measure

__all__ = ["register", "wait_for_end"]

_DEFAULT = "default"
Model = Annotated[str, typer.Argument(help="default, tiny, a .gguf file, or hf.co/org/repo[:quant].")]
Context = Annotated[int | None, typer.Option(min=64, help="Tokens per conversation; absent: the model's own.")]
Slots = Annotated[int, typer.Option(min=1, max=64, help="Conversations answered at the same time.")]


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    model: Model = _DEFAULT,
    platform: Annotated[str, typer.Option(help="`sim` simulates a TEE; absent: the one that this machine has.")] = "",
    host: Annotated[str, typer.Option(help="The loopback address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8484,
    context: Context = None,
    slots: Slots = 16,
    kv_type: Annotated[str, typer.Option(help="The cache's numbers: f16, or q8_0 in half the memory.")] = "f16",
    api_keys: Annotated[Path | None, typer.Option(help="Hashes of API keys, from `cloister keys new`.")] = None,
    engine_thread: Annotated[bool, typer.Option(help="The engine in a thread, as SGX needs it.")] = False,
    endorsements: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The vendor's collateral for clients; read anew for each of them."),
    ] = None,
    ehbp: Annotated[
        bool,
        typer.Option("--ehbp", help="Weaker, and so named to all clients: take EHBP too, which seals bodies only."),
    ] = False,
    plaintext: Annotated[
        bool,
        typer.Option("--plaintext", help="For comparison: answer this machine's programs unsealed too; all are told."),
    ] = False,
    tls: Annotated[
        bool,
        typer.Option(
            "--tls", help="Weaker, and so named to all clients: answer by TLS too, which ends inside the enclave."
        ),
    ] = False,
    tls_port: Annotated[int, typer.Option(min=0, max=65535, help="Where TLS listens; 0: any free port.")] = 8443,
    tls_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What clients call the TLS listener's address; may be repeated."),
    ] = None,
    upstream: Annotated[
        str,
        typer.Option(metavar="URL", help="Weaker, and so named to all clients: a server on loopback runs the model."),
    ] = "",
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The upstream's model, for its chat template; llama-server tells its own."),
    ] = None,
    group: Annotated[
        Path | None,
        typer.Option(
            "--group",
            metavar="FILE",
            help="Weaker: share keys with the replicas that this policy lets in; simulated, it is written where it is missing.",
        ),
    ] = None,
    join: Annotated[
        str,
        typer.Option(
            "--join",
            metavar="URL",
            help="A member that lets this replica in, or `wait` for a broker; absent: it begins the group.",
        ),
    ] = "",
    dangerously_without_api_keys: Annotated[
        bool, typer.Option(help="On real hardware: let everybody ask who can reach it.")
    ] = False,
) -> None:
    """Run a model in an enclave until interrupted."""
    if kv_type not in KV_TYPES:
        raise WrongUse("The cache has no such type.", expected=" or ".join(KV_TYPES), got=output.one_line(kv_type, 40))
    platform = _find_platform(platform)
    simulated = platform == PLATFORM
    if plaintext and not _is_loopback(host):
        hint = "Leave --host away, or --plaintext: whoever is on the way would read every prompt."
        raise WrongUse("Plaintext is answered on loopback only.", hint=hint, got=output.one_line(host, 60))
    if not tls and tls_name:
        raise WrongUse("--tls-name names the TLS listener, and there is none.", hint="Add --tls.")
    if tls and not (tls_name or names_of(host)):
        raise WrongUse("The TLS listener has no name.", hint="What clients call it: --tls-name chat.example.org")
    if simulated:
        _check_host(host)
    elif not (api_keys or dangerously_without_api_keys):
        hint = "`cloister keys new` makes them. To go without: --dangerously-without-api-keys"
        raise WrongUse("An enclave on real hardware asks for API keys, and none were given.", hint=hint)
    keys = read_keys(api_keys) if api_keys else ()
    address = parse_address(upstream) if upstream else None
    if address is not None:
        found = _ask_upstream(address, model)
    else:
        with output.download_bar() as bar:
            found = resolve(model, progress=bar)
        _weigh(found.path, context, slots, kv_type)
    output.note("measuring the code that will run", "dim")
    plan = Plan.make(
        found,
        keys=keys,
        platform=platform,
        context_length=context,
        slots=slots,
        kv_type=kv_type,
        engine="thread" if engine_thread else "process",
        ehbp=ehbp,
        plaintext=plaintext,
        tls=tls,
        upstream=address.url if address else None,
        group_policy=_read_group(group, join, simulated=simulated),
    )
    with LocalEnclave(
        plan,
        host=host,
        port=port,
        endorsements=endorsements,
        tokenizer=tokenizer,
        tls_port=tls_port,
        tls_names=tls_name or (),
        join=join,
    ) as enclave:
        with loading_bar() as progress:
            ready = enclave.start(progress)
        _announce(enclave, ready)
        wait_for_end(enclave)


def _read_group(file: Path | None, join: str, *, simulated: bool) -> str | None:
    """A key group's policy. Raises: WrongUse."""
    if file is None:
        if join:
            raise WrongUse("--join is for a replica of a key group.", hint="Name the group's policy: --group FILE")
        return None
    if simulated and not file.exists():
        device = Device.open(state_directory() / "sim")
        try:
            write_once(file, group_policy_for(measure(library_dir()), device.root_pem).encode())
        except OSError as error:
            raise WrongUse(f"The group's policy {file} cannot be written.", got=error.strerror) from error
        output.note(f"group   {file} was written: replicas of exactly this code, on this machine", hang=8)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "A policy file, as `cloister image policy` writes one; all replicas are given the same."
        raise WrongUse(f"The group's policy {file} cannot be read.", hint=hint) from error


def _ask_upstream(address: Address, model: str) -> LocalModel:
    """What it says that it runs. Raises: WrongUse, EngineDied."""
    if model != _DEFAULT:
        raise WrongUse("With --upstream the model is the upstream's.", hint="Leave the model away.")
    return LocalModel(Path(), asyncio.run(find_model(address)), f"the upstream at {address.authority}")


def _find_platform(asked: str) -> str:
    """The platform asked for, which must be there; or the one that is. Never a simulated one unasked."""
    if asked == PLATFORM:
        return asked
    found = detect(Machine()).platform
    if found is None:
        raise WrongUse(
            "No TEE that cloister knows was found on this machine, and it does not simulate one unasked.",
            hint="`cloister doctor` says what was looked for. To try it out without protection: "
            "cloister serve --platform sim",
        )
    if asked not in ("", found):
        got = output.one_line(asked, 40)
        raise WrongUse(f"This machine is not platform {got!r}.", hint=f"It is {found}: leave --platform away.")
    return found


def _check_host(host: str) -> None:
    """A simulated enclave is for this machine's own user: its root and its API stay on loopback."""
    if not _is_loopback(host):
        hint = "Leave --host away. Others would take for an enclave what its operator can read."
        raise WrongUse("A simulated enclave listens on loopback only.", hint=hint, got=host)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _weigh(model: Path, context: int | None, streams: int, kv_type: str) -> None:
    """What loading will take, before it is tried. A file that cannot be described is the engine's to refuse."""
    with contextlib.suppress(MalformedModel):
        free = available_memory()
        described = read_description(model)
        needed = estimate(described, context=context, streams=streams, kv_type=kv_type, available=free)
        output.note(f"memory  {needed}", "dim", hang=8)
        if tight := judge(needed, free):
            output.note(f"warning: {tight}", "yellow", hang=9)


def _announce(enclave: LocalEnclave, ready: dict[str, Any]) -> None:
    simulated = enclave.plan.config.platform == PLATFORM
    if simulated:
        output.note(
            output.styled(
                ("SIMULATED", "bold yellow"),
                ("  whoever runs this machine can read everything. For trying out, not for secrets.", ""),
            ),
            hang=2,
        )
    else:
        output.note(f"platform {enclave.plan.config.platform}; clients verify it themselves", hang=2)
    about = f"({ready.get('quantization')}), sha256:{ready.get('model_sha256')}"
    if enclave.plan.config.upstream:
        about = "as the upstream calls it; which weights those are is not known here"
    output.note(f"model   {ready.get('model')} {about}", hang=8)
    output.note(f"engine  {ready.get('variant')}, {ready.get('slots')} streams of {ready.get('context_length')} tokens")
    if warning := ready.get("lineage_warning"):
        output.note(f"warning: {output.one_line(str(warning))}", "yellow", hang=9)
    output.note(f"owner   {enclave.plan.owner}")
    if enclave.plan.config.group_policy:
        output.note("keys    shared with every replica that the group's policy lets in; every client is told", hang=8)
    if enclave.plan.config.ehbp:
        _warn_of_ehbp()
    if enclave.plan.config.plaintext:
        _warn_of_plaintext(enclave.url)
    if enclave.plan.config.tls:
        _warn_of_tls(enclave.tls_origins)
    if enclave.plan.config.upstream:
        _warn_of_upstream(enclave.plan.config.upstream, chats=bool(ready.get("chats")))
    output.note("")
    if simulated:
        weakened = set(enclave.plan.config.insecure) - {"api-keys-off"}
        policy = " --policy FILE" if weakened else ""
        output.note(f"cloister chat {enclave.url}{policy} --dangerously-trust-simulator {write_root(enclave.device)}")
    else:
        output.note(f"cloister policy init --from {enclave.url}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    output.line(f"ready {enclave.url}")


def _warn_of_ehbp() -> None:
    output.note(
        "EHBP is on: of its requests whoever is on the way reads and changes path, headers (API keys too) and status, "
        "sees lengths, and can cut an answer unnoticed. Every client refuses this enclave unless its policy says: "
        'dangerously_tolerate_insecure = ["ehbp"]',
        "yellow",
        hang=8,
    )


def _warn_of_plaintext(url: str) -> None:
    said = (
        f"  {url}/v1 answers unsealed and unverified, to every user and program of this machine, which can listen. "
        "For comparison and benchmarks. Every client refuses this enclave unless its policy says: "
        'dangerously_tolerate_insecure = ["plaintext"]'
    )
    output.note(output.styled(("PLAINTEXT", "bold yellow"), (said, "")), hang=2)


def _warn_of_tls(origins: Sequence[str]) -> None:
    output.note(
        f"TLS is on: {', '.join(origins)}. Nothing is padded there, nothing is post-quantum, and a client is as safe as it "
        "insists on the certificate that `cloister verify URL --save-cert cert.pem` saved. Every client refuses this enclave "
        'unless its policy says: dangerously_tolerate_insecure = ["tls"]',
        "yellow",
        hang=8,
    )


def _warn_of_upstream(url: str, *, chats: bool) -> None:
    output.note(
        f"An upstream runs the model: {url}. Which server and weights those are, the evidence does not prove. Every client "
        'refuses this enclave unless its policy says: dangerously_tolerate_insecure = ["upstream"]',
        "yellow",
        hang=8,
    )
    if not chats:
        hint = "It does not tell the model's chat template, so that only /v1/completions answers: --tokenizer FOLDER"
        output.note(hint, "yellow", hang=8)


def wait_for_end(enclave: LocalEnclave) -> NoReturn:
    """Until interrupted or terminated. Raises: EngineDied when the enclave ends by itself."""
    code = enclave.process.wait()
    raise EngineDied(f"The enclave ended by itself (status {code}).", hint="Start it again.")
