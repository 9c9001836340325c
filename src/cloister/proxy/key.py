"""The proxy's own key: shown by programs where the system does not say which user asks (Linux alone does), or on demand."""

import re
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

from cloister import private_file
from cloister.errors import WrongUse
from cloister.proxy.vault import vault_file

__all__ = ["OwnKey", "key_file", "needs_key", "own_key"]

_BYTES = 32
_KEY = re.compile(r"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class OwnKey:
    """`text`: 256 random bits in URL-safe Base64, as a tool sends them in the place of an API key. `made`: just now."""

    text: str
    file: Path
    made: bool

    def __repr__(self) -> str:
        return f"OwnKey({self.file})"


def needs_key(platform: str = sys.platform) -> bool:
    """Whether other users of this machine can be told from this one by a key alone."""
    return platform != "linux"


def key_file() -> Path:
    """`$XDG_STATE_HOME/cloister/proxy.key`, or `~/.local/state/cloister/proxy.key`."""
    return vault_file().with_name("proxy.key")


def own_key(file: Path | None = None) -> OwnKey:
    """This user's, from a file of one line that nobody else may read (0600), made when it is first asked for. Of two
    processes that make it at once, both get the same.

    Raises: WrongUse when others can reach the file, or it is damaged or cannot be read or written.
    """
    file = file or key_file()
    try:
        made = not file.exists()
        if made:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            private_file.write_once(file, f"{secrets.token_urlsafe(_BYTES)}\n".encode())
        private_file.refuse_shared(file, step="proxy-key")
        text = file.read_bytes().decode("ascii", "replace").strip()
    except OSError as error:
        hint = "Without it a proxy on this system would answer every local user."
        raise WrongUse(f"{file} cannot be used: {error.strerror}.", hint=hint, step="proxy-key") from error
    if not _KEY.fullmatch(text):
        hint = "Moving it away makes a new one; your tools need that then."
        raise WrongUse(f"{file} is damaged.", hint=hint, step="proxy-key")
    return OwnKey(text, file, made)
