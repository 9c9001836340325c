"""What the commands that talk to an enclave share: the options that say what is believed, and the words that say what was.

Precedence: flag, environment, `cloister.toml` in the working folder, `$XDG_CONFIG_HOME/cloister/config.toml`. The files
may set `policy`, `policy_signer` and `require_pq` in their `[client]` table and nothing else: a folder that somebody sent
you can make cloister stricter, or name a policy (whose name is then shown), but cannot make it trust a simulator by
itself. `policy_signer` ("ed25519:…") demands that whatever policy is read carries that person's signature in FILE.sig;
where both files name a signer, both must have signed.

What was once accepted (releases, collateral) is remembered across commands, and may not go back.
"""

import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urldefrag

import httpx2
import typer
from rich.text import Text

from cloister.cli import output
from cloister.cli.policy_file import load_policy, read_file
from cloister.client import AUTHORITY, AsyncSession, SealedTransport, Session, account
from cloister.client.memory import FileMemory
from cloister.collateral import AMD_KDS, INTEL_PCS, NVIDIA_RIM, Addresses, Cache, Completed, Vendor, complete
from cloister.errors import CloisterError, MalformedPolicy, WrongUse
from cloister.evidence.document import Document
from cloister.evidence.launch import OWNER_KEY
from cloister.verify import Policy, Verified

__all__ = [
    "AmdService",
    "ApiKey",
    "IntelService",
    "NvidiaService",
    "Offline",
    "PolicyFile",
    "RequirePq",
    "SimulatorRoot",
    "Trust",
    "configured_signers",
    "first_use",
    "one_word",
    "open_client",
    "split",
    "summary",
    "verdict",
    "with_fragment",
]

PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy", envvar="CLOISTER_POLICY", metavar="FILE", help="What to believe (TOML). Absent: strictest."
    ),
]
SimulatorRoot = Annotated[
    Path | None,
    typer.Option(
        "--dangerously-trust-simulator",
        metavar="ROOT.pem",
        help="Believe the simulated hardware with this root. Whoever runs it can read everything.",
    ),
]


def one_word(key: str) -> str:
    """Raises: WrongUse, without the key, for one that could not travel in a header."""
    if key and not all("!" <= letter <= "~" for letter in key):
        raise WrongUse("The API key has blanks, line breaks or letters beyond ASCII.", hint="Was it copied whole?")
    return key


ApiKey = Annotated[
    str,
    typer.Option(
        "--api-key",
        envvar="CLOISTER_API_KEY",
        metavar="KEY",
        callback=one_word,
        help="Travels sealed. Better in the environment.",
    ),
]
IntelService = Annotated[
    str,
    typer.Option(
        "--intel", envvar="CLOISTER_INTEL_PCS", metavar="URL", help="A PCCS to ask instead of Intel's own service."
    ),
]
AmdService = Annotated[
    str,
    typer.Option("--amd", envvar="CLOISTER_AMD_KDS", metavar="URL", help="A mirror to ask instead of AMD's service."),
]
NvidiaService = Annotated[
    str,
    typer.Option(
        "--nvidia", envvar="CLOISTER_NVIDIA_RIM", metavar="URL", help="A mirror to ask instead of NVIDIA's service."
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", envvar="CLOISTER_OFFLINE", help="Ask no vendor: what is here has to do.")
]
RequirePq = Annotated[bool, typer.Option("--require-pq", help="Refuse an enclave that offers no post-quantum key.")]

_SETTINGS = frozenset({"policy", "policy_signer", "require_pq"})
_STATUS_STYLES = {"VERIFIED": "bold green", "SIMULATED": "bold yellow", "NOT TRUSTED": "bold red"}


@dataclass(frozen=True, slots=True)
class Trust:
    """The trust options as they were given."""

    policy_file: Path | None = None
    simulator_root: Path | None = None
    require_pq: bool = False
    offline: bool = field(default_factory=lambda: os.environ.get("CLOISTER_OFFLINE", "") not in ("", "0", "false"))
    intel: str = field(default_factory=lambda: os.environ.get("CLOISTER_INTEL_PCS", INTEL_PCS))
    amd: str = field(default_factory=lambda: os.environ.get("CLOISTER_AMD_KDS", AMD_KDS))
    nvidia: str = field(default_factory=lambda: os.environ.get("CLOISTER_NVIDIA_RIM", NVIDIA_RIM))

    def policy(self, url: str = "") -> Policy:
        """The policy that these options and the address's fragment (`#owner=…&deployment=…`) make together.

        Raises: MalformedPolicy; NotTrusted for a policy without the signature that the settings demand; WrongUse for a
        file that cannot be read, or a fragment that contradicts the policy.
        """
        fragment = split(url)[1]
        policy = load_policy(self.policy_file, configured_signers()) if self.policy_file else _configured_policy()
        if self.require_pq or any(table.get("require_pq") for _, table in _configured()):
            policy = replace(policy, require_pq=True)
        if self.simulator_root is not None:
            policy = replace(
                policy,
                simulator_root=read_file(self.simulator_root),
                tolerate_insecure=policy.tolerate_insecure | {"api-keys-off"},
            )
        return with_fragment(policy, fragment)

    def session(self, url: str, *, pin_measurement: bool = False) -> Session:
        return Session(split(url)[0], **self._options(url, pin_measurement))

    def async_session(self, url: str, *, pin_measurement: bool = False) -> AsyncSession:
        return AsyncSession(split(url)[0], **self._options(url, pin_measurement))

    def _options(self, url: str, pin_measurement: bool) -> dict[str, Any]:
        policy = self.policy(url)
        return {
            "policy": policy,
            "require_pq": policy.require_pq,
            "pin_measurement": pin_measurement,
            "memory": FileMemory(),
            "complete": self.complete,
        }

    def complete(self, document: Document, now: float) -> Document:
        """With what the vendor says, where the enclave did not bring it and this machine has not kept it. What cannot be
        had is said, and left for the judgement to miss."""
        try:
            return self.completed(document, now).document
        except CloisterError as error:
            output.note(f"collateral: {output.one_line(error.message)}", "dim")
            return document

    def completed(self, document: Document, now: float, *, early: bool = False) -> Completed:
        """Raises: what `cloister.collateral.complete` raises."""
        with Vendor(Addresses(self.intel, self.amd, self.nvidia)) as vendor:
            asked = None if self.offline else vendor
            return complete(document, vendor=asked, cache=Cache(), now=now, early=early)


def _configured() -> Iterator[tuple[Path, dict[str, Any]]]:
    """The `[client]` tables, strongest first, with the folder that their paths are relative to."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    user = (Path(home) if home else Path.home() / ".config") / "cloister" / "config.toml"
    for path in (Path("cloister.toml"), user):
        if not path.is_file():
            continue
        try:
            table = tomllib.loads(read_file(path).decode()).get("client", {})
        except (ValueError, RecursionError) as error:
            raise MalformedPolicy(f"{path} is not TOML: {error}.") from error
        wrong = set(table) - _SETTINGS if isinstance(table, dict) else {"client"}
        if wrong:
            hint = f"[client]: {', '.join(sorted(_SETTINGS))}"
            raise MalformedPolicy(f"{path} has an unknown setting: {min(wrong)}.", hint=hint)
        if type(table.get("require_pq", False)) is not bool or not isinstance(table.get("policy", ""), str):
            raise MalformedPolicy(f"{path} has a setting of the wrong type.", hint='require_pq = true; policy = "…"')
        signer = table.get("policy_signer")
        if signer is not None and not (isinstance(signer, str) and OWNER_KEY.fullmatch(signer)):
            raise MalformedPolicy(f"{path} names no signer.", hint='policy_signer = "ed25519:…"')
        yield path.parent, table


def configured_signers() -> list[str]:
    """Who must have signed a policy, by the settings."""
    return [table["policy_signer"] for _, table in _configured() if "policy_signer" in table]


def _configured_policy() -> Policy:
    """The policy that the settings name, or the strictest.

    Raises: WrongUse when it loosens something: that takes a person's own `--policy`, not a folder they stand in.
    """
    for folder, table in _configured():
        if name := table.get("policy"):
            path = folder / Path(str(name)).expanduser()
            output.note(f"policy: {path}")
            policy = load_policy(path, configured_signers())
            if policy.simulator_root is not None or policy.tolerate_insecure:
                hint = f"If you mean it: --policy {path}"
                raise WrongUse("The policy named by the settings says dangerously_…, and no flag does.", hint=hint)
            return policy
    return Policy()


def split(url: str) -> tuple[str, str]:
    """The address that is asked, and its fragment. Raises: WrongUse."""
    try:
        address, fragment = urldefrag(url)
    except ValueError as error:
        raise WrongUse(f"This is no address: {error}.", step="url", got=url) from error
    return address, fragment


def with_fragment(policy: Policy, fragment: str) -> Policy:
    """The policy with the owner and deployment that an address's fragment names. Strictly: a pin that was misspelt must
    not be a pin less.

    Raises: WrongUse for a fragment that names something else, or contradicts the policy.
    """
    try:
        pairs = parse_qsl(fragment, keep_blank_values=True, strict_parsing=True, max_num_fields=2) if fragment else []
        fields = dict(pairs)
        if len(fields) != len(pairs) or not fields.keys() <= {"owner", "deployment"} or not all(fields.values()):
            raise ValueError("other fields")
        named = Policy(owner_key=fields.get("owner"), deployment=fields.get("deployment"))
    except (ValueError, MalformedPolicy) as error:
        hint = "It looks like https://host/#owner=ed25519:…&deployment=name."
        raise WrongUse("What follows # in the address names no owner or deployment.", hint=hint, step="url") from error
    owner, deployment = named.owner_key, named.deployment
    for ours, theirs in ((policy.owner_key, owner), (policy.deployment, deployment)):
        if ours and theirs and ours != theirs:
            raise WrongUse(
                "The address and the policy name different owners or deployments.",
                expected=ours,
                got=theirs,
                step="url",
            )
    return replace(policy, owner_key=policy.owner_key or owner, deployment=policy.deployment or deployment)


def open_client(session: Session, api_key: str) -> httpx2.Client:
    """A client whose every request is sealed to what the session verified, and that leads nowhere without it.

    It holds nothing of its own: close the session, not the client.
    """
    return httpx2.Client(
        transport=SealedTransport(session),
        base_url=f"http://{AUTHORITY}",
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx2.Timeout(30.0, read=300.0),
    )


def verdict(simulated: bool | None) -> tuple[str, str]:
    """The word for an outcome and its style; None: not trusted."""
    word = account.word(simulated)
    return word, _STATUS_STYLES[word]


def summary(verified: Verified) -> list[Text]:
    """What was verified, what that is worth, and whether the policy itself waits to be compared."""
    word, style = verdict(verified.simulated)
    models = ", ".join(
        f"{output.one_line(model.name, 60)} ({output.one_line(model.quantization, 20)}, sha256 {model.sha256[:12]}…)"
        for model in verified.statement.models
    )
    until = datetime.fromtimestamp(verified.expires_at, UTC).strftime("%H:%M UTC")
    deployment = f"deployment {output.one_line(verified.launch.deployment, 60)}"
    parts = [output.one_line(verified.platform, 30), deployment, models, f"until {until}"]
    named = "  " + ", ".join(filter(None, parts))
    lines = [output.styled((word, style), (named, "")), output.styled((_worth(verified), "dim"))]
    return [*lines, *first_use(verified)]


def first_use(verified: Verified) -> list[Text]:
    """The line that every screen shows until the policy was compared; [] once it was."""
    if not verified.first_use:
        return []
    return [output.styled(("FIRST USE", "bold yellow"), (f"  {account.FIRST_USE}", ""))]


def _worth(verified: Verified) -> str:
    if verified.simulated:
        return "Simulated hardware: whoever runs it can read all. For trying out, not for secrets."
    open_points = [factor.step for factor in verified.factors if factor.verdict == "not-checked"]
    passed = sum(factor.verdict == "pass" for factor in verified.factors)
    return f"{passed} checks passed; not proved: {', '.join(open_points) or 'nothing listed'}. See `cloister verify`."
