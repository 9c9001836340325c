"""The console's files, written by hand and checked in beside this; and what a browser may do with them."""

from importlib.resources import files

from starlette.responses import Response

from cloister.errors import NotFound

__all__ = ["CONTENT_SECURITY_POLICY", "Page"]

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
)
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_FILES = {
    "/console": ("index.html", "text/html"),
    "/console/page.js": ("page.js", "text/javascript"),
    "/console/style.css": ("style.css", "text/css"),
}


class Page:
    """The files by the path that they are served at, read once."""

    def __init__(self) -> None:
        folder = files("cloister.host").joinpath("page")
        self._files = {path: (folder.joinpath(name).read_bytes(), kind) for path, (name, kind) in _FILES.items()}

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(self._files)

    def get(self, path: str) -> Response:
        """Raises: NotFound."""
        if path not in self._files:
            raise NotFound("There is no such page.")
        content, kind = self._files[path]
        return Response(content, headers=_HEADERS, media_type=kind)
