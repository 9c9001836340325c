"""The web chat's own routes beside the API: its files, the exchange of a one-time token, and the key of what it keeps.

GET  /chat, /chat/…   the page's files, to anybody whom the guard lets in: they hold nothing
POST /chat/session    {"token": …} -> {"binding": …} and the session's cookie
GET  /chat/key        {"key": …}, 32 bytes in Base64, to a session
POST /chat/wipe       {"key": …}, a new one, to a session
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloister.proxy.launch import Launch
from cloister.proxy.page import Page
from cloister.proxy.reply import Reply, json_reply
from cloister.proxy.vault import Vault, vault_file

__all__ = ["BINDING", "Chat"]

BINDING = b"x-cloister-binding"
_LIFETIME = 30 * 86400  # seconds; a session ends with the proxy's process anyway
_LONGEST_TOKEN = 1024  # bytes of a request that begins a session
_METHODS = {"/chat/session": "POST", "/chat/key": "GET", "/chat/wipe": "POST"}


class Chat:
    """`port`: the proxy's. `key_file`: see `Vault`. `on_begin` is called when an address was used up, so that another
    may be shown.

    Raises: WrongUse when the page's files are not those that were built.
    """

    def __init__(self, port: int, *, key_file: Path | None = None, on_begin: Callable[[], None] = lambda: None) -> None:
        self._port = port
        self._page = Page()
        self._launch = Launch()
        self._vault = Vault(key_file or vault_file())
        self._on_begin = on_begin
        self._cookie = f"cloister-chat-{port}"  # cookies have no ports

    def address(self) -> str:
        """A new address of the page, good for one browser. Show it to this machine's user and to nobody else."""
        return f"http://127.0.0.1:{self._port}/chat#{self._launch.token()}"

    def method(self, path: str) -> str | None:
        """The one that a path is asked with ("GET" for GET and HEAD); None where there is nothing."""
        return "GET" if path in self._page.paths else _METHODS.get(path)

    def lets_in(self, scope: dict[str, Any]) -> bool:
        """Whether a browser needs no key of the proxy's for this: for the page, which holds nothing, and for exchanging a
        token; and in a session for whatever the page asks."""
        path = scope["path"]
        return path in self._page.paths or path == "/chat/session" or self._is_session(dict(scope["headers"]))

    def answer(self, scope: dict[str, Any], content: bytes) -> Reply:
        """For a path that has a `method`, asked with it. Raises: WrongUse for a key that cannot be read or written."""
        path = scope["path"]
        if found := self._page.get(path):
            return found
        if path == "/chat/session":
            return self._begin(content)
        if not self._is_session(dict(scope["headers"])):
            return _refused("no_session", "This browser was not opened with the one-time address.")
        key = self._vault.renew() if path == "/chat/wipe" else self._vault.key()
        return json_reply(200, {"key": base64.b64encode(key).decode()})

    def _begin(self, content: bytes) -> Reply:
        begun = self._launch.begin(_token(content))
        if begun is None:
            return _refused("bad_token", "This address was used already, or is not of this proxy.")
        self._on_begin()
        cookie = f"{self._cookie}={begun.cookie}; Path=/; Max-Age={_LIFETIME}; HttpOnly; SameSite=Strict"
        return json_reply(200, {"binding": begun.binding}, (b"set-cookie", cookie.encode()))

    def _is_session(self, headers: dict[bytes, bytes]) -> bool:
        """Beside our cookie stands whatever other services of this machine set, in any form and under any name."""
        binding = headers.get(BINDING, b"").decode("latin-1")
        pairs = (one.partition("=") for one in headers.get(b"cookie", b"").decode("latin-1").split(";"))
        shown = [value.strip() for name, _, value in pairs if name.strip() == self._cookie]
        return any(self._launch.knows(one, binding) for one in shown)


def _token(content: bytes) -> str:
    """ "" for what is no such request."""
    if len(content) > _LONGEST_TOKEN:
        return ""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    token = told.get("token") if isinstance(told, dict) else None
    return token if isinstance(token, str) and token.isascii() else ""


def _refused(code: str, message: str) -> Reply:
    hint = "Open the address that the command printed last. Without it the chat works, and keeps nothing."
    error = {"message": message, "type": "proxy_error", "param": None, "code": code, "hint": hint}
    return json_reply(401, {"error": error})
