"""`cloister login URL` and `cloister logout`: the token for an operator's host, kept for this user."""

import sys
from getpass import getpass
from pathlib import Path
from typing import Annotated

import typer

from cloister.cli import output
from cloister.cli.operator import HostClient, Login, Logins, normal
from cloister.cli.output import AsJson
from cloister.errors import WrongUse

__all__ = ["login_command", "logout_command"]

Url = Annotated[str, typer.Argument(metavar="URL", help="The host's address.", show_default=False)]


def login_command(app: typer.Typer) -> None:
    app.command()(_login)


def logout_command(app: typer.Typer) -> None:
    app.command()(_logout)


def _login(
    url: Url,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", metavar="FILE", help="Who vouches for the host's certificate, if not a public one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask for the token (or read it from standard input), try it, and keep it. From then on this is the host that other
    commands mean."""
    url = normal(url)
    login = Login(_token(), str(ca.absolute()) if ca else "")
    with HostClient(url, login) as client:
        host = client.get("/v1/host")
    Logins().put(url, login)
    if as_json:
        output.json_value({"host": url, "platform": host["platform"], "backend": host["backend"]})
    else:
        output.line(
            f"logged in to {url}  {output.one_line(str(host['backend']), 30)}, platform {output.one_line(str(host['platform']), 30)}"
        )


def _logout(
    url: Annotated[str, typer.Argument(metavar="[URL]", help="Absent: every host.", show_default=False)] = "",
    as_json: AsJson = False,
) -> None:
    """Forget the token. It stays good until the operator removes it: cloister host token remove NAME."""
    logins = Logins()
    forgotten = [normal(url)] if url else list(logins.all())
    for known in forgotten:
        logins.drop(known)
        if not as_json:
            output.note(f"logged out of {known}")
    if as_json:
        output.json_value({"logged_out": forgotten})


def _token() -> str:
    token = (getpass("token: ") if output.is_terminal(sys.stdin) else sys.stdin.readline()).strip()
    if not token or not all("!" <= letter <= "~" for letter in token):
        hint = "The operator makes one: cloister host token add NAME"
        raise WrongUse("That is no token.", hint=hint, step="login")
    return token
