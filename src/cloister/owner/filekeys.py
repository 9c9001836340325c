"""The keys of sealed bundles, in the owner's state folder and nowhere else, each file for its user alone."""

import json
from collections.abc import Mapping
from pathlib import Path

from cloister import private_file
from cloister.channel.sections import FILE_KEY
from cloister.errors import MalformedEvidence, WrongUse
from cloister.evidence.bundle import SECTIONS, BundleHead
from cloister.evidence.strict_json import Fields, b64url, load_object

__all__ = ["load", "read", "save", "write_private"]

_MAX_BYTES = 4096


def save(state: Path, bundle_id: str, keys: Mapping[str, bytes]) -> None:
    """Raises: OSError."""
    members = {"v": 1, "keys": {name: b64url(key) for name, key in keys.items()}}
    write_private(_path(state, bundle_id), json.dumps(members).encode())


def load(state: Path, head: BundleHead) -> Mapping[str, bytes]:
    """Section -> file key. Raises: WrongUse when this owner did not package that bundle, or others can reach the keys."""
    return read(_path(state, head.id))


def read(path: Path) -> Mapping[str, bytes]:
    """As `load`, from where the file was brought to."""
    try:
        private_file.refuse_shared(path, step="keys")
        fields = Fields(load_object(path.read_bytes(), max_bytes=_MAX_BYTES, what="keys"), what="keys")
        fields.integer("v", low=1, high=1)
        members = Fields(fields.take("keys"), what="keys")
        fields.end()
        keys = {name: members.binary(name, low=FILE_KEY, high=FILE_KEY) for name in SECTIONS if members.has(name)}
        members.end()
    except FileNotFoundError as error:
        hint = "Package it here, or bring the keys from where it was packaged."
        raise WrongUse("The keys of this bundle are not on this machine.", step="keys", hint=hint) from error
    except (OSError, MalformedEvidence) as error:
        raise WrongUse(f"{path} cannot be read.", step="keys", hint="Package the app again.") from error
    return keys


def write_private(path: Path, content: bytes) -> None:
    """For its user alone, and so are the folders that had to be made for it. Raises: OSError."""
    for folder in (path.parent.parent, path.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    private_file.write(path, content)


def _path(state: Path, bundle_id: str) -> Path:
    return state / "bundles" / f"{bundle_id}.json"
