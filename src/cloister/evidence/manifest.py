"""A digest over many files that a person can repeat: `sha256sum FILES… | LC_ALL=C sort | sha256sum`.

Pure: callers hash the files. The simulator measures code with it, the enclave its engine.
"""

import hashlib
from collections.abc import Mapping

from cloister.errors import MalformedEvidence

__all__ = ["manifest", "manifest_digest"]


def manifest(entries: Mapping[str, bytes]) -> bytes:
    """`name -> SHA-256` (32 bytes) as sorted lines in the form of `sha256sum`: `hex`, two spaces, name, newline.

    Raises: MalformedEvidence for a name that `sha256sum` would escape, or a digest of another size.
    """
    for name, digest in entries.items():
        if not name or "\n" in name or "\\" in name or "\r" in name or len(digest) != 32:
            raise MalformedEvidence(f"{ascii(name)[:80]} cannot stand in a manifest.", step="manifest")
    lines = sorted(f"{digest.hex()}  {name}\n".encode() for name, digest in entries.items())
    return b"".join(lines)


def manifest_digest(entries: Mapping[str, bytes]) -> bytes:
    """SHA-256 (32 bytes) of `manifest(entries)`; of nothing when there are no files."""
    return hashlib.sha256(manifest(entries)).digest()
