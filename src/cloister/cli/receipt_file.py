"""A receipt as a file: an answer, what it answers, and the document of the enclave that signed for both.

```
FILE = JSON {"cloister_receipt": 1, "request": base64, "answer": base64, "document": what `cloister verify --save` writes}
```

Request and answer are the exact bytes that were signed; the answer is an event stream, which ends with its receipt.
"""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from cloister import private_file
from cloister.cli.verify import Saved, saved_of
from cloister.client import Session
from cloister.errors import CloisterError, MalformedEvidence, WrongUse
from cloister.verify import Verified

__all__ = ["Kept", "Recorder", "parse_kept"]

_ASKS = "cloister-receipt"
_END = b"\ndata: [DONE]\n"
_MOST_BEHIND = 64 << 10  # bytes after the last event: the receipt, and padding


@dataclass(frozen=True, slots=True)
class Kept:
    """Not checked: that the answer's receipt is there, and fits."""

    request: bytes
    answer: bytes
    document: Saved

    def encode(self) -> bytes:
        told: dict[str, Any] = {"cloister_receipt": 1}
        told |= {name: base64.b64encode(getattr(self, name)).decode() for name in ("request", "answer")}
        return json.dumps({**told, "document": json.loads(self.document.encode())}, indent=1).encode() + b"\n"

    def write(self, path: Path) -> None:
        """For this user's eyes alone. Raises: WrongUse."""
        try:
            private_file.write(path, self.encode())
        except OSError as error:
            raise WrongUse(f"{path} cannot be written: {error.strerror}.") from error


def parse_kept(content: bytes) -> Kept | None:
    """None for what is no such file, but perhaps a bare answer. Raises: MalformedEvidence for one that is damaged."""
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or "cloister_receipt" not in raw:
        return None
    try:
        if raw.keys() != {"cloister_receipt", "request", "answer", "document"} or raw["cloister_receipt"] != 1:
            raise ValueError("another version")
        request, answer = (base64.b64decode(raw[name], validate=True) for name in ("request", "answer"))
        return Kept(request, answer, saved_of(raw["document"]))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, OSError) as error:
        hint = "`cloister ask --receipt FILE` and /receipt FILE in a chat write one."
        raise MalformedEvidence("This receipt's file is damaged, or of another release.", hint=hint) from error


class Recorder:
    """Asks for a receipt with every request of a client that seals to what `session` verified, and holds the last exchange
    that ended well: `last`, and under which verification.

    Only event streams that end as OpenAI's do.
    """

    def __init__(self, session: Session, client: httpx2.Client) -> None:
        self._session = session
        self._asked: tuple[Verified, bytes, Saved] | None = None
        self.last: tuple[Kept, Verified] | None = None
        client.event_hooks = {"request": [self._ask], "response": [self._listen]}

    def _ask(self, request: httpx2.Request) -> None:
        verified = self._session.verify()
        request.headers[_ASKS] = verified.statement_sha256
        document = Saved(self._session.document, self._session.nonce, verified.verified_at)
        self._asked, self.last = (verified, request.read(), document), None

    def _listen(self, response: httpx2.Response) -> None:
        if isinstance(response.stream, httpx2.SyncByteStream):
            response.stream = _Overheard(response.stream, self._keep)

    def _keep(self, answer: bytes) -> None:
        if self._asked is not None:
            verified, request, document = self._asked
            self.last = Kept(request, answer, document), verified


class _Overheard(httpx2.SyncByteStream):
    """A stream whose content is kept when it has ended. Who reads it stops at the last event; the receipt stands behind."""

    def __init__(self, stream: httpx2.SyncByteStream, keep: Any) -> None:
        self._stream = stream
        self._parts = iter(stream)
        self._keep = keep
        self._heard: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        for part in self._parts:
            self._heard.append(part)
            yield part

    def close(self) -> None:
        if _END in b"".join(self._heard[-64:]):
            self._hear_the_end()
        self._stream.close()

    def _hear_the_end(self) -> None:
        behind = 0
        try:
            for part in self._parts:
                self._heard.append(part)
                behind += len(part)
                if behind > _MOST_BEHIND:
                    return
        except CloisterError:  # who reads it has what it wanted; there is no receipt for an answer that was cut
            return
        self._keep(b"".join(self._heard))
