"""The small commands of an app's life on a host: `list`, `status`, `stop`, `remove`, `expire`."""

import sys
from typing import Annotated, Any

import typer

from cloister.cli import output
from cloister.cli.operator import AppName, HostOption, connect
from cloister.cli.output import AsJson
from cloister.cli.quantities import parse_moment, show_moment, show_size
from cloister.errors import WrongUse

__all__ = ["expire_command", "list_command", "remove_command", "show_app", "status_command", "stop_command"]

STYLES = {"ready": "green", "failed": "bold red", "restarting": "red", "expired": "dim", "stopped": "dim"}


def list_command(app: typer.Typer) -> None:
    app.command()(_list)


def status_command(app: typer.Typer) -> None:
    app.command()(_status)


def stop_command(app: typer.Typer) -> None:
    app.command()(_stop)


def remove_command(app: typer.Typer) -> None:
    app.command()(_remove)


def expire_command(app: typer.Typer) -> None:
    app.command()(_expire)


def _list(host: HostOption = "", as_json: AsJson = False) -> None:
    """Name, state, address and end of every app on the host."""
    with connect(host) as client:
        apps = client.get("/v1/apps")["apps"]
    if as_json:
        output.json_value(apps)
        return
    if not apps:
        output.note("no apps; cloister deploy brings one", "dim")
    width = max((len(str(app["name"])) for app in apps), default=0)
    for app in apps:
        state = str(app["state"])
        output.line(
            output.styled(
                (f"{_word(app['name']):<{width}}  ", ""),
                (f"{_word(state):<10}", STYLES.get(state, "yellow")),
                (f"  {_word(app['address'])}  expires {show_moment(app['expires_at'])}", ""),
            )
        )


def _status(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="The app's. Absent: the host's own.", show_default=False)
    ] = "",
    host: HostOption = "",
    as_json: AsJson = False,
) -> None:
    """All that the host says of an app. It is the operator's word: `cloister verify URL` proves."""
    with connect(host) as client:
        found = client.get(client.app(name)) if name else client.get("/v1/host")
    if as_json:
        output.json_value(found)
    elif name:
        show_app(found)
    else:
        _show_host(found)


def _stop(name: AppName, host: HostOption = "", as_json: AsJson = False) -> None:
    """End the enclave, and with it the keys that were released to it."""
    with connect(host) as client:
        found = client.post(client.app(name, "stop"))
    _tell(found, as_json)


def _remove(
    name: AppName,
    host: HostOption = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """End it, and forget the app, its log, and its bundle if no other app uses it."""
    if not yes:
        if not output.is_terminal(sys.stdin):
            raise WrongUse("Removing an app cannot be undone.", hint=f"cloister remove {name} --yes", step="remove")
        typer.confirm(f"Remove {name} from the host?", abort=True, err=True)
    with connect(host) as client:
        client.delete(client.app(name))
    if as_json:
        output.json_value({"removed": name})
    else:
        output.note(f"removed {name}")


def _expire(
    name: AppName,
    when: Annotated[str, typer.Option("--in", metavar="WHEN", help="12h, 7d, 2027-01-31, or never.")],
    host: HostOption = "",
    as_json: AsJson = False,
) -> None:
    """The host ends the app at that time. It counts from now, whatever was said before."""
    at = parse_moment(when)
    with connect(host) as client:
        found = client.put(client.app(name, "expiry"), {"expires_at": at})
    _tell(found, as_json)


def _tell(app: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.json_value(app)
    else:
        output.line(f"{_word(app['name'])}  {_word(app['state'])}  expires {show_moment(app['expires_at'])}")


def show_app(app: dict[str, Any]) -> None:
    state = str(app["state"])
    output.line(
        output.styled((_word(state), STYLES.get(state, "yellow")), (f"  {_word(app['detail'], 300)}", "")), hang=2
    )
    seen, usage = app["evidence"], app["usage"]
    rows = {
        "address": app["address"],
        "owner": app["owner"],
        "deployment": f"{app['deployment']}, release {app['release']}",
        "kind": f"{app['kind']} on {app['platform']}",
        "bundle": app["bundle"] or f"none (public model {app['model']})",
        "egress": ", ".join(map(str, app["egress"])) or "nowhere",
        "memory": f"{show_size(usage['memory_bytes']) if usage else '-'} of {show_size(app['memory_bytes'])}",
        "cores": app["cores"],
        "starts": app["starts"],
        "expires": show_moment(app["expires_at"]),
        "deployed": f"{show_moment(app['changed_at'])}, by {app['deployed_by']}",
        "evidence": f"{seen['verdict']}  {seen['detail']} (the operator's own word)" if seen else "not looked at",
    }
    for name, value in rows.items():
        output.line(f"{name:<10}  {_word(value, 300)}", hang=12)


def _show_host(host: dict[str, Any]) -> None:
    rows = {
        "version": host["version"],
        "backend": f"{host['backend']}, platform {host['platform']}",
        "for apps": f"{show_size(host['memory_bytes'])} memory, {host['cores']} cores",
        "bundles": show_size(host["bundle_bytes"]),
    }
    for name, value in rows.items():
        output.line(f"{name:<10}  {_word(value)}")


def _word(value: object, most: int = 120) -> str:
    """A field of the host's: somebody else's text."""
    return output.one_line(str(value), most)
