"""Before the owner's release: evidence with a fresh nonce, one message taken, and nothing else said or believed.

A release counts when it is the owner's word, or the broker's that the owner named (both keys stand in the launch config, and
that in hardware), for this enclave's statement and a nonce that evidence was made for. The first one wins, and the key that it was sealed to is dropped with it:
a second owner, and a message played again, find nobody who could open theirs.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import parse_qsl

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.types import Receive, Scope, Send

from cloister.channel.hpke import KEM_XWING, Entropy, PrivateKey, generate
from cloister.channel.release import MAX_RELEASE, Context, Release, nonce_of, open_release
from cloister.enclave.attestation import Witness
from cloister.enclave.gateway import problems
from cloister.enclave.gateway.problems import Problem
from cloister.enclave.runtime.bodies import Bodies
from cloister.enclave.runtime.ration import Ration
from cloister.errors import CloisterError, Malformed, MalformedEvidence, NotTrusted
from cloister.evidence.bundle import Manifest
from cloister.evidence.launch import launch_digest, parse_launch
from cloister.evidence.statement import EngineStatement, Statement
from cloister.evidence.strict_json import from_b64url

__all__ = ["RELEASE_PATH", "Door", "Waiting", "reply"]

RELEASE_PATH = "/.well-known/cloister-release"
_EVIDENCE_PATH = "/.well-known/cloister-attestation"
_MEDIA_TYPE = b"application/octet-stream"
_LIFE = 3600
"""Seconds for which one statement is valid; half of it is used for new nonces."""
_MOST_NONCES = 4096

_OURS = "https://cloister.invalid/problems/"
NOT_SERVING = Problem(503, _OURS + "not-serving", "This enclave waits for its owner, or its time is over.", close=True)
NONCE = replace(problems.NONCE, title="The nonce must be 32 bytes in unpadded base64url.")
REFUSED = Problem(403, _OURS + "release-refused", "This is not the owner's release for this enclave.")
UNFIT = Problem(400, _OURS + "release-unfit", "The owner's release does not fit the app: a key or a secret is missing.")
RELEASED = Problem(409, _OURS + "released", "This enclave has had its release.")
RELEASE_TYPE = Problem(415, _OURS + "media-type", "A release is application/octet-stream.", close=True)
RELEASE_SIZE = Problem(413, _OURS + "too-large", "A release has at most 1 MiB.", close=True)


class Waiting:
    """The key for one release, the statements that offered it, and the nonces that evidence was made for."""

    def __init__(
        self,
        witness: Witness,
        manifest: Manifest,
        engine: EngineStatement,
        insecure: tuple[str, ...],
        *,
        clock: Callable[[], float],
        entropy: Entropy = os.urandom,
    ) -> None:
        self._witness = witness
        self._launch = parse_launch(witness.launch)
        self._manifest = manifest
        self._engine = engine
        self._insecure = insecure
        self._clock = clock
        self._key: PrivateKey | None = generate(KEM_XWING, entropy)
        self._receipt_key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
        self._statement: tuple[bytes, float] = b"", 0.0
        self._nonces: dict[bytes, bytes] = {}

    async def document(self, nonce: bytes) -> bytes:
        """Evidence over 32 bytes. Raises: NotTrusted once the release was taken; what the hardware raises."""
        if self._key is None:
            raise _released()
        statement = self._current(self._key)
        document = await self._witness.document(nonce, statement)
        self._nonces[nonce] = hashlib.sha256(statement).digest()
        while len(self._nonces) > _MOST_NONCES:
            self._nonces.pop(next(iter(self._nonces)))
        return document

    def accept(self, message: bytes) -> Release:
        """The release in a message; no other is taken afterwards.

        Raises: NotTrusted, ChannelBroken for what is not the owner's word for this enclave, MalformedEvidence for the
        owner's word that does not fit the app. The key then waits on.
        """
        if self._key is None:
            raise _released()
        statement = self._nonces.get(nonce_of(message))
        if statement is None:
            raise NotTrusted(
                "The release names a nonce that no evidence was made for.",
                step="release",
                hint="Ask for evidence anew.",
            )
        context = Context(
            deployment=self._launch.deployment,
            launch_sha256=launch_digest(self._witness.launch),
            release=self._launch.release,
            statement_sha256=statement,
            nonce=nonce_of(message),
        )
        release = open_release(message, context, self._key, self._launch.owner_key, self._launch.broker_key)
        self._check(release)
        self._key = None
        self._nonces = {}
        return release

    def _check(self, release: Release) -> None:
        manifest = self._manifest
        wanted = {
            "file keys": (set(release.keys), {section.name for section in manifest.sections}),
            "secrets": (set(release.secrets), set(manifest.secrets)),
        }
        for what, (given, needed) in wanted.items():
            if given != needed:
                raise MalformedEvidence(f"The release's {what} are not the app's.", step="release")
        if release.expires is not None and release.expires <= max(self._clock(), release.time_floor):
            raise MalformedEvidence("The release has expired.", step="release")

    def _current(self, key: PrivateKey) -> bytes:
        now = self._clock()
        statement, until = self._statement
        if now >= until:
            statement = Statement(
                purpose="provision",
                aud=(),
                launch_sha256=launch_digest(self._witness.launch).hex(),
                iat=int(now),
                exp=int(now) + _LIFE,
                ohttp_keys=b"",
                receipt_key=self._receipt_key,
                provision_key=key.public,
                engine=self._engine,
                models=(),
                egress=self._launch.egress,
                code="sealed",
                insecure=self._insecure,
            ).encode()
            self._statement = statement, now + _LIFE / 2
        return statement


def _released() -> NotTrusted:
    return NotTrusted("This enclave has had its release.", step="released")


class Door:
    """What stands at the enclave's door while it does not serve: an ASGI app. `state` is what `readyz` says. With
    `waiting`, evidence is given and the release taken, which `released` is told."""

    def __init__(
        self, state: str, waiting: Waiting | None = None, released: Callable[[Release], None] = lambda _release: None
    ) -> None:
        self._state = state
        self._waiting = waiting
        self._released = released
        self._quotes = Ration()
        self._bodies = Bodies(MAX_RELEASE, RELEASE_SIZE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        reads, posts = scope["method"] in ("GET", "HEAD"), scope["method"] == "POST"
        match scope["path"]:
            case "/healthz" if reads:
                await reply(send, b'{"status":"alive"}')
            case "/readyz" if reads:
                await reply(send, json.dumps({"status": self._state}).encode(), status=503)
            case "/.well-known/cloister-attestation" if reads and self._waiting is not None:
                await self._evidence(self._waiting, scope["query_string"], send)
            case "/.well-known/cloister-release" if posts and self._waiting is not None:
                await self._release(self._waiting, scope, receive, send)
            case "/.well-known/cloister-release" if posts:
                await (NOT_SERVING if self._state == "starting" else replace(RELEASED, close=True)).answer(send)
            case "/healthz" | "/readyz" | "/.well-known/cloister-release":
                await problems.METHOD.answer(send)
            case path if path == _EVIDENCE_PATH or path == "/.well-known/ohttp-gateway":
                await NOT_SERVING.answer(send)
            case _:
                await problems.PLAINTEXT.answer(send)

    async def _evidence(self, waiting: Waiting, query: bytes, send: Send) -> None:
        nonce = _nonce(query)
        if nonce is None:
            await NONCE.answer(send)
        elif not self._quotes.take():
            await problems.UNAVAILABLE.answer(send)
        else:
            try:
                document = await waiting.document(nonce)
            except CloisterError:
                await problems.UNAVAILABLE.answer(send)
                return
            await reply(send, document, media_type=b"application/cmw+json")

    async def _release(self, waiting: Waiting, scope: Scope, receive: Receive, send: Send) -> None:
        if dict(scope["headers"]).get(b"content-type", b"").strip().lower() != _MEDIA_TYPE:
            await RELEASE_TYPE.answer(send)
            return
        message = await self._bodies.read(receive)
        if isinstance(message, Problem):
            await message.answer(send)
            return
        try:
            release = waiting.accept(message)
        except Malformed as error:
            await replace(UNFIT, title=error.message).answer(send)
        except NotTrusted as error:
            await (RELEASED if error.step == "released" else REFUSED).answer(send)
        else:
            self._released(release)
            await send({"type": "http.response.start", "status": 204, "headers": [(b"cache-control", b"no-store")]})
            await send({"type": "http.response.body", "body": b""})


def _nonce(query: bytes) -> bytes | None:
    fields = parse_qsl(query.decode("ascii", "replace"), keep_blank_values=True)
    if len(fields) != 1 or fields[0][0] != "nonce":
        return None
    try:
        nonce = from_b64url(fields[0][1], what="nonce")
    except MalformedEvidence:
        return None
    return nonce if len(nonce) == 32 else None


async def reply(send: Send, body: bytes, *, status: int = 200, media_type: bytes = b"application/json") -> None:
    headers = [
        (b"content-type", media_type),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
