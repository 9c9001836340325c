"""One sealed request and its answer, without I/O: a generator says what to do, a thin shell (`session`) does it.

yield Verify(stale)   -> Verified    a verification that holds, and is not `stale`
yield Fetch(…)        -> Arrived     send this over the untrusted hop; its status and headers
yield READ            -> bytes       the next bytes of what arrived; b"" at its end
yield Work(…)         -> Verified    what this gives, which may take its time: it may ask a vendor for collateral
return Opened         the sealed answer's head and what of its body is open already
"""

import base64
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeAlias
from urllib.parse import urlsplit

from cloister.channel import bhttp
from cloister.channel.freshness import http_date
from cloister.channel.ohttp import AUTHORITY, ResponseEnd, ResponseHead, ResponseOpener, seal_request
from cloister.client.attestor import Attestor, Clock
from cloister.client.diagnostic import printable
from cloister.errors import ChannelBroken, CloisterError, ConnectionFailed, KeyUnknown, PlaintextRefused, WrongUse
from cloister.evidence.document import MAX_DOCUMENT
from cloister.verify import Verified

__all__ = [
    "AUTHORITY",
    "READ",
    "Arrived",
    "Fetch",
    "Fields",
    "InnerRequest",
    "Opened",
    "Read",
    "Sealer",
    "Step",
    "Verify",
    "Work",
    "attest",
    "content",
    "trailers",
]

CACHE_SECRET = b"cloister-cache-secret"
_SEALED = "message/ohttp-chunked-res"
_DIAGNOSTIC = 64 << 10  # bytes of a plaintext answer that are read at most
_KEY_PROBLEM = "https://iana.org/assignments/http-problem-types#ohttp-key"
_NOT_OPENED = "https://cloister.invalid/problems/not-opened"
_DATE_PROBLEM = "https://iana.org/assignments/http-problem-types#date"
# Of the hop between caller and transport, or better decided here: a compressed answer would tell its content by its size.
_NOT_FORWARDED = frozenset(
    b"host connection keep-alive proxy-connection proxy-authorization proxy-authenticate te trailer transfer-encoding "
    b"upgrade expect accept-encoding content-length date".split()
)


Fields: TypeAlias = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class InnerRequest:
    """What is asked inside. `url` must name the authority `enclave.invalid`, which leads nowhere without this."""

    method: str
    url: str
    headers: Fields
    content: bytes


@dataclass(frozen=True, slots=True)
class Verify:
    stale: Verified | None


@dataclass(frozen=True, slots=True)
class Fetch:
    """`opaque`: the status that comes back says nothing of the answer, which may be long in coming."""

    method: str
    url: str
    headers: Mapping[str, str]
    content: bytes
    opaque: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    pass


READ = Read()


@dataclass(frozen=True, slots=True)
class Work:
    do: Callable[[], Verified]


@dataclass(frozen=True, slots=True)
class Arrived:
    """`headers` with lower-case names."""

    status: int
    headers: Mapping[str, str]

    @property
    def media_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(frozen=True, slots=True)
class Opened:
    """`body`: what of the content is open already, and `trailers` if its end is. Feed `opener` the rest, then let it judge
    the end by `finish`."""

    head: ResponseHead
    body: tuple[bytes, ...]
    opener: ResponseOpener
    trailers: Fields = ()


Step: TypeAlias = Verify | Fetch | Read | Work
Reply: TypeAlias = Verified | Arrived | bytes


def attest(attestor: Attestor) -> Generator[Step, Reply, Verified]:
    """Asks for evidence over a fresh nonce and judges it."""
    challenge = attestor.challenge()
    arrived = yield from _fetch(Fetch("GET", challenge.url, {"accept": "application/cmw+json"}, b""))
    body = yield from _read(MAX_DOCUMENT + 1)
    judged = yield Work(lambda: attestor.accept(challenge, arrived.status, arrived.media_type, body))
    if not isinstance(judged, Verified):
        raise TypeError("a shell that does not do its work")
    return judged


class Sealer:
    """Seals one session's requests; remembers the enclave's idea of the time, and a secret for its prompt cache."""

    def __init__(
        self,
        attestor: Attestor,
        clock: Clock,
        *,
        require_pq: bool,
        reuse_cache: bool,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._url = attestor.base + "/.well-known/ohttp-gateway"
        self._clock = clock
        self._require_pq = require_pq
        self._cache_secret = base64.urlsafe_b64encode(entropy(32)).rstrip(b"=") if reuse_cache else None
        self._offset = 0.0  # seconds that the enclave's clock is ahead of ours

    def exchange(self, request: InnerRequest) -> Generator[Step, Reply, Opened]:
        """Seals to what is verified, and opens the answer's head.

        Sends a second time in two cases only. Its date was off, which the enclave says inside the seal, so the first was
        certainly not run. And it was not opened, and the enclave, verified anew, has other keys than it was sealed to (a
        restarted one may have another key of the same name). That refusal is plaintext, and a host can forge it: it can
        have a request run twice, whenever it can have the keys change, and sees nothing new by it but sizes and times.

        Raises: WrongUse before anything is sent; NotTrusted, Malformed, Unreachable.
        """
        path = _path(request)
        verified = yield from _verify(None)
        renewed = dated = False
        while True:
            sealed = seal_request(verified, self._inner(request, path), require_pq=self._require_pq)
            outer = {
                "content-type": "message/ohttp-chunked-req",
                "incremental": "?1",
                "cloister-replica": sealed.replica,
            }
            arrived = yield from _fetch(Fetch("POST", self._url, outer, sealed.body, opaque=True))
            if arrived.status != 200 or arrived.media_type != _SEALED:
                refusal = _plaintext(arrived, (yield from _read(_DIAGNOSTIC)))
                if renewed or not _may_be_stale_key(refusal):
                    raise refusal
                renewed, sealed_to = True, verified.ohttp_keys
                verified = yield from _verify(verified)
                if verified.ohttp_keys == sealed_to:
                    raise refusal
                continue
            opened = yield from _open(sealed.response)
            if dated or not _may_be_date_problem(opened.head):
                return opened
            opened = yield from _whole(opened)
            if not self._learn_date(opened):
                return opened
            dated = True

    def _inner(self, request: InnerRequest, path: str) -> bhttp.Request:
        headers = [(low, value) for name, value in request.headers if (low := name.lower()) not in _NOT_FORWARDED]
        if self._cache_secret is not None and all(name != CACHE_SECRET for name, _ in headers):
            headers.append((CACHE_SECRET, self._cache_secret))
        headers.append((b"date", http_date(self._clock.wall() + self._offset)))
        return bhttp.Request(
            method=request.method.upper(),
            scheme="https",
            authority=AUTHORITY,
            path=path,
            headers=tuple(headers),
            content=request.content,
        )

    def _learn_date(self, opened: Opened) -> bool:
        """True for a date problem (RFC 9458, section 6.5.3). It came sealed, so the date is the enclave's own."""
        fields = dict(opened.head.headers)
        if _problem_type(b"".join(opened.body)) != _DATE_PROBLEM or b"date" not in fields:
            return False
        try:
            theirs = parsedate_to_datetime(fields[b"date"].decode("ascii")).timestamp()
        except (ValueError, OverflowError):
            return False
        self._offset = theirs - self._clock.wall()
        return True


def _path(request: InnerRequest) -> str:
    try:
        parts = urlsplit(request.url)
    except ValueError:  # an authority that is none
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or parts.netloc.lower() != AUTHORITY:
        raise WrongUse(
            "A sealed request goes to enclave.invalid and nowhere else.",
            hint='Use base_url="http://enclave.invalid/v1" with the sealing transport.',
            step="authority",
            expected=AUTHORITY,
            got=printable(parts.netloc),
        )
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _verify(stale: Verified | None) -> Generator[Step, Reply, Verified]:
    reply = yield Verify(stale)
    if not isinstance(reply, Verified):
        raise TypeError(reply)
    return reply


def _fetch(step: Fetch) -> Generator[Step, Reply, Arrived]:
    reply = yield step
    if not isinstance(reply, Arrived):
        raise TypeError(reply)
    return reply


def _read_some() -> Generator[Step, Reply, bytes]:
    reply = yield READ
    if not isinstance(reply, bytes):
        raise TypeError(reply)
    return reply


def _read(limit: int) -> Generator[Step, Reply, bytes]:
    """What arrived, to its end or to `limit` bytes."""
    body = bytearray()
    while len(body) < limit and (data := (yield from _read_some())):
        body += data
    return bytes(body[:limit])


def _open(opener: ResponseOpener) -> Generator[Step, Reply, Opened]:
    """Reads until the head has opened."""
    while data := (yield from _read_some()):
        items = iter(opener.feed(data))
        for item in items:
            if isinstance(item, ResponseHead):
                rest = list(items)
                return Opened(item, tuple(content(rest)), opener, trailers(rest))
    opener.finish()
    raise ChannelBroken("The answer ended well and had no head.", step="response")


def _whole(opened: Opened) -> Generator[Step, Reply, Opened]:
    body, ended = list(opened.body), opened.trailers
    while data := (yield from _read_some()):
        items = opened.opener.feed(data)
        body += content(items)
        ended = ended or trailers(items)
    opened.opener.finish()
    return Opened(opened.head, tuple(body), opened.opener, ended)


def content(items: Iterable[ResponseHead | bytes | ResponseEnd]) -> Iterator[bytes]:
    """The content among what an opener gave out; the judgement over the end is `ResponseOpener.finish`'s alone."""
    return (item for item in items if isinstance(item, bytes))


def trailers(items: Iterable[ResponseHead | bytes | ResponseEnd]) -> Fields:
    """The fields that came behind the content, where its authentic end is among the items."""
    return next((tuple(item.trailers) for item in items if isinstance(item, ResponseEnd)), ())


def _may_be_stale_key(refusal: CloisterError) -> bool:
    """A key that is gone, or one that a restarted enclave has another of under the same identifier."""
    return isinstance(refusal, KeyUnknown) or refusal.step == "open"


def _may_be_date_problem(head: ResponseHead) -> bool:
    return head.status == 400 and dict(head.headers).get(b"content-type") == b"application/problem+json"


def _problem_type(body: bytes) -> str:
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    kind = problem.get("type") if isinstance(problem, dict) else None
    return kind if isinstance(kind, str) else ""


def _plaintext(arrived: Arrived, body: bytes) -> CloisterError:
    """What a plaintext answer, of whatever status, becomes: anybody on the way may have written it."""
    problem = _problem_type(body)
    if arrived.status == 422 and problem == _KEY_PROBLEM:
        return KeyUnknown("The enclave does not hold the key that the request was sealed to.", step="key")
    if arrived.status == 400 and problem == _NOT_OPENED:
        return ChannelBroken(
            "The enclave could not open the request.",
            hint="It was changed, cut or replayed on the way, or something on the way only says so.",
            step="open",
        )
    said = printable(body)
    if arrived.status in (408, 429, 502, 503, 504):
        return ConnectionFailed(
            f"The way to the enclave is blocked (status {arrived.status}).", hint="Try again soon.", got=said
        )
    return PlaintextRefused(
        f"An answer came outside the sealed channel (status {arrived.status}); it is not the enclave's word.",
        hint="Something between here and the enclave answered, or the enclave could not open the request.",
        step="response",
        expected=_SEALED,
        got=said,
    )
