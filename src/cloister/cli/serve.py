"""`cloister serve MODEL`: an enclave on this machine."""

import asyncio
import contextlib
import ipaddress
import signal
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cloister.cli import output
from cloister.cli.keys import read_keys
from cloister.cli.local import LocalEnclave, Plan, write_root
from cloister.cli.progress import loading_bar
from cloister.enclave.attest.detect import Machine, detect
from cloister.enclave.llm.llama.config import KV_TYPES
from cloister.enclave.llm.upstream import Address, find_model, parse_address
from cloister.errors import EngineDied, MalformedModel, WrongUse
from cloister.evidence.simulated import PLATFORM
from cloister.models.download import resolve
from cloister.models.gguf import read_description
from cloister.models.memory import available_memory, estimate, has_amx, judge
from cloister.models.store import LocalModel

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
    upstream: Annotated[
        str,
        typer.Option(metavar="URL", help="Weaker, and so named to all clients: a server on loopback runs the model."),
    ] = "",
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The upstream's model, for its chat template; llama-server tells its own."),
    ] = None,
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
        upstream=address.url if address else None,
    )
    with LocalEnclave(plan, host=host, port=port, endorsements=endorsements, tokenizer=tokenizer) as enclave:
        with loading_bar() as progress:
            ready = enclave.start(progress)
        _announce(enclave, ready)
        wait_for_end(enclave)


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
        needed = estimate(described, context=context, streams=streams, kv_type=kv_type, amx=has_amx(), available=free)
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
    if enclave.plan.config.ehbp:
        _warn_of_ehbp()
    if enclave.plan.config.plaintext:
        _warn_of_plaintext(enclave.url)
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
