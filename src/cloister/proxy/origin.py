"""Where in a browser an app's pages stand: at a name of its own, `NAME.localhost`, and so in an origin of its own.

A page is as strong as its origin, and 127.0.0.1 with a port is whoever's turn it is: today an app, tomorrow the web chat.
A tab that stayed open, or what a page left in the browser, would be inside the next one. So the pages of an app are pages
at its own name alone; what it answers under 127.0.0.1 is data, inert in a browser. The name holds for one owner's
deployment, and is made with a key of this user's, so that nobody else on the machine can wait for its cookies on another
port (cookies have no ports). Browsers and curl know that `*.localhost` is this machine; no network is asked.
"""

import base64
import hmac
import json
from dataclasses import dataclass

from cloister.proxy.vault import Vault, vault_file
from cloister.verify import Verified

__all__ = ["Identity", "Place", "app_name", "identity", "origin_key"]

_KINDS = ("asgi", "wsgi")
_NAME_BYTES = 15  # of a digest: 24 characters of Base32


@dataclass(frozen=True, slots=True)
class Identity:
    """What an app's origin is bound to: releases of one deployment share it, as they share an owner."""

    owner_key: str
    deployment: str
    simulated: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request came in. `host`: see `Guard.host`. `app`: behind the proxy is somebody's own app, whose paths
    and methods are its own affair. `live`: at the app's own name, where its pages are pages."""

    host: str
    app: bool = False
    live: bool = False


def identity(verified: Verified) -> Identity | None:
    """None for the built-in app, which is an API and has no pages."""
    launch = verified.launch
    if launch.app.kind not in _KINDS:
        return None
    return Identity(launch.owner_key, launch.deployment, verified.simulated)


def app_name(one: Identity, key: bytes) -> str:
    """A host name below `localhost`. `key`: 32 bytes that nobody else has."""
    words = json.dumps([one.owner_key, one.deployment, one.simulated]).encode()
    digest = hmac.digest(key, words, "sha256")[:_NAME_BYTES]
    return f"{base64.b32encode(digest).decode().lower()}.localhost"


def origin_key() -> bytes:
    """This user's, kept beside the web chat's. Raises: WrongUse when it cannot be kept, or others can reach it."""
    hint = "An app's pages need it: their address is made with it."
    return Vault(vault_file().with_name("apps.key"), hint=hint).key()
