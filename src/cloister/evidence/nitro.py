"""AWS Nitro's attestation document: a map inside a COSE_Sign1 message (RFC 9052, section 4.2).

```
document  = [ protected, {}, payload, signature ]     bare, or behind COSE's tag 18
protected = CBOR {1: algorithm}                       payload = CBOR {module_id, timestamp, digest, pcrs, …}
signature = r || s, over CBOR ["Signature1", protected, h'', payload]
```

Source: AWS, "Verifying the root of trust" and the Nitro Secure Module's `attestation_process.md`, sections 2 and 3.2.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import cbor2

from cloister.errors import MalformedEvidence
from cloister.evidence.document import MAX_ITEM

__all__ = ["LAUNCH_PCR", "MEDIA_TYPE", "NitroDocument", "launch_extension", "launch_pcr", "parse_document"]

MEDIA_TYPE = "application/cose"

LAUNCH_PCR = 16
"""PCRs 0 to 15 belong to the hypervisor; this is the first that an enclave extends (PROTOCOL, "Launch config")."""

_TAG = b"\xd2"
_NULL = 0xF6
_STREAMED_MAP, _STREAM_END = 0xBF, b"\xff"
_MAX_DEPTH = 3
_MAX_ITEMS = 32

_COSE_ALGORITHM = 1
_MAX_PROTECTED = 16
_SIGNATURE_SIZE = 96

_REQUIRED = frozenset({"module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"})
_OPTIONAL = frozenset({"public_key", "user_data", "nonce"})

_MODULE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_MAX_PCRS = 32
_PCR_SIZES = (32, 48, 64)
_MAX_CERTIFICATE = 1024
_MAX_BUNDLE = 8
_MAX_PUBLIC_KEY = 1024
_MAX_USER_DATA = 512
_MAX_TIMESTAMP = 2**53 - 1


@dataclass(frozen=True, slots=True)
class NitroDocument:
    """`timestamp` in milliseconds since 1970. `pcrs`: the locked ones, by index. `cabundle`: DER, the root first,
    without `certificate`, which signed. `public_key`, `user_data`, `nonce`: what the enclave put there, None for none.
    `algorithm` is COSE's number. `payload` and `protected` are the exact bytes under `signature`."""

    module_id: str
    timestamp: int
    pcrs: Mapping[int, bytes]
    certificate: bytes
    cabundle: tuple[bytes, ...]
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None
    algorithm: int
    protected: bytes
    payload: bytes
    signature: bytes

    @property
    def signed(self) -> bytes:
        """COSE's Sig_structure without external data (RFC 9052, section 4.4)."""
        return cbor2.dumps(["Signature1", self.protected, b"", self.payload])


def launch_extension(launch: bytes) -> bytes:
    """What the enclave extends `LAUNCH_PCR` by, once, before it locks it: SHA-384 of the launch config's bytes."""
    return hashlib.sha384(launch).digest()


def launch_pcr(launch: bytes) -> bytes:
    """What `LAUNCH_PCR` then holds: SHA-384(48 zero bytes || extension)."""
    return hashlib.sha384(bytes(48) + launch_extension(launch)).digest()


def parse_document(data: bytes) -> NitroDocument:
    """Total and bounded: form only, no signature is checked.

    AWS's bounds, and one encoding for each value: lengths and integers in shortest form, no tags, no repeated keys,
    nothing after. Newer hypervisors stream the payload's outer map (its end is marked instead of its length), and that
    alone is allowed.

    Raises: MalformedEvidence.
    """
    if len(data) > MAX_ITEM:
        raise MalformedEvidence("The Nitro document is too long.", step="nitro", expected=f"{MAX_ITEM} bytes")
    outer = _Reader(data.removeprefix(_TAG), "nitro").whole()
    if not isinstance(outer, list) or len(outer) != 4:
        raise MalformedEvidence("The Nitro document is not a COSE_Sign1 array of 4.", step="nitro")
    if outer[1] != {}:
        raise MalformedEvidence("The Nitro document has unprotected headers.", step="nitro.unprotected")
    protected = _bytes(outer[0], 1, _MAX_PROTECTED, "nitro.protected")
    payload = _bytes(outer[2], 1, MAX_ITEM, "nitro.payload")
    fields = _Reader(payload, "nitro.payload", may_stream=True).whole()
    if not isinstance(fields, dict) or not _REQUIRED <= fields.keys() <= _REQUIRED | _OPTIONAL:
        raise MalformedEvidence("The payload is not a map of AWS's fields.", step="nitro.payload")
    return NitroDocument(
        module_id=_module_id(fields["module_id"]),
        timestamp=_timestamp(fields),
        pcrs=_pcrs(fields["pcrs"]),
        certificate=_bytes(fields["certificate"], 1, _MAX_CERTIFICATE, "nitro.certificate"),
        cabundle=_cabundle(fields["cabundle"]),
        public_key=_optional(fields, "public_key", 1, _MAX_PUBLIC_KEY),
        user_data=_optional(fields, "user_data", 0, _MAX_USER_DATA),
        nonce=_optional(fields, "nonce", 0, _MAX_USER_DATA),
        algorithm=_algorithm(protected),
        protected=protected,
        payload=payload,
        signature=_bytes(outer[3], _SIGNATURE_SIZE, _SIGNATURE_SIZE, "nitro.signature"),
    )


class _Reader:
    """The CBOR that AWS sends (RFC 8949): integers, byte and text strings, lists, maps, null, in their shortest form.

    A map's keys are integers or text; `may_stream`: the outermost map may be of indefinite length.
    """

    def __init__(self, data: bytes, what: str, *, may_stream: bool = False) -> None:
        self._data, self._at, self._what, self._may_stream = data, 0, what, may_stream

    def whole(self) -> object:
        value = self._value(0)
        if self._at != len(self._data):
            raise self._error("something after its end")
        return value

    def _error(self, why: str) -> MalformedEvidence:
        return MalformedEvidence(f"{self._what} is not strict CBOR: {why}.", step=self._what)

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise self._error("cut short")
        self._at += count
        return self._data[self._at - count : self._at]

    def _value(self, depth: int) -> object:
        if depth > _MAX_DEPTH:
            raise self._error("too deep")
        head = self._take(1)[0]
        if head == _NULL:
            return None
        if head == _STREAMED_MAP and depth == 0 and self._may_stream:
            return self._map(None, depth)
        major, argument = head >> 5, self._argument(head & 0x1F)
        match major:
            case 0:
                return argument
            case 1:
                return -1 - argument
            case 2:
                return self._take(argument)
            case 3:
                return self._text(argument)
            case 4:
                return self._list(argument, depth)
            case 5:
                return self._map(argument, depth)
        raise self._error("a tag, a float or another type that AWS does not send")

    def _argument(self, low: int) -> int:
        if low < 24:
            return low
        if low > 27:
            raise self._error("an indefinite length")
        size = 1 << (low - 24)
        argument = int.from_bytes(self._take(size), "big")
        if argument < (24 if size == 1 else 1 << (4 * size)):
            raise self._error("a number that is not in its shortest form")
        return argument

    def _text(self, length: int) -> str:
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise MalformedEvidence(f"{self._what} has text that is not UTF-8.", step=self._what) from error

    def _list(self, count: int, depth: int) -> list[object]:
        if count > _MAX_ITEMS:
            raise self._error("a list that is too long")
        return [self._value(depth + 1) for _ in range(count)]

    def _map(self, count: int | None, depth: int) -> dict[int | str, object]:
        found: dict[int | str, object] = {}
        while len(found) != count:
            if count is None and self._data[self._at : self._at + 1] == _STREAM_END:
                self._at += 1
                break
            key = self._value(depth + 1)
            if not isinstance(key, int | str) or key in found or len(found) >= _MAX_ITEMS:
                raise self._error("a key that is repeated, of another type, or one too many")
            found[key] = self._value(depth + 1)
        return found


def _algorithm(protected: bytes) -> int:
    header = _Reader(protected, "nitro.protected").whole()
    algorithm = header.get(_COSE_ALGORITHM) if isinstance(header, dict) and len(header) == 1 else None
    if not isinstance(algorithm, int):
        raise MalformedEvidence("The protected header holds more, or less, than an algorithm.", step="nitro.protected")
    return algorithm


def _module_id(value: object) -> str:
    if not isinstance(value, str) or not _MODULE_ID.fullmatch(value):
        raise MalformedEvidence("module_id is not a short name.", step="nitro.module_id")
    return value


def _timestamp(fields: Mapping[Any, Any]) -> int:
    if fields["digest"] != "SHA384":
        raise MalformedEvidence("The PCRs' digest is not SHA384.", step="nitro.digest", expected="SHA384")
    value = fields["timestamp"]
    if type(value) is not int or not 0 < value <= _MAX_TIMESTAMP:
        raise MalformedEvidence("timestamp is not a time in milliseconds.", step="nitro.timestamp")
    return value


def _pcrs(value: object) -> Mapping[int, bytes]:
    if not isinstance(value, dict) or not 1 <= len(value) <= _MAX_PCRS:
        raise MalformedEvidence("pcrs is not a map of 1 to 32 entries.", step="nitro.pcrs")
    for index, pcr in value.items():
        if type(index) is not int or not 0 <= index < _MAX_PCRS:
            raise MalformedEvidence("pcrs has an index beyond 31.", step="nitro.pcrs")
        if not isinstance(pcr, bytes) or len(pcr) not in _PCR_SIZES:
            raise MalformedEvidence("A PCR does not have 32, 48 or 64 bytes.", step="nitro.pcrs")
    return MappingProxyType(dict(value))


def _cabundle(value: object) -> tuple[bytes, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_BUNDLE:
        raise MalformedEvidence("cabundle is not a short list.", step="nitro.cabundle")
    return tuple(_bytes(certificate, 1, _MAX_CERTIFICATE, "nitro.cabundle") for certificate in value)


def _optional(fields: Mapping[Any, Any], name: str, low: int, high: int) -> bytes | None:
    value = fields.get(name)
    return None if value is None else _bytes(value, low, high, f"nitro.{name}")


def _bytes(value: object, low: int, high: int, what: str) -> bytes:
    if not isinstance(value, bytes) or not low <= len(value) <= high:
        raise MalformedEvidence(f"{what} is not {low} to {high} bytes.", step=what, expected=f"{low} to {high} bytes")
    return value
