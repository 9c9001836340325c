"""The record of where the model comes from, as the host hands it over: hashed as it stands, and claimed only when it is of
the very bytes that were loaded."""

import hashlib
from pathlib import Path

from cloister.errors import MalformedEvidence
from cloister.evidence.strict_json import Fields, load_object

__all__ = ["read_lineage_digest"]

_SUFFIX = ".lineage.json"
_MAX_BYTES = 1 << 24


def read_lineage_digest(model: Path, sha256: str) -> tuple[str | None, str]:
    """SHA-256 (hex) of the record beside `model`, whose loaded bytes have the digest `sha256`; and, when one is there that
    is not claimed, why. Of what the record says, only that it is of these bytes is looked at: nobody signs the rest."""
    try:
        with model.with_name(model.name + _SUFFIX).open("rb") as file:
            record = file.read(_MAX_BYTES + 1)
        fields = Fields(load_object(record, max_bytes=_MAX_BYTES, what="lineage"), what="lineage")
        fields.integer("v", low=1, high=1)
        named = fields.sha256("sha256")
    except FileNotFoundError:
        return None, ""
    except OSError:
        return None, "The record of the model's lineage cannot be read."
    except MalformedEvidence:
        return None, "The record of the model's lineage is malformed."
    if named != sha256:
        return None, "The record of the model's lineage is of another file."
    return hashlib.sha256(record).hexdigest(), ""
