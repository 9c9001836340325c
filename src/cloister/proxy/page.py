"""The web chat's files, as they were built from `web/chat` and checked in; and what a browser may do with them.

They are pinned twice: `assets.json` beside them holds the digest of each, and the page itself names the digests of its
script and style (Subresource Integrity).
"""

import hashlib
import json
from importlib.resources import files
from importlib.resources.abc import Traversable

from cloister.errors import WrongUse
from cloister.proxy.reply import Reply

__all__ = ["CONTENT_SECURITY_POLICY", "Page"]

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types cloister-markdown"
)
_TYPES = {
    "html": b"text/html; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
    "css": b"text/css; charset=utf-8",
    "txt": b"text/plain; charset=utf-8",
}
_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-dns-prefetch-control", b"off"),  # a link in an answer would tell its host's name to the network, unclicked
    (b"x-frame-options", b"DENY"),
)


class Page:
    """The built files by the path that they are served at; read once, and each held against its digest.

    Raises: WrongUse when a file is missing, or is not the one that was built.
    """

    def __init__(self, folder: Traversable | None = None) -> None:
        folder = files("cloister.proxy").joinpath("page") if folder is None else folder
        try:
            digests: dict[str, str] = json.loads(folder.joinpath("assets.json").read_bytes())
            contents = {name: folder.joinpath(name).read_bytes() for name in digests}
        except (OSError, ValueError) as error:
            raise _damaged("assets.json") from error
        for name, content in contents.items():
            if f"sha256:{hashlib.sha256(content).hexdigest()}" != digests[name]:
                raise _damaged(name)
        self._files = {_path(name): _reply(name, content) for name, content in contents.items()}

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(self._files)

    def get(self, path: str) -> Reply | None:
        return self._files.get(path)


def _path(name: str) -> str:
    return "/chat" if name == "index.html" else f"/chat/{name}"


def _reply(name: str, content: bytes) -> Reply:
    described = ((b"content-type", _TYPES[name.rpartition(".")[2]]), (b"content-length", str(len(content)).encode()))
    return Reply(200, described + _HEADERS, content)


def _damaged(name: str) -> WrongUse:
    hint = "Install cloister anew; or build the page: npm ci && npm run build, in web/chat."
    return WrongUse(f"The web chat's {name} is not the one that was built.", hint=hint, step="page")
