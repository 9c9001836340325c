"""`cloister test [DIR]`: the app as it will be deployed, sealed, in a simulated enclave here, and its tests against it."""

import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from cloister.cli import output
from cloister.cli.package import pack
from cloister.cli.progress import loading_bar
from cloister.cli.sealed import LocalApp, config_for
from cloister.cli.through import opened_through
from cloister.client import Session
from cloister.errors import WrongUse
from cloister.evidence.simulated import PLATFORM
from cloister.owner import secrets as secret_file
from cloister.owner.appfile import AppFile, read_appfile
from cloister.owner.package import Package
from cloister.owner.provision import contents, provision
from cloister.verify import Verified

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command()(test)


def test(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where cloister.toml is.")] = Path(),
    secrets: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Values of its secrets; absent: secrets.toml, the environment.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What came of it, as JSON.")] = False,
) -> None:
    """Run an app in a simulated enclave here, and its tests command against it, through the sealed channel."""
    app = read_appfile(folder)
    values = secret_file.read_secrets(app.secrets, os.environ, secrets or _beside(folder))
    with TemporaryDirectory(prefix="cloister-test-") as place:
        here = replace(app, platform=PLATFORM, python="")  # in an enclave of this machine, whatever runs it later
        made = pack(here, Path(place) / f"{app.name}.cloister", Path(place) / "state")
        output.note("measuring the code that will run", "dim")
        with LocalApp(made.path, made.head, config_for(made.head), deployment=f"test-{app.name}"[:63]) as running:
            verified = _release(running, app, made, values)
            code = _run_tests(running, app)
    if as_json:
        output.json_value(
            {"name": app.name, "passed": code == 0, "exit_code": code, "verification": verified.to_json()}
        )
    elif code == 0:
        output.line(f"{app.name}: passed" if app.tests else f"{app.name}: answers")
    if code:
        output.note(f"{app.name}: its tests failed (exit code {code})", "red")
        raise typer.Exit(1)


def _beside(folder: Path) -> Path | None:
    path = folder / secret_file.FILE
    return path if path.is_file() else None


def _release(running: LocalApp, app: AppFile, made: Package, values: Mapping[str, str]) -> Verified:
    """From waiting to serving, verified by its owner before, and as any client would after."""
    running.start()
    release = contents(app, made.keys, secrets=values, now=time.time())
    provision(running.url, policy=running.policy, owner=running.owner, release=release)
    with loading_bar() as progress:
        running.wait_ready(progress)
    with Session(running.url, policy=running.policy) as session:
        verified = session.verify()
    if "app-unconfined" in verified.statement.insecure:
        output.note(
            "this machine gives the app no view of its own of files and network: egress is not enforced", "yellow"
        )
    return verified


def _run_tests(running: LocalApp, app: AppFile) -> int:
    if not app.tests:
        return 0
    with opened_through(running.url, running.policy) as local:
        environment = {**os.environ, "CLOISTER_URL": local}
        try:
            # What it prints is about the tests, not this command's result.
            ran = subprocess.run(app.tests, cwd=app.folder, env=environment, check=False, stdout=2)
        except OSError as error:
            hint = "`tests` in cloister.toml names a program and its arguments."
            raise WrongUse(
                f"The tests command cannot be started: {app.tests[0]}.", hint=hint, got=error.strerror
            ) from error
    return ran.returncode
