"""`cloister fetch URL [PATH]`: one request to the app in a verified enclave, whatever the app is; its answer to standard output."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import httpx2
import typer

from cloister.cli import output
from cloister.cli.judgement import stopping
from cloister.cli.trust import ApiKey, PolicyFile, RequirePq, SimulatorRoot, Trust, open_client, summary
from cloister.errors import CloisterError, WrongUse

__all__ = ["register"]

_PATH = re.compile(r"/(?!/)[!-~]*")
_METHOD = re.compile(r"[A-Z]{1,20}")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e]*)")
_FORM = "application/x-www-form-urlencoded"


def register(app: typer.Typer) -> None:
    app.command()(fetch)


def fetch(
    url: Annotated[str, typer.Argument(metavar="URL", help="The enclave's address.", show_default=False)],
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="What of the app: /path?query.")] = "/",
    policy: PolicyFile = None,
    dangerously_trust_simulator: SimulatorRoot = None,
    require_pq: RequirePq = False,
    api_key: ApiKey = "",
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", metavar="TEXT|@FILE", help="The body; @- takes standard input. Makes it a POST."),
    ] = None,
    method: Annotated[str, typer.Option("--method", "-X", metavar="METHOD", help="GET, or POST with a body.")] = "",
    header: Annotated[
        list[str] | None, typer.Option("--header", "-H", metavar="'NAME: VALUE'", help="A field of the request.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the answer here, once it is whole.")
    ] = None,
) -> None:
    """Ask one path of an app. Nothing is sent before the enclave is verified; an answer that breaks off is an error.

    The answer's bytes go to standard output as they come; on a terminal, without what a terminal would obey. A body that
    is JSON is sent as JSON, another as a form; a --header content-type says otherwise. An answer of status 400 or more is
    printed too, and ends with 1.
    """
    body = _body(data)
    verb = (method or ("GET" if body is None else "POST")).upper()
    if not _METHOD.fullmatch(verb):
        raise WrongUse("This is no method.", hint="-X PUT", step="method")
    if not _PATH.fullmatch(path):
        hint = "cloister fetch URL '/search?q=a%20b'"
        raise WrongUse("A path begins with one / and has no blanks.", hint=hint, step="path")
    fields = _fields(header or [])
    if body is not None and all(name.lower() != "content-type" for name, _ in fields):
        fields.append(("content-type", _media_type(body)))
    with stopping(), Trust(policy, dangerously_trust_simulator, require_pq).session(url) as session:
        for part in summary(session.verify()):
            output.note(part, hang=2)
        client = open_client(session, api_key)
        request = client.build_request(verb, path, content=body, headers=fields)
        answer = client.send(request, stream=True)
        try:
            _show(answer, to)
        finally:
            answer.close()
    if answer.status_code >= 400:
        raise CloisterError(f"The app answered with status {answer.status_code}.", step="answer")


def _body(data: str | None) -> bytes | None:
    if data is None or not data.startswith("@"):
        return None if data is None else data.encode(errors="surrogateescape")
    if data == "@-":
        return sys.stdin.buffer.read()
    try:
        return Path(data[1:]).read_bytes()
    except OSError as error:
        raise WrongUse(f"{data[1:]} cannot be read: {error.strerror}.", step="data") from error


def _media_type(body: bytes) -> str:
    return "application/json" if body.lstrip()[:1] in (b"{", b"[") else _FORM


def _fields(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Raises: WrongUse, without the value, for a line that could not travel."""
    found = []
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            raise WrongUse("This is no header.", hint="-H 'Accept: text/html', in ASCII.", step="header")
        found.append((match[1], match[2].rstrip()))
    return found


def _show(answer: httpx2.Response, to: Path | None) -> None:
    if answer.is_redirect:
        output.note(f"leads to {output.one_line(answer.headers['location'], 500)}", "dim")
    if to is not None:
        content = answer.read()
        try:
            to.write_bytes(content)
        except OSError as error:
            raise WrongUse(f"{to} cannot be written: {error.strerror}.", step="output") from error
    elif output.is_terminal(sys.stdout):
        _to_terminal(answer)
    else:
        for part in answer.iter_raw():
            sys.stdout.buffer.write(part)
            sys.stdout.buffer.flush()


def _to_terminal(answer: httpx2.Response) -> None:
    last = "\n"
    try:
        for text in answer.iter_text():
            output.write(text)
            last = text or last
    finally:
        if not last.endswith("\n"):
            output.write("\n")
