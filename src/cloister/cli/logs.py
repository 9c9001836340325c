"""`cloister logs NAME`: what an app's enclave said of itself, and the app's own words if its owner publishes them."""

import json
import sys
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from cloister.cli import output
from cloister.cli.operator import AppName, HostOption, connect
from cloister.errors import ConnectionFailed

__all__ = ["register"]

_WAIT = 20  # seconds that one question stays open
_TRIES = 30


def register(app: typer.Typer) -> None:
    app.command()(_logs)


def _logs(
    name: AppName,
    host: HostOption = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl+C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Starts, ends, states; never anybody's questions or answers."""
    last, failures = 0, 0
    with connect(host) as client:
        while True:
            try:
                lines = client.get(client.app(name, "logs"), after=last, wait=_WAIT if follow else 0)["lines"]
            except ConnectionFailed:
                failures += 1
                if not (follow and last) or failures > _TRIES:
                    raise
                time.sleep(1.0)
                continue
            failures = 0
            for line in lines:
                _show(line, as_json)
                last = max(last, int(line["seq"]))
            if not follow:
                return


def _show(line: dict[str, Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(line, ensure_ascii=True) + "\n")
        sys.stdout.flush()
        return
    at = datetime.fromtimestamp(float(line["at"]), UTC).strftime("%Y-%m-%d %H:%M:%S")
    output.line(f"{at}  {output.one_line(str(line['kind']), 20):<10}  {output.one_line(str(line['text']), 500)}")
