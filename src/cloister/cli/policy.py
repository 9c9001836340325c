"""`cloister policy`: write a policy from what is running, accept it, show it, check it, sign it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cloister.cli import output
from cloister.cli.judgement import refusal_json, show_refusal
from cloister.cli.output import AsJson
from cloister.cli.policy_file import (
    canonical,
    fingerprint,
    grouped,
    key_name,
    load_policy,
    read_file,
    read_key,
    signature_file,
    signature_of,
    signed_by,
    to_toml,
    write_file,
)
from cloister.cli.trust import SimulatorRoot, Trust, configured_signers, split, with_fragment
from cloister.cli.verify import examine, is_address, read_saved
from cloister.client import Session
from cloister.client.explanations import explain
from cloister.client.memory import FileMemory
from cloister.errors import CloisterError, MalformedPolicy, NotTrusted, VerificationFailed, WrongUse
from cloister.evidence.launch import NO_LOGS, OWNER_KEY
from cloister.evidence.provenance import Payload, Provenance, signed_bytes
from cloister.evidence.simulated import COMPONENTS
from cloister.evidence.simulated import PLATFORM as SIMULATED
from cloister.evidence.statement import INSECURE_NAMES
from cloister.verify import Factor, Policy, Tcb, Verified, parse_policy
from cloister.verify.policy import GPUS, SNP_TCB, UNKNOWN

__all__ = ["register"]

_CODE: Mapping[str, tuple[str, ...]] = {
    SIMULATED: COMPONENTS,
    "sgx": ("mr_enclave", "launch_sha256"),
    "tdx": ("mr_td", "rtmr1", "rtmr2"),
    "sev-snp": ("measurement",),
    "nitro": ("pcr0",),
    "azure-tdx": ("mr_td", "pcr4", "pcr9", "pcr11"),
    "azure-sev-snp": ("measurement", "pcr4", "pcr9", "pcr11"),
    "vtpm": ("pcr4", "pcr9", "pcr11"),
    GPUS: ("driver", "vbios", "measurements"),
}
"""Platform -> the components that pin what runs there, as `cloister.verify.policy` demands them."""

File = Annotated[Path, typer.Argument(metavar="FILE", help="The policy.", show_default=False)]
Key = Annotated[Path, typer.Option("--key", metavar="OWNER.pem", help="The signer's private key (Ed25519).")]


def register(app: typer.Typer) -> None:
    app.callback()(_family)
    app.command("init")(init)
    app.command("accept")(accept)
    app.command("show")(show)
    app.command("check")(check)
    app.command("sign")(sign)
    app.command("measurements")(measurements)


def _family() -> None:
    """What to believe: write, accept, show, check and sign policies."""


# From what is running


def init(
    source: Annotated[str, typer.Option("--from", metavar="URL|DOC", help="An enclave, or a saved document of one.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Absent: to standard output.", show_default=False)
    ] = None,
    replace_it: Annotated[bool, typer.Option("--replace", help="Put it in the place of another FILE.")] = False,
    tolerate: Annotated[
        list[str] | None, typer.Option("--tolerate", metavar="STATUS", help="A firmware status besides UpToDate.")
    ] = None,
    dangerously_trust_simulator: SimulatorRoot = None,
) -> None:
    """Write a policy from what is running: genuine hardware, and from now on exactly this code, owner and model.

    It says what runs, not that it is right: every screen says FIRST USE until its fingerprint was compared. What the enclave
    was started without is tolerated from then on, by name, and shown.
    """
    policy = _write_down(source, _open_policy(source, tolerate or [], dangerously_trust_simulator))
    comment = f"Written by `cloister policy init --from {output.one_line(split(source)[0])}`."
    _warn_of_weakened(policy)
    root = dangerously_trust_simulator.absolute() if dangerously_trust_simulator else None
    text = to_toml(policy, comment=comment, root=root)
    if out is None:
        output.write(text)
    elif not _keep(out, policy, replace_it):
        write_file(out, text)
        output.line(f"wrote {out}")
        if signature_file(out).exists():
            output.note(f"{signature_file(out)} is of the old policy: sign the new one.", "yellow")
    _note_fingerprint(policy if out is None else load_policy(out), out)


def _open_policy(source: str, tolerated: Iterable[str], root: Path | None) -> Policy:
    """Whatever is genuine: it names no code (whose factors then tell what runs), and what the address names."""
    policy = Policy(
        measurements={name: (dict.fromkeys(components, UNKNOWN),) for name, components in _CODE.items()},
        tcb=Tcb(tolerate=frozenset(tolerated), min_sev_snp={"snp": 0}),
        simulator_root=read_file(root) if root else None,
        tolerate_insecure=INSECURE_NAMES,  # until it is known which there are
    )
    return with_fragment(policy, split(source)[1]) if is_address(source) else policy


def _write_down(source: str, opened: Policy) -> Policy:
    """(1) judge under a policy that names no code: it fails, and must fail in nothing but in what a policy pins
    (2) write down what these factors got
    (3) judge again under that policy, which now has to hold

    Raises: VerificationFailed for evidence that is not genuine, or changes in between; what verification raises.
    """
    try:
        factors: tuple[Factor, ...] = _judge(source, opened).factors
    except VerificationFailed as error:
        factors = tuple(factor for factor in error.factors if isinstance(factor, Factor))
        genuine = tuple(factor for factor in factors if factor.verdict != "fail" or not _is_pin(factor.step))
        wrong = [factor for factor in genuine if factor.verdict == "fail"]
        if wrong or not factors:
            names = ", ".join(factor.step for factor in wrong) or error.step
            _refuse(VerificationFailed(f"Not genuine: {names}.", factors=genuine, hint=wrong[0].hint if wrong else ""))
    policy = _pinned(opened, factors)
    try:
        verified = _judge(source, policy)
    except VerificationFailed as error:
        _refuse(error)
    return replace(policy, tolerate_insecure=policy.tolerate_insecure & set(verified.statement.insecure))


def _warn_of_weakened(policy: Policy) -> None:
    for name in sorted(policy.tolerate_insecure):
        meaning = explain(f"insecure.{name}") or explain("insecure")
        told = f"  {name}: the policy tolerates it. {meaning.meaning if meaning else ''}"
        output.note(output.styled(("WEAKENED", "bold red"), (told, "")), hang=2)


def _judge(source: str, policy: Policy) -> Verified:
    if not is_address(source):
        return read_saved(Path(source)).judge(policy)
    with Session(split(source)[0], policy=policy, memory=FileMemory()) as session:
        return session.verify()


def _refuse(error: VerificationFailed) -> NoReturn:
    """Shows every factor. Raises: typer.Exit."""
    show_refusal(error)
    raise typer.Exit(error.exit_code) from error


def _is_pin(step: str) -> bool:
    return step in ("owner", "deployment", "app", "models", "key-scope") or (
        "measurement" in step.split(".")[:2] and not step.startswith("evidence.")
    )


def _pinned(opened: Policy, factors: Iterable[Factor]) -> Policy:
    got = {factor.step: factor.got for factor in factors}
    platform = got.get("platform", "")
    gpus = sorted({step.partition(".")[0] for step in got if step.startswith("gpu-")})
    return replace(
        opened,
        trust="first-use",
        platforms=(platform,),
        deployment=opened.deployment or got.get("deployment"),
        owner_key=opened.owner_key or got.get("owner"),
        models=frozenset(got.get("models", "").split()) or None,
        config=got.get("config", "").removeprefix("sha256:"),
        app=got.get("app", "").removeprefix("sha256:") or None,
        tcb=replace(opened.tcb, min_sev_snp=_least_firmware(got.get("tcb.minimum", ""))),
        measurements={platform: (_measured(got, ""),), **_measured_gpus(got, gpus)},
        limits=replace(opened.limits, gpus=sum(not _is_switch(got, gpu) for gpu in gpus) or None),
    )


def _least_firmware(reported: str) -> dict[str, int]:
    """What runs, as the least that may run: AMD rates no firmware. Of `bootloader=3 tee=0 …`, or nothing elsewhere."""
    parts = (part.partition("=") for part in reported.split())
    return {name: int(value) for name, _, value in parts if name in SNP_TCB and value.isdecimal()}


def _measured(got: Mapping[str, str], label: str) -> dict[str, str]:
    start = f"{label}measurement."
    return {
        step.removeprefix(start): value for step, value in got.items() if step.startswith(start) and value != "nothing"
    }


def _is_switch(got: Mapping[str, str], label: str) -> bool:
    return got.get(f"{label}.evidence.architecture", "").startswith("ls10")


def _measured_gpus(got: Mapping[str, str], gpus: Iterable[str]) -> dict[str, tuple[dict[str, str], ...]]:
    """One entry for each kind of GPU."""
    entries: list[dict[str, str]] = []
    for entry in (_measured(got, f"{gpu}.") for gpu in gpus):
        if entry not in entries:
            entries.append(entry)
    return {GPUS: tuple(entries)} if entries else {}


def _keep(path: Path, new: Policy, replace_it: bool) -> bool:
    """Whether FILE says the same already and stays as it is. Where it says something else, the difference is shown.

    Raises: WrongUse without --replace.
    """
    if not path.exists():
        return False
    old = load_policy(path)
    if canonical(old) == canonical(new):
        output.line(f"{path} says so already")
        return True
    _show_difference(canonical(old), canonical(new))
    if not replace_it:
        hint = "If the owner confirms the change by another way: the same command with --replace."
        raise WrongUse(f"What runs is not what {path} says; it was left as it is.", hint=hint)
    return False


def _show_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, after = dict(_flat(old)), dict(_flat(new))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            output.line(name)
            for mark, style, side in (("  - ", "red", before), ("  + ", "green", after)):
                output.line(output.styled((mark, style), (output.one_line(side.get(name, "(not said)"), 1000), "")))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """`measurements.tdx[0].mr_td` -> its value; a list of plain values is one value."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _flat(one, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for at, one in enumerate(value):
            yield from _flat(one, f"{name}[{at}]")
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _note_fingerprint(policy: Policy, out: Path | None) -> None:
    output.note(f"fingerprint {grouped(fingerprint(policy))}")
    if policy.trust == "first-use":
        words = "  compare the fingerprint with the owner's, by another way than this server; then:"
        output.note(output.styled(("FIRST USE", "bold yellow"), (words, "")), hang=2)
        output.note(f"  cloister policy accept {out or 'FILE'} --fingerprint …")


# Once written


def accept(
    file: File,
    told: Annotated[str, typer.Option("--fingerprint", metavar="F", help="As the owner told you, by another way.")],
) -> None:
    """Say that a policy written from a running server is the owner's: its fingerprint is the one you were told."""
    data = read_file(file)
    policy = _parse(file, data)
    got, expected = fingerprint(policy), "".join(told.split()).replace(":", "").replace("-", "").lower()
    if got != expected:
        raise NotTrusted(
            "This is another policy than the one whose fingerprint you were told.",
            hint="All of the fingerprint is needed. If it was copied whole: somebody changed something. Ask the owner.",
            step="policy.fingerprint",
            expected=grouped(expected),
            got=grouped(got),
        )
    if policy.trust is None:
        output.line(f"{file} was accepted before")
        return
    write_file(file, _without_trust(file, data, policy))
    output.line(f"accepted {file}")
    if signature_file(file).exists():
        output.note(f"{signature_file(file)} is of the file before this: it has to be signed anew.", "yellow")


def _without_trust(file: Path, data: bytes, policy: Policy) -> str:
    """The same text without the line. Raises: WrongUse when it cannot be found."""
    lines = data.decode().splitlines(keepends=True)
    for at, line in enumerate(lines):
        if line.partition("=")[0].strip() == "trust":
            text = "".join([*lines[:at], *lines[at + 1 :]])
            try:
                if _parse(file, text.encode()) == replace(policy, trust=None):
                    return text
            except MalformedPolicy:
                continue
    raise WrongUse(f"{file} has its trust = … in a place of its own.", hint="Delete it by hand: the fingerprint fits.")


def _parse(file: Path, data: bytes) -> Policy:
    return parse_policy(data, read=lambda name: read_file(file.parent / name))


def show(file: File, as_json: AsJson = False) -> None:
    """What a policy allows, in words; its fingerprint; who signed it. Exit code 3 for a signature that does not fit."""
    data = read_file(file)
    policy = _parse(file, data)
    wrong: CloisterError | None = None
    try:
        signer = signed_by(file, data)
    except NotTrusted as error:
        signer, wrong = "", error
    if as_json:
        output.json_value(
            {
                **_said(policy, signer),
                "signature_fits": None if wrong is None and not signer else wrong is None,
                "policy": canonical(policy),
            }
        )
    else:
        if policy.trust == "first-use":
            output.line(output.styled(("FIRST USE", "bold yellow"), ("  written from a running server", "")))
        for name, value in _words(policy):
            output.line(f"{name:<13} {output.one_line(value, 400)}", hang=14)
        output.line(f"{'fingerprint':<13} {grouped(fingerprint(policy))}", hang=14)
        output.line(f"{'signed by':<13} {'NOBODY: the signature does not fit' if wrong else signer or 'nobody'}")
    if wrong is not None:
        raise wrong


def _words(policy: Policy) -> Iterator[tuple[str, str]]:
    """Beginnings of lines and what they say; a beginning may come more than once."""
    yield "hardware", ", ".join(policy.platforms) if policy.platforms else "any that can be verified"
    if policy.simulator_root is not None:
        yield "SIMULATOR", "believed, under the root that it names: whoever runs it can read everything"
    yield "deployment", policy.deployment or "none named: the address has to"
    yield "owner", policy.owner_key or "none named: the address has to"
    yield "models", _any_of(policy.models, "whatever the deployment was started with")
    yield "configuration", _any_of(None if policy.config is None else {policy.config}, "any")
    yield "app", _any_of(None if policy.app is None else {policy.app}, "any")
    yield from _words_on_code(policy)
    yield from _words_on_firmware(policy)
    machines = policy.limits.platform_ids
    yield "machines", _any_of(machines, "any")
    if policy.limits.gpus is not None:
        yield "GPUs", f"{policy.limits.gpus}, no more and no fewer"
    yield "weakened", ", ".join(sorted(policy.tolerate_insecure)) or "nothing is tolerated"
    if policy.broker_key is not None:
        yield "broker", f"{policy.broker_key} may hand it keys and secrets too"
    if policy.logs != NO_LOGS:
        yield "logs", "what the app writes to its logs may be public"
    yield "post-quantum", "demanded" if policy.require_pq else "taken where it is offered"


def _any_of(values: Iterable[str] | None, otherwise: str) -> str:
    return otherwise if values is None else " or ".join(sorted(values)) or "none"


def _words_on_code(policy: Policy) -> Iterator[tuple[str, str]]:
    for platform, entries in policy.measurements.items():
        for at, entry in enumerate(entries):
            for name, value in entry.items():
                yield "code", f"{platform}{f' (or {at + 1})' if at else ''}: {name} {value}"
    if policy.measurements_signer is not None:
        yield "code", f"what {policy.measurements_signer} signed for the release that runs"
    if policy.sigstore is not None:
        yield "code", f"what {policy.sigstore['identity']} ({policy.sigstore['issuer']}) signed through sigstore"
    if not (policy.measurements or policy.measurements_signer or policy.sigstore):
        yield "code", "none named: no hardware is believed"


def _words_on_firmware(policy: Policy) -> Iterator[tuple[str, str]]:
    tcb, limits = policy.tcb, policy.limits
    yield "firmware", " or ".join(["UpToDate", *sorted(tcb.tolerate)])
    if tcb.tolerate_advisories is not None:
        yield "firmware", f"open advisories: {', '.join(sorted(tcb.tolerate_advisories)) or 'none'}"
    if tcb.min_tcb_evaluation_data_number is not None:
        yield "firmware", f"Intel's ratings from number {tcb.min_tcb_evaluation_data_number} on"
    if tcb.min_sev_snp:
        least = ", ".join(f"{name} {value}" for name, value in sorted(tcb.min_sev_snp.items()))
        yield "firmware", f"AMD's parts at least: {least}"
    if limits.max_crl_age_days is not None:
        yield "revocation", f"lists of at most {limits.max_crl_age_days} days"
    if limits.dangerously_allow_missing_crl:
        yield "revocation", "DANGEROUS: evidence without a list of withdrawn keys is believed too"


def check(
    file: File,
    target: Annotated[str, typer.Argument(metavar="[URL|DOC]", help="Also judge this.", show_default=False)] = "",
    signer: Annotated[
        str, typer.Option("--signer", metavar="ed25519:…", help="Demand this person's signature in FILE.sig.")
    ] = "",
    dangerously_trust_simulator: SimulatorRoot = None,
    as_json: AsJson = False,
) -> None:
    """Whether a policy is well formed, signed by whom it must be, and (with a target) what would fail under it.

    Exit code 0 when nothing is wrong. 3: not signed, signed for other bytes, or the target is not trusted. 4: malformed.
    5: unreachable.
    """
    if signer and not OWNER_KEY.fullmatch(signer):
        raise WrongUse("--signer names no key.", expected="ed25519: and 43 characters of base64url", got=signer)
    policy = load_policy(file, [*configured_signers(), *([signer] if signer else [])])
    found = signed_by(file, read_file(file))
    if not as_json:
        output.line(f"{file} is well formed{' and signed by ' + found if found else ''}")
        if policy.trust == "first-use":
            words = ("  written from a running server, and not accepted yet", "")
            output.line(output.styled(("FIRST USE", "bold yellow"), words))
    verified, refusal = _examined(target, Trust(file, dangerously_trust_simulator)) if target else (None, None)
    if as_json:
        judged = refusal_json(refusal) if refusal else verified.to_json() if verified else None
        output.json_value({**_said(policy, found), "judged": judged})
    elif verified:
        _show_open_points(verified)
    elif refusal:
        show_refusal(refusal)
    if refusal:
        raise typer.Exit(refusal.exit_code)


def _said(policy: Policy, signer: str) -> dict[str, Any]:
    """What `show` and `check` say of the file itself."""
    return {
        "v": 1,
        "fingerprint": fingerprint(policy),
        "first_use": policy.trust == "first-use",
        "signed_by": signer or None,
    }


def _examined(target: str, trust: Trust) -> tuple[Verified | None, CloisterError | None]:
    try:
        return examine(target, trust), None
    except CloisterError as error:
        return None, error


def _show_open_points(verified: Verified) -> None:
    open_points = [factor.step for factor in verified.factors if factor.verdict == "not-checked"]
    output.line(f"nothing fails; not proved: {', '.join(open_points) or 'nothing listed'}")


# Signing


def sign(
    file: File,
    key: Key,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.sig", help="Absent: beside FILE.", show_default=False)
    ] = None,
) -> None:
    """Sign a policy's exact bytes. Whoever names you as `policy_signer` then knows that it is yours."""
    data, private = read_file(file), read_key(key)
    if _parse(file, data).trust == "first-use":
        raise WrongUse(f"{file} is first use: nobody has compared it.", hint="`cloister policy accept` first.")
    where = out or signature_file(file)
    write_file(where, signature_of(data, private))
    output.line(f"wrote {where}")
    output.note(f"signed by {key_name(private)}")


def measurements(
    file: File,
    release: Annotated[int, typer.Option("--release", metavar="N", min=0, help="The release that they are those of.")],
    key: Key,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Where the signed measurements go.")],
) -> None:
    """Sign a policy's [measurements] for one release, to travel with the evidence.

    Clients whose policy names you as `measurements_signer` then follow your releases without a new policy.
    """
    policy, private = load_policy(file), read_key(key)
    if not policy.measurements or policy.deployment is None:
        raise WrongUse(f"{file} has no [measurements], or names no deployment that they are of.")
    payload = Payload(policy.deployment, release, policy.measurements).encode()
    signed = Provenance(payload, key=key_name(private), signature=private.sign(signed_bytes(payload)))
    write_file(out, signed.item().content.decode() + "\n")
    count = sum(len(entries) for entries in policy.measurements.values())
    output.line(f"wrote {out}: {count} measurement{'s' if count > 1 else ''} of release {release}")
    output.note(f"signed by {key_name(private)}")
