"""The key that the web chat's conversations are encrypted with, kept where the browser's files are not.

The browser keeps conversations, encrypted; the proxy keeps the key, in this user's state directory, so that both survive
a restart and neither is readable by itself: a copy, a backup or a synchronised profile of the browser opens nothing. It
protects from nobody who can read both, such as this user's other programs.
"""

import secrets
from pathlib import Path

from cloister import private_file
from cloister.client.memory import seen_file
from cloister.errors import WrongUse

__all__ = ["KEY_BYTES", "Vault", "vault_file"]

KEY_BYTES = 32
_CHAT = "The web chat works without it, and then keeps nothing."


def vault_file() -> Path:
    """`$XDG_STATE_HOME/cloister/chat.key`, or `~/.local/state/cloister/chat.key`."""
    return seen_file().with_name("chat.key")


class Vault:
    """A file of 32 random bytes that its user alone may read (0600), made when it is first asked for.

    Raises, in both methods: WrongUse when others can reach the file, or it is damaged or cannot be read or written.
    """

    def __init__(self, path: Path, *, hint: str = _CHAT) -> None:
        """`hint`: what it means when the file cannot be had."""
        self.path = path
        self._hint = hint

    def key(self) -> bytes:
        """Of two processes that make it at once, both get the same."""
        try:
            if not self.path.exists():
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                private_file.write_once(self.path, secrets.token_bytes(KEY_BYTES))
            private_file.refuse_shared(self.path, step="vault")
            key = self.path.read_bytes()
        except OSError as error:
            raise _unusable(self.path, error, self._hint) from error
        if len(key) != KEY_BYTES:
            hint = "Restore it; moving it away makes a new one, and what the old one encrypted stays closed."
            raise WrongUse(f"{self.path} is damaged.", hint=hint, step="vault")
        return key

    def renew(self) -> bytes:
        """Another key in the old one's place: whatever copy there is of what the old one encrypted stays closed."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            private_file.write(self.path, secrets.token_bytes(KEY_BYTES))
        except OSError as error:
            raise _unusable(self.path, error, self._hint) from error
        return self.key()


def _unusable(path: Path, error: OSError, hint: str) -> WrongUse:
    return WrongUse(f"{path} cannot be used: {error.strerror}.", hint=hint, step="vault")
