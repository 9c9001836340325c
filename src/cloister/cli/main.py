"""The command `cloister`: a table of commands, and what an error becomes at the process's edge.

To add a command: one module in this folder and one line in `COMMANDS`. The module offers

    def register(app: typer.Typer) -> None

which is given an empty app of its own and adds to it either one command (`app.command()(run)`; its name on the command
line is the one in the table) or a family (`app.callback()(group)`, then `app.command()(pull)`, `app.command("list")(…)`).
A module of several small commands offers a function for each, named after a colon in the table. A module is imported only when its command runs, so `cloister ask` needs none of what `cloister serve` needs.

Commands raise `CloisterError`; nobody else catches them or calls `sys.exit`. Here they become one line and a hint on
standard error, and the exit codes: 0, 1 other, 2 usage, 3 not trusted, 4 malformed, 5 unreachable, 130 on Ctrl+C. A
command with another outcome raises `typer.Exit(code)`. Of any other exception a line tells the kind and the place. What is
printed goes through `cloister.cli.output`.
"""

import importlib
import io
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from cloister import __version__, cli
from cloister.cli import output
from cloister.errors import CloisterError, WrongUse

__all__ = ["COMMANDS", "app", "main"]

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # name -> (module, the line that `cloister --help` shows)
        "up": ("cloister.cli.up", "Try it all here: a simulated enclave, a model, a chat."),
        "chat": ("cloister.cli.chat", "Talk to a model in an enclave, verified first."),
        "ask": ("cloister.cli.ask", "Ask one question; the answer goes to stdout."),
        "verify": ("cloister.cli.verify", "Say whether an enclave is what it claims to be."),
        "receipt": ("cloister.cli.receipt", "Say which model gave an answer, by its receipt."),
        "policy": ("cloister.cli.policy", "Write, accept, sign and check what you believe."),
        "collateral": ("cloister.cli.collateral", "Fetch and keep what the hardware's vendors say."),
        "fetch": ("cloister.cli.fetch", "Ask one path of an app in an enclave, verified first."),
        "connect": ("cloister.cli.connect", "Verify, then serve an OpenAI-compatible API locally."),
        "serve": ("cloister.cli.serve", "Run a model in an enclave on this machine."),
        "init": ("cloister.cli.init", "Write a small app that works, to start from."),
        "test": ("cloister.cli.test", "Run an app and its tests in a simulated enclave here."),
        "package": ("cloister.cli.package", "Seal an app and its model into one file."),
        "deploy": ("cloister.cli.deploy", "Run an app on a host, verified before it gets keys."),
        "list": ("cloister.cli.apps:list_command", "List the apps on a host."),
        "status": ("cloister.cli.apps:status_command", "Show one app, or the host itself."),
        "logs": ("cloister.cli.logs", "Show what an app's enclave said of itself."),
        "stop": ("cloister.cli.apps:stop_command", "Stop an app; its address stays its own."),
        "restart": ("cloister.cli.deploy:restart_command", "Start an app again, and release its keys anew."),
        "remove": ("cloister.cli.apps:remove_command", "Remove an app with its bundle and logs."),
        "expire": ("cloister.cli.apps:expire_command", "Say when an app shall end."),
        "broker": ("cloister.cli.broker", "Release keys to verified enclaves while you sleep."),
        "login": ("cloister.cli.login:login_command", "Keep the token that a host's operator gave you."),
        "logout": ("cloister.cli.login:logout_command", "Forget a host's token."),
        "host": ("cloister.cli.host", "Run the operator's host: apps of others, in enclaves."),
        "image": ("cloister.cli.image", "Build the measured image, and predict what it measures."),
        "tpm": ("cloister.cli.tpm", "Enrol a machine's TPM, so that a policy can name it."),
        "doctor": ("cloister.cli.doctor", "Say which TEE this machine is."),
        "models": ("cloister.cli.models", "Fetch, describe, quantize and remove models."),
        "keys": ("cloister.cli.keys", "Make and list API keys."),
        "bench": ("cloister.cli.bench", "Measure speed and overhead on this machine."),
        "demo": ("cloister.cli.demo", "Play the attacker, and see each attack blocked."),
    }
)

_PACKAGE = Path(cli.__file__).parents[1]

# Names and locals never reach a traceback, and help stays plain text that a pipe can carry.
_SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        "rich_markup_mode": None,
        "pretty_exceptions_enable": False,
        "pretty_exceptions_show_locals": False,
        "no_args_is_help": False,
    }
)


class _Commands(TyperGroup):
    """Shows the table, imports only the module that is asked for, and turns errors into exit codes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (_, line) in COMMANDS.items():
            self.add_command(TyperCommand(name, help=line, rich_markup_mode=None))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, stub, rest = super().resolve_command(ctx, args)
        return name, (_load(name) if name is not None else stub), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CloisterError as error:
            output.show_error(error)
            raise typer.Exit(error.exit_code) from error


def _load(name: str) -> Any:
    place, line = COMMANDS[name]
    module, _, function = place.partition(":")
    try:
        register = getattr(importlib.import_module(module), function or "register")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "cloister":
            raise
        raise WrongUse(
            f"`cloister {name}` needs the Python package {error.name!r}, which is not installed.",
            hint="pip install 'cloister[server]' brings everything; 'cloister[proxy]' is enough for `cloister connect`.",
        ) from error
    family = typer.Typer(add_completion=False, help=line, **_SETTINGS)
    register(family)
    command = get_command(family)
    command.name = name
    return command


def _print_version(wanted: bool) -> None:
    if wanted:
        output.line(f"cloister {__version__}")
        raise typer.Exit


app = typer.Typer(cls=_Commands, add_completion=True, **{**_SETTINGS, "no_args_is_help": True})


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show the version."),
) -> None:
    """Private LLM inference that you can verify.

    Every command that talks to an enclave verifies it first, and refuses to send anything to one that it cannot verify.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (`sys.argv` by default) and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a letter is no reason to fail
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as arguments are read: refused when it shall be sent
    try:
        get_command(app).main(args=arguments, prog_name="cloister")
    except Exception as error:  # noqa: BLE001 (the process's edge)
        output.show_error(_unforeseen(error))
        raise SystemExit(1) from None
    raise SystemExit(0)


def _unforeseen(error: Exception) -> CloisterError:
    """The system's own words about a file; of anything else the kind and the place, as its words may hold a prompt."""
    if isinstance(error, OSError) and error.strerror:
        return CloisterError(f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}.")
    code = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    file, line = next((place for place in reversed(code) if Path(place[0]).is_relative_to(_PACKAGE)), code[-1])
    return CloisterError(
        f"cloister did not foresee this: {type(error).__name__} at {Path(file).name}, line {line}.",
        hint="This is a fault of cloister. Please report that line.",
    )
