"""The proxy's own key, as the commands that serve one make it and show it."""

import shlex
import sys

from cloister.cli import output
from cloister.proxy.key import OwnKey, needs_key, own_key

__all__ = ["announce_key", "curl_option", "take_key", "text_of"]


def take_key(*, required: bool = False, platform: str = sys.platform) -> OwnKey | None:
    """None where the proxy asks for none: on Linux, unless it is `required`. Raises: WrongUse when it cannot be kept."""
    return own_key() if required or needs_key(platform) else None


def text_of(key: OwnKey | None) -> str:
    """As `ProxyConfig` takes it."""
    return "" if key is None else key.text


def announce_key(key: OwnKey | None) -> None:
    """The key itself is shown once, when it is made; later only where it is."""
    if key is None:
        return
    if key.made:
        output.line(f"key {key.text}")
    told = "a tool sends it as its API key; the enclave's own goes to --api-key"
    output.note(f"the key of this proxy is in {key.file}: {told}", "dim")


def curl_option(key: OwnKey | None) -> str:
    """What a shown curl line needs beside the rest: the key, but not its letters."""
    return "" if key is None else f' -H "Authorization: Bearer $(cat {shlex.quote(str(key.file))})"'
