"""What a person chose to keep of conversations, encrypted on this machine: saved ones, and lines that were typed.

AES-256-GCM under a key of 32 random bytes beside them, readable by this user alone. It keeps a copy of the files (a
backup, a synchronized folder) from being read without the key; who can read the user's home can read both.
"""

import base64
import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from prompt_toolkit.history import History

from cloister import private_file
from cloister.errors import WrongUse

__all__ = ["Chats", "KeptHistory"]

_NONCE = 12
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
_LINES = 1000
_CHAT, _LINE = b"cloister chat v1\0", b"cloister line v1"


class Chats:
    """Saved conversations and the typed lines, in a folder that is made (0700) with the first of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, name: str, conversation: dict[str, Any]) -> None:
        """In place of an older one of that name; whole or not at all. Raises: WrongUse."""
        path = self._path(name)
        with self._usable():
            private_file.write(path, self._seal(json.dumps(conversation).encode(), _CHAT + name.encode()))

    def load(self, name: str) -> dict[str, Any]:
        """Raises: WrongUse when there is none, or it is not what was saved under this name."""
        path = self._path(name)
        if not path.exists():
            saved = ", ".join(self.names()) or "none"
            raise WrongUse("No conversation was saved by that name.", hint=f"Saved: {saved}", got=name)
        with self._usable():
            value = json.loads(self._open(path.read_bytes(), _CHAT + name.encode()))
        if not isinstance(value, dict):
            raise WrongUse("The saved conversation has no shape.")
        return value

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._folder.glob("*.chat"))

    def lines(self) -> list[str]:
        """Typed lines, the newest first. What cannot be opened is left out."""
        path = self._folder / "lines"
        found = []
        for row in reversed(path.read_bytes().splitlines()[-_LINES:] if path.exists() else []):
            with contextlib.suppress(WrongUse, ValueError):
                found.append(self._open(base64.b64decode(row), _LINE).decode())
        return found

    def add_line(self, text: str) -> None:
        """Raises: WrongUse."""
        with self._usable():
            sealed = base64.b64encode(self._seal(text.encode(errors="replace"), _LINE))
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            with os.fdopen(os.open(self._folder / "lines", flags, 0o600), "ab") as file:
                file.write(sealed + b"\n")

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise WrongUse(
                f"Chats cannot be kept in {self._folder}: {reason}.", hint="Is there room, and is it yours?"
            ) from error

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise WrongUse("A name has letters, digits, dots, dashes and underscores, 60 at most.")
        return self._folder / f"{name}.chat"

    def _key(self) -> AESGCM:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        private_file.refuse_shared(self._folder)
        path = self._folder / "key"
        if not path.exists():
            private_file.write_once(path, secrets.token_bytes(32))
        private_file.refuse_shared(path)
        key = path.read_bytes()
        if len(key) != 32:
            raise WrongUse(f"{path} holds no key.", hint="Move it away with what was saved; a new one is made.")
        return AESGCM(key)

    def _seal(self, content: bytes, what: bytes) -> bytes:
        nonce = secrets.token_bytes(_NONCE)
        return nonce + self._key().encrypt(nonce, content, what)

    def _open(self, sealed: bytes, what: bytes) -> bytes:
        try:
            return self._key().decrypt(sealed[:_NONCE], sealed[_NONCE:], what)
        except (InvalidTag, ValueError):
            raise WrongUse("What was saved does not open: it was changed, or saved under another key.") from None


class KeptHistory(History):
    """prompt_toolkit's history of typed lines, over `chats`. What cannot be kept is asked all the same."""

    def __init__(self, chats: Chats) -> None:
        super().__init__()
        self._chats = chats

    def load_history_strings(self) -> Iterable[str]:
        return self._chats.lines()

    def store_string(self, string: str) -> None:
        with contextlib.suppress(WrongUse):
            self._chats.add_line(string)
