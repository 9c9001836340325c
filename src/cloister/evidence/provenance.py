"""Measurements that travel with the evidence, signed by somebody whom the policy names.

```
provenance = JSON {"payload": base64url, "key": "ed25519:…", "signature": base64url}      or
             JSON {"payload": base64url, "sigstore": a sigstore bundle over the payload}
payload    = JSON {"v": 1, "deployment": name, "release": number, "measurements": {platform: [{component: value}]}}
signature  = Ed25519 over "cloister/measurements/v1\\0" || payload
```
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cloister.errors import MalformedEvidence
from cloister.evidence.document import MAX_LOG, Item
from cloister.evidence.launch import OWNER_KEY
from cloister.evidence.strict_json import Fields, b64url, load_object

__all__ = ["MEDIA_TYPE", "Payload", "Provenance", "parse_payload", "parse_provenance", "signed_bytes"]

MEDIA_TYPE = "application/vnd.cloister.signed-measurements+json"

_DOMAIN = b"cloister/measurements/v1\0"
_MOST_ENTRIES = 256
_MOST_COMPONENTS = 64


@dataclass(frozen=True, slots=True)
class Provenance:
    """`payload` is the exact bytes signed. Either `key` ("ed25519:…") and `signature` (64 bytes), or `bundle` (JSON)."""

    payload: bytes
    key: str = ""
    signature: bytes = b""
    bundle: bytes = b""

    def item(self) -> Item:
        """The item of the attestation document."""
        fields: dict[str, object] = {"payload": b64url(self.payload)}
        if self.bundle:
            fields["sigstore"] = json.loads(self.bundle)
        else:
            fields |= {"key": self.key, "signature": b64url(self.signature)}
        return Item(MEDIA_TYPE, json.dumps(fields, separators=(",", ":")).encode())


@dataclass(frozen=True, slots=True)
class Payload:
    """What the signer says: these measurements are those of this release of this deployment. Values are text or numbers,
    as in a policy."""

    deployment: str
    release: int
    measurements: Mapping[str, tuple[Mapping[str, str | int], ...]]

    def encode(self) -> bytes:
        measurements = {platform: [dict(entry) for entry in entries] for platform, entries in self.measurements.items()}
        fields = {"v": 1, "deployment": self.deployment, "release": self.release, "measurements": measurements}
        return json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()


def signed_bytes(payload: bytes) -> bytes:
    return _DOMAIN + payload


def parse_provenance(content: bytes) -> Provenance:
    """Form only. Raises: MalformedEvidence."""
    fields = Fields(load_object(content, max_bytes=MAX_LOG, what="provenance"), what="provenance")
    payload = fields.binary("payload", low=2, high=MAX_LOG)
    if fields.has("sigstore"):
        bundle = fields.take("sigstore")
        fields.end()
        if not isinstance(bundle, dict):
            raise MalformedEvidence("provenance.sigstore is not an object.", step="provenance.sigstore")
        return Provenance(payload, bundle=json.dumps(bundle, separators=(",", ":")).encode())
    found = Provenance(
        payload,
        key=fields.matching("key", OWNER_KEY, "ed25519: and 43 characters of base64url"),
        signature=fields.binary("signature", low=64, high=64),
    )
    fields.end()
    return found


def parse_payload(payload: bytes) -> Payload:
    """To be believed only when its signature is. Raises: MalformedEvidence."""
    fields = Fields(load_object(payload, max_bytes=MAX_LOG, what="provenance.payload"), what="provenance.payload")
    fields.integer("v", low=1, high=1)
    deployment, release = fields.text("deployment", max_length=63), fields.integer("release")
    platforms = Fields(fields.take("measurements"), what="provenance.payload.measurements")
    fields.end()
    measurements = {
        platform: tuple(_entry(entry, platform) for entry in platforms.items(platform, max_items=_MOST_ENTRIES))
        for platform in platforms.names()
    }
    return Payload(deployment, release, MappingProxyType(measurements))


def _entry(value: object, platform: str) -> Mapping[str, str | int]:
    step = f"provenance.payload.measurements.{ascii(platform)[1:17]}"
    if not isinstance(value, dict) or not 0 < len(value) <= _MOST_COMPONENTS:
        raise MalformedEvidence("An entry of the signed measurements names nothing, or too much.", step=step)
    if not all(type(component) in (str, int) for component in value.values()):
        raise MalformedEvidence("A signed measurement is neither text nor an integer.", step=step)
    return MappingProxyType(dict(value))
