"""What the commands that talk to an enclave share: the options that say what is believed, and the words that say what was.

Precedence: flag, environment, `cloister.toml` in the working folder, `$XDG_CONFIG_HOME/cloister/config.toml`. The files
may set `policy` and `require_pq` in their `[client]` table and nothing else: a folder that somebody sent you can make
cloister stricter, or name a policy (whose name is then shown), but cannot make it trust a simulator by itself.
"""

import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urldefrag

import httpx2
import typer
from rich.text import Text

from cloister.cli import output
from cloister.client import AUTHORITY, AsyncSession, SealedTransport, Session
from cloister.errors import MalformedPolicy, WrongUse
from cloister.verify import Policy, Verified, parse_policy

__all__ = ["ApiKey", "PolicyFile", "RequirePq", "SimulatorRoot", "Trust", "open_client", "summary", "verdict"]

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


def _one_word(key: str) -> str:
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
        callback=_one_word,
        help="Travels sealed. Better in the environment.",
    ),
]
RequirePq = Annotated[bool, typer.Option("--require-pq", help="Refuse an enclave that offers no post-quantum key.")]

_STATUS_STYLES = {"VERIFIED": "bold green", "SIMULATED": "bold yellow", "NOT TRUSTED": "bold red"}
_MOST_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Trust:
    """The trust options as they were given."""

    policy_file: Path | None = None
    simulator_root: Path | None = None
    require_pq: bool = False

    def policy(self, url: str = "") -> Policy:
        """The policy that these options and the address's fragment (`#owner=…&deployment=…`) make together.

        Raises: MalformedPolicy; WrongUse for a file that cannot be read, or a fragment that contradicts the policy.
        """
        fragment = _split(url)[1]
        policy = _load_policy(self.policy_file) if self.policy_file else _configured_policy()
        if self.require_pq or any(table.get("require_pq") for _, table in _configured()):
            policy = replace(policy, require_pq=True)
        if self.simulator_root is not None:
            policy = replace(
                policy,
                simulator_root=_read(self.simulator_root),
                tolerate_insecure=policy.tolerate_insecure | {"api-keys-off"},
            )
        return _with_fragment(policy, fragment)

    def session(self, url: str, *, pin_measurement: bool = False) -> Session:
        return Session(_split(url)[0], **self._options(url, pin_measurement))

    def async_session(self, url: str, *, pin_measurement: bool = False) -> AsyncSession:
        return AsyncSession(_split(url)[0], **self._options(url, pin_measurement))

    def _options(self, url: str, pin_measurement: bool) -> dict[str, Any]:
        policy = self.policy(url)
        return {"policy": policy, "require_pq": policy.require_pq, "pin_measurement": pin_measurement}


def _configured() -> Iterator[tuple[Path, dict[str, Any]]]:
    """The `[client]` tables, strongest first, with the folder that their paths are relative to."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    user = (Path(home) if home else Path.home() / ".config") / "cloister" / "config.toml"
    for path in (Path("cloister.toml"), user):
        if not path.is_file():
            continue
        try:
            table = tomllib.loads(_read(path).decode()).get("client", {})
        except (ValueError, RecursionError) as error:
            raise MalformedPolicy(f"{path} is not TOML: {error}.") from error
        wrong = set(table) - {"policy", "require_pq"} if isinstance(table, dict) else {"client"}
        if wrong:
            raise MalformedPolicy(f"{path} has an unknown setting: {min(wrong)}.", hint="[client]: policy, require_pq")
        if type(table.get("require_pq", False)) is not bool or not isinstance(table.get("policy", ""), str):
            raise MalformedPolicy(f"{path} has a setting of the wrong type.", hint='require_pq = true; policy = "…"')
        yield path.parent, table


def _configured_policy() -> Policy:
    """The policy that the settings name, or the strictest.

    Raises: WrongUse when it loosens something: that takes a person's own `--policy`, not a folder they stand in.
    """
    for folder, table in _configured():
        if name := table.get("policy"):
            path = folder / Path(str(name)).expanduser()
            output.note(f"policy: {path}")
            policy = _load_policy(path)
            if policy.simulator_root is not None or policy.tolerate_insecure:
                hint = f"If you mean it: --policy {path}"
                raise WrongUse("The policy named by the settings says dangerously_…, and no flag does.", hint=hint)
            return policy
    return Policy()


def _load_policy(path: Path) -> Policy:
    return parse_policy(_read(path), read=lambda name: _read(path.parent / name))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_FILE_BYTES + 1)
    except OSError as error:
        raise WrongUse(f"{path} cannot be read: {error.strerror}.") from error


def _split(url: str) -> tuple[str, str]:
    """The address that is asked, and its fragment. Raises: WrongUse."""
    try:
        address, fragment = urldefrag(url)
    except ValueError as error:
        raise WrongUse(f"This is no address: {error}.", step="url", got=url) from error
    return address, fragment


def _with_fragment(policy: Policy, fragment: str) -> Policy:
    """Strictly: a pin that was misspelt must not be a pin less."""
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
    word = "NOT TRUSTED" if simulated is None else "SIMULATED" if simulated else "VERIFIED"
    return word, _STATUS_STYLES[word]


def summary(verified: Verified) -> list[Text]:
    """What was verified, what that is worth, and whether the policy itself waits to be compared."""
    word, style = verdict(verified.simulated)
    models = ", ".join(
        f"{output.one_line(model.name, 60)} ({output.one_line(model.quantization, 20)}, sha256 {model.sha256[:12]}…)"
        for model in verified.statement.models
    )
    until = datetime.fromtimestamp(verified.expires_at, UTC).strftime("%H:%M UTC")
    named = f"  {output.one_line(verified.platform, 30)}, deployment {output.one_line(verified.launch.deployment, 60)}, {models}, until {until}"
    lines = [output.styled((word, style), (named, "")), output.styled((_worth(verified), "dim"))]
    if any(factor.step == "trust" for factor in verified.factors):
        words = "  the policy was written from a running server: compare it with the owner's, by another way."
        lines.append(output.styled(("FIRST USE", "bold yellow"), (words, "")))
    return lines


def _worth(verified: Verified) -> str:
    if verified.simulated:
        return "Simulated hardware: whoever runs it can read all. For trying out, not for secrets."
    open_points = [factor.step for factor in verified.factors if factor.verdict == "not-checked"]
    passed = sum(factor.verdict == "pass" for factor in verified.factors)
    return f"{passed} checks passed; not proved: {', '.join(open_points) or 'nothing listed'}. See `cloister verify`."
