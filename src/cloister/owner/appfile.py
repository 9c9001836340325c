"""`cloister.toml`: what an app is, and how it shall run. Read whole or refused, with the line and what to write there."""

import ipaddress
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NoReturn, cast

from cloister.errors import MalformedApp
from cloister.evidence.bundle import DOMAIN, ENTRY, HEALTH, NAME, SECRET_NAME, Kind, Resources
from cloister.evidence.launch import NO_LOGS, PUBLIC
from cloister.verify.policy import PLATFORMS

__all__ = ["FILE", "TABLES", "AppFile", "parse_appfile", "read_appfile"]

FILE = "cloister.toml"
MAX_BYTES = 256 * 1024

TABLES = MappingProxyType(
    {
        "": (
            *("name", "app", "kind", "code", "requirements", "python", "model", "health", "tests", "expiry", "secrets"),
            *("egress", "domain", "logs", "platform", "policy", "resources", "settings", "client"),
        ),
        "resources": ("memory", "cores", "context"),
        "client": ("policy", "policy_signer", "require_pq"),
    }
)
"""The keys of each table, "" for those outside of any; `settings` has names of the owner's own. `client` is for the commands
of users, which judge its values."""

_DURATION = re.compile(r"([1-9][0-9]{0,5})([mhd])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_SIZE = re.compile(r"([1-9][0-9]{0,6})([MG])i?B?")
_MIB = {"M": 1, "G": 1024}
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?(:[0-9]{1,5})?")
_PYTHON = re.compile(r"3\.[1-9][0-9]")
_TABLE = re.compile(r"\s*\[\s*([A-Za-z0-9_.-]+)\s*\]")
_AT_LINE = re.compile(r"\(at line (\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class AppFile:
    """`folder` holds the file, and its paths are relative to it. `entry` is `module:variable`, "" for the built-in app, which
    has a `model`. `python`: the minor version that its requirements are fetched for, "" as the platform has it. `expiry` in
    seconds after the release, None: never. `settings` go into the app's environment, and so do the secrets, of which only the
    names stand here. `logs`: whether what the app writes to its standard output is published."""

    folder: Path
    name: str
    kind: Kind
    entry: str = ""
    model: str = ""
    code: Path | None = None
    requirements: Path | None = None
    python: str = ""
    health: str = ""
    tests: tuple[str, ...] = ()
    expiry: int | None = None
    secrets: tuple[str, ...] = ()
    egress: tuple[str, ...] = ()
    domain: str = ""
    logs: str = NO_LOGS
    platform: str = ""
    policy: Path | None = None
    resources: Resources = field(default_factory=Resources)
    settings: Mapping[str, str] = field(default_factory=dict)


def read_appfile(folder: Path) -> AppFile:
    """Of an app's folder. Raises: MalformedApp."""
    try:
        with (folder / FILE).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        hint = f"`cloister init {folder}` writes one."
        raise MalformedApp(f"There is no {FILE} in {folder}.", step=FILE, hint=hint, got=error.strerror) from error
    return parse_appfile(content, folder)


def parse_appfile(content: bytes, folder: Path) -> AppFile:
    """Raises: MalformedApp for the first fault that is found."""
    if len(content) > MAX_BYTES:
        raise MalformedApp(f"{FILE} is over 256 KiB.", step=FILE)
    try:
        text = content.decode()
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        words = ascii(str(error))[1:-1][:200]
        at = _AT_LINE.search(words)
        where = f"line {at[1]}" if at else "its beginning"
        hint = "It is TOML: text in quotes, one key = value a line."
        raise MalformedApp(f"{FILE}, {where}: {words}.", step=FILE, hint=hint) from error
    return _App(text, values, folder).read()


class _Table:
    """One table's members, each read once; what is wrong is told with its line."""

    def __init__(self, text: str, values: Mapping[str, Any], table: str = "") -> None:
        self._text = text
        self._values = values
        self._table = table

    def refuse(self, key: str, what: str, hint: str) -> NoReturn:
        where = f"{self._table}.{key}" if self._table else key
        line = _line_of(self._text, self._table, key)
        at = f"line {line}" if line else "the file's end"
        raise MalformedApp(f"{FILE}, {at}: {where} {what}.", step=where, hint=hint)

    def has(self, key: str) -> bool:
        return key in self._values

    def known(self, *names: str) -> None:
        for key in self._values:
            if key not in names:
                near = ", ".join(names)
                self.refuse(ascii(key)[1:-1][:40], "is not known", f"Known here: {near}.")

    def text(self, key: str, default: str = "") -> str:
        value = self._values.get(key, default)
        if not isinstance(value, str) or len(value) > 4096 or (key in self._values and not value.strip()):
            self.refuse(key, "is not text", f'Write it in quotes: {key} = "…"')
        return value

    def matching(self, key: str, pattern: re.Pattern[str], hint: str, default: str = "") -> str:
        value = self.text(key, default)
        if self.has(key) and not pattern.fullmatch(value):
            self.refuse(key, "is not written as it must be", hint)
        return value

    def texts(self, key: str, pattern: re.Pattern[str], hint: str) -> tuple[str, ...]:
        values = self._values.get(key, [])
        good = isinstance(values, list) and len(values) <= 64
        if not good or not all(isinstance(value, str) and pattern.fullmatch(value) for value in values):
            self.refuse(key, "is not a list of what it must be", hint)
        if len(set(values)) != len(values):
            self.refuse(key, "names one twice", "Leave one of the two away.")
        return tuple(values)

    def number(self, key: str, low: int, high: int) -> int | None:
        value = self._values.get(key)
        if value is not None and (type(value) is not int or not low <= value <= high):
            self.refuse(key, "is not a number that it can be", f"A whole number from {low} to {high}.")
        return value

    def counted(self, key: str, pattern: re.Pattern[str], units: Mapping[str, int], hint: str) -> int | None:
        """A number and its unit, as a number of the smallest."""
        if not self.has(key):
            return None
        found = pattern.fullmatch(self.text(key))
        if found is None:
            self.refuse(key, "is not a number with its unit", hint)
        return int(found[1]) * units[found[2]]

    def table(self, key: str) -> "_Table":
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            self.refuse(key, "is not a table", f"Write [{key}] on a line of its own, and its members below.")
        return _Table(self._text, value, key)

    def pairs(self, pattern: re.Pattern[str]) -> Mapping[str, str]:
        for key, value in self._values.items():
            if not pattern.fullmatch(key):
                self.refuse(ascii(key)[1:-1][:40], "is no name of a variable", "Letters, digits and _, no digit first.")
            if not isinstance(value, str) or "\0" in value or len(value) > 65_536:
                self.refuse(key, "is not text", f'Write it in quotes: {key} = "…"')
        return MappingProxyType(dict(self._values))


def _line_of(text: str, table: str, key: str) -> int:
    """Where a member stands, or its table; 0 for what stands nowhere."""
    member = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*(=|\.)""")
    current, found = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if header := _TABLE.match(line):
            current = header[1]
            if current in (table, f"{table}.{key}" if table else key) and table + key:
                found = found or (number if current else 0)
        elif current == table and member.match(line):
            return number
    return found


def _is_the_machines(host: str) -> bool:
    try:
        address = ipaddress.IPv4Address(host)
    except ValueError:
        return False
    own = address.is_loopback or address.is_link_local or address.is_unspecified
    return own or address.is_multicast or address.is_reserved


class _App(_Table):
    def __init__(self, text: str, values: Mapping[str, Any], folder: Path) -> None:
        super().__init__(text, values)
        self._folder = folder

    def read(self) -> AppFile:
        self.known(*TABLES[""])
        self.table("client").known(*TABLES["client"])
        for key, example in (("name", 'name = "my-app"'), ("app", 'app = "llm", or app = "main:app"')):
            if not self.has(key):
                self.refuse(key, "is missing", f"Add a line: {example}")
        kind = self._kind()
        secrets = self.texts("secrets", SECRET_NAME, 'Names only, never values: secrets = ["API_TOKEN"]')
        settings = self.table("settings").pairs(SECRET_NAME)
        if both := sorted(set(secrets) & set(settings)):
            self.refuse("secrets", f"and settings both name {both[0]}", "A secret's value never stands in this file.")
        is_llm = kind == "llm"
        return AppFile(
            folder=self._folder,
            name=self.matching("name", NAME, "1 to 63 lower-case letters, digits and dashes, no dash first."),
            kind=kind,
            entry="" if is_llm else self.text("app"),
            model=self.text("model", "default" if is_llm else ""),
            code=None if is_llm else self._path("code", Path.is_dir, "folder", "."),
            requirements=self._path("requirements", Path.is_file, "file") if self.has("requirements") else None,
            python=self._python(),
            health=self.matching(
                "health", HEALTH, 'A path that answers 2xx: health = "/health"', "/health" if is_llm else ""
            ),
            tests=self._command("tests"),
            expiry=self.counted("expiry", _DURATION, _SECONDS, 'Minutes, hours or days: expiry = "30d"'),
            secrets=secrets,
            egress=self._egress(),
            domain=self.matching("domain", DOMAIN, 'A name that leads to the host: domain = "app.example.com"'),
            logs=self._one_of("logs", (NO_LOGS, PUBLIC)) or NO_LOGS,
            platform=self._one_of("platform", PLATFORMS),
            policy=self._path("policy", Path.is_file, "file") if self.has("policy") else None,
            resources=self._resources(),
            settings=settings,
        )

    def _kind(self) -> Kind:
        app = self.text("app")
        if app == "llm":
            for key in ("kind", "code", "requirements", "python", "secrets", "settings", "logs"):
                if self.has(key):
                    self.refuse(key, "means nothing for the built-in app", "Leave it away.")
            return "llm"
        if not ENTRY.fullmatch(app):
            self.refuse("app", "is not an app", 'app = "llm", or a module and its variable: app = "main:app"')
        if not self.has("kind"):
            self.refuse("kind", "is missing", 'Flask, Django: kind = "wsgi". FastAPI, Starlette: kind = "asgi".')
        return cast("Kind", self._one_of("kind", ("asgi", "wsgi")))

    def _python(self) -> str:
        if self.has("python") and not self.has("requirements"):
            self.refuse("python", "means nothing without requirements", "Leave it away.")
        return self.matching("python", _PYTHON, 'A minor version, as the enclave has it: python = "3.13"')

    def _one_of(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.text(key)
        if self.has(key) and value not in choices:
            self.refuse(key, "is none that is known", f"One of: {', '.join(choices)}.")
        return value

    def _path(self, key: str, exists: Callable[[Path], bool], kind: str, default: str = "") -> Path:
        name = self.text(key, default)
        parts = PurePosixPath(name).parts
        path = self._folder / name
        if PurePosixPath(name).is_absolute() or ".." in parts:
            self.refuse(key, "leads out of the app's folder", f"Name a {kind} in it.")
        if not exists(path):
            self.refuse(key, f"names no {kind} that is there", f"Looked for {path}.")
        return path

    def _egress(self) -> tuple[str, ...]:
        """By the rule that the enclave has for them (`enclave.pyapp.egress`)."""
        hosts = self.texts("egress", _HOST, 'Hosts, with a port if it is not 443: egress = ["api.example.com"]')
        for host, _, port in (entry.partition(":") for entry in hosts):
            if port and not 1 <= int(port) <= 65_535:
                self.refuse("egress", f"names port {port}", "A port from 1 to 65535; left away, it is 443.")
            if _is_the_machines(host):
                hint = "An app reaches its own loopback without being allowed to."
                self.refuse("egress", f"names {host}, an address of the machine itself", hint)
        return hosts

    def _command(self, key: str) -> tuple[str, ...]:
        try:
            return tuple(shlex.split(self.text(key)))
        except ValueError:
            self.refuse(key, "is no command", 'As in a shell: tests = "python tests/check.py"')

    def _resources(self) -> Resources:
        table = self.table("resources")
        table.known(*TABLES["resources"])
        return Resources(
            memory=table.counted("memory", _SIZE, _MIB, 'Mebibytes or gibibytes: memory = "2G"'),
            cores=table.number("cores", 1, 1024),
            context=table.number("context", 64, 1 << 24),
        )
