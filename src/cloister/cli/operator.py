"""What the commands that talk to an operator's host share: who it is, the token for it, and its API.

Tokens rest in `$XDG_CONFIG_HOME/cloister/hosts.json`, readable by their user alone. They never stand on a command line,
and never leave for another machine in the clear.
"""

import contextlib
import ipaddress
import json
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import httpx2
import typer

import cloister.errors
from cloister import private_file
from cloister.cli import output
from cloister.errors import CloisterError, ConnectionFailed, Unauthorized, WrongUse

__all__ = ["AppName", "HostClient", "HostOption", "Login", "Logins", "connect", "normal"]

HostOption = Annotated[
    str,
    typer.Option("--host", envvar="CLOISTER_HOST", metavar="URL", help="The host. Absent: the last one logged in to."),
]
AppName = Annotated[str, typer.Argument(metavar="NAME", help="The app's.", show_default=False)]

_KINDS: Mapping[str, type[CloisterError]] = {
    name: getattr(cloister.errors, name) for name in cloister.errors.__all__ if name != "ContextLengthExceeded"
}
_BLOCK = 1 << 20
_TIMES = httpx2.Timeout(30.0, read=120.0, write=120.0)
_BROKEN = (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError)


@dataclass(frozen=True, slots=True)
class Login:
    """`ca`: a file with the certificate authority of a host that no public one vouches for, or ""."""

    token: str
    ca: str = ""


class Logins:
    """The user's tokens, by the host's address; the last one made comes last."""

    def __init__(self, path: Path | None = None) -> None:
        home = os.environ.get("XDG_CONFIG_HOME", "")
        self._path = path or (Path(home) if home else Path.home() / ".config") / "cloister" / "hosts.json"

    def all(self) -> dict[str, Login]:
        """Raises: WrongUse when others can read the file, or it is damaged."""
        if not self._path.exists():
            return {}
        private_file.refuse_shared(self._path)
        try:
            found = json.loads(self._path.read_bytes())
            return {str(url): Login(str(one["token"]), str(one["ca"])) for url, one in found.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            hint = "Move it away, and log in again."
            raise WrongUse(f"{self._path} does not hold logins.", hint=hint, step="login") from error

    def put(self, url: str, login: Login) -> None:
        self._write({**{known: one for known, one in self.all().items() if known != url}, url: login})

    def drop(self, url: str) -> None:
        """Raises: WrongUse for a host that nobody logged in to."""
        known = self.all()
        if url not in known:
            raise WrongUse("You are not logged in there.", step="login", got=url, expected=", ".join(known) or None)
        del known[url]
        self._write(known)

    def _write(self, logins: Mapping[str, Login]) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        members = {url: {"token": one.token, "ca": one.ca} for url, one in logins.items()}
        private_file.write(self._path, json.dumps(members, indent=2).encode())


def normal(url: str) -> str:
    """The host's address without what does not belong to it.

    Raises: WrongUse for no address, or one to which a token would travel in the clear.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    rest = parts.path.strip("/") or parts.query or parts.fragment or parts.username
    if parts.scheme not in ("http", "https") or not host or rest or not url.isprintable():
        raise WrongUse("The host's address looks like https://host:8700.", step="host", got=output.one_line(url, 80))
    if parts.scheme == "http" and not _is_loopback(host):
        hint = "Use its https address: cloister host --cert FILE --key FILE, or a web server in front of it."
        raise WrongUse("A token does not travel to another machine in the clear.", hint=hint, step="host")
    named = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{named}" + (f":{port}" if port else "")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def connect(url: str = "") -> Iterator["HostClient"]:
    """The host at `url`, or the last one logged in to. Raises: WrongUse when nobody is logged in there."""
    logins = Logins().all()
    if not url and not logins:
        raise WrongUse("Which host?", hint="cloister login URL, once.", step="login")
    chosen = normal(url) if url else list(logins)[-1]
    if chosen not in logins:
        raise Unauthorized("You are not logged in there.", hint=f"cloister login {chosen}", step="login")
    with HostClient(chosen, logins[chosen]) as client:
        yield client


class HostClient:
    """The host's API. Its errors come back as what they were there."""

    def __init__(self, url: str, login: Login) -> None:
        self.url = url
        try:
            context = ssl.create_default_context(cafile=login.ca or None)
        except OSError as error:
            raise WrongUse(f"{login.ca} does not hold certificates.", hint="cloister login URL --ca FILE") from error
        self._client = httpx2.Client(
            base_url=url,
            headers={"authorization": f"Bearer {login.token}"},
            verify=context,
            timeout=_TIMES,
            trust_env=False,
            follow_redirects=False,
        )

    def __enter__(self) -> "HostClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, path: str, **query: int) -> dict[str, Any]:
        return self._ask("GET", path, params=query)

    def post(self, path: str, value: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._ask("POST", path, json=value)

    def put(self, path: str, value: Mapping[str, Any]) -> dict[str, Any]:
        return self._ask("PUT", path, json=value)

    def delete(self, path: str) -> None:
        self._ask("DELETE", path)

    def app(self, name: str, action: str = "") -> str:
        """The path of an app, or of something of it."""
        return f"/v1/apps/{quote(name, safe='')}" + (f"/{action}" if action else "")

    def upload(
        self,
        path: Path,
        sha256: str,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
        *,
        tries: int = 5,
    ) -> None:
        """Brings a bundle there, going on where an earlier try stopped. `progress`: of bytes done and in all.

        Raises: HostFull; ConnectionFailed when it broke off `tries` times without getting further.
        """
        size = path.stat().st_size
        failures = 0
        stood = -1
        while True:
            upload = self.post("/v1/uploads", {"sha256": sha256, "size": size})
            progress(int(upload["offset"]), size)
            if upload["complete"]:
                return
            offset = int(upload["offset"])
            failures = failures + 1 if offset <= stood else 1
            if failures > tries:
                raise ConnectionFailed("The upload breaks off again and again.", hint="Try later: it goes on.")
            stood = offset
            with contextlib.suppress(ConnectionFailed):
                self._ask(
                    "PATCH",
                    f"/v1/uploads/{sha256}",
                    content=_blocks(path, offset, size, progress),
                    headers={"upload-offset": str(offset), "content-length": str(size - offset)},
                )

    def _ask(self, method: str, path: str, **sent: Any) -> dict[str, Any]:
        try:
            try:
                answer = self._client.request(method, path, **sent)
            except _BROKEN:  # a connection that was idle for long may be closed just when it is used again
                if method != "GET":
                    raise
                answer = self._client.request(method, path, **sent)
        except httpx2.HTTPError as error:
            raise ConnectionFailed(
                "The host could not be reached, or did not answer.",
                hint="Is `cloister host` running there, and is the address right?",
                step="host",
                got=type(error).__name__,
            ) from error
        try:
            value = answer.json() if answer.content else {}
        except ValueError:
            value = None
        if not isinstance(value, dict) or answer.status_code in (502, 503, 504):
            raise ConnectionFailed("That is no host of cloister, or it is not there now.", got=str(answer.status_code))
        if not answer.is_success:
            raise _error(value)
        return value


def _error(told: Mapping[str, Any]) -> CloisterError:
    words = {name: str(told[name]) for name in ("hint", "step", "expected", "got") if told.get(name)}
    return _plain(
        _KINDS.get(str(told.get("error")), CloisterError), str(told.get("detail", "The host refused.")), words
    )


def _plain(kind: type[CloisterError], message: str, words: Mapping[str, str]) -> CloisterError:
    try:
        return kind(message, **words)
    except TypeError:  # a class that says less
        return kind(message, hint=words.get("hint", ""))


def _blocks(path: Path, offset: int, size: int, progress: Callable[[int, int], None]) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while block := file.read(_BLOCK):
            yield block
            offset += len(block)
            progress(offset, size)
