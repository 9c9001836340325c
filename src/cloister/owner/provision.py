"""Handing an app to an enclave that waits for it: evidence over a fresh nonce, verified as a client would, and only then the
release, sealed to that enclave's single-use key and signed."""

import ipaddress
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias
from urllib.parse import urlsplit

import httpx2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.channel.hpke import Entropy
from cloister.channel.release import ApiKeyHash, Context, Release, seal_release
from cloister.errors import ConnectionFailed, MalformedMessage, NotTrusted, WrongUse
from cloister.evidence.document import MAX_DOCUMENT, MEDIA_TYPE, Document, parse_document
from cloister.evidence.strict_json import b64url
from cloister.owner.appfile import AppFile
from cloister.owner.deployment import owner_name
from cloister.verify import Policy, VerifiedProvision, verify

__all__ = ["contents", "message_for", "provision"]

Completer: TypeAlias = Callable[[Document, float], Document]

_PATIENCE = 60.0
_PAUSE = 0.2
_MOST_PROBLEM = 4096
_TIMEOUT = httpx2.Timeout(30.0)
_BUSY = 503
_NOT_YET = frozenset({429, 502, _BUSY, 504})


def contents(
    app: AppFile,
    keys: Mapping[str, bytes],
    *,
    secrets: Mapping[str, str],
    now: float,
    api_keys: tuple[ApiKeyHash, ...] = (),
) -> Release:
    """What is handed over: the time floor is now, the end is the app's expiry from now."""
    return Release(
        time_floor=int(now),
        expires=None if app.expiry is None else int(now) + app.expiry,
        keys=keys,
        secrets=secrets,
        settings=app.settings,
        api_keys=api_keys,
    )


def message_for(
    verified: VerifiedProvision,
    nonce: bytes,
    release: Release,
    owner: Ed25519PrivateKey,
    *,
    entropy: Entropy = os.urandom,
) -> bytes:
    """The signed and sealed message, for exactly the enclave that was verified with this nonce.

    `owner`: the owner's key, or that of the broker whom the launch config names.

    Raises: NotTrusted when the enclave was launched for another owner: it would not take it.
    """
    if owner_name(owner) not in (verified.launch.owner_key, verified.launch.broker_key):
        raise NotTrusted(
            "This enclave was launched for another owner.",
            step="owner",
            expected=owner_name(owner),
            got=verified.launch.owner_key,
        )
    context = Context(
        deployment=verified.launch.deployment,
        launch_sha256=bytes.fromhex(verified.launch_sha256),
        release=verified.launch.release,
        statement_sha256=bytes.fromhex(verified.statement_sha256),
        nonce=nonce,
    )
    return seal_release(release, context, verified.provision_key, owner.sign, entropy=entropy)


def provision(
    url: str,
    *,
    policy: Policy,
    owner: Ed25519PrivateKey,
    release: Release | Callable[[VerifiedProvision], Release],
    complete: Completer | None = None,
    patience: float = _PATIENCE,
    client: httpx2.Client | None = None,
    clock: Callable[[], float] = time.time,
) -> VerifiedProvision:
    """Waits up to `patience` seconds for the enclave at `url`, verifies it, and hands over the release, again and again while
    the enclave is busy with others. Nothing of it leaves before the verification, and only its sealed form after. `clock`
    gives Unix seconds. `release` may be what decides about the enclave that was verified, by what it returns or raises.

    Raises: VerificationFailed and what else `verify` raises; NotTrusted when the enclave refuses; ConnectionFailed.
    """
    own = client or httpx2.Client(timeout=_TIMEOUT, follow_redirects=False, trust_env=not _is_loopback(url))
    until = time.monotonic() + patience
    try:
        nonce = os.urandom(32)
        document = parse_document(_fetch(own, url, nonce, until))
        now = clock()
        if complete is not None:
            document = complete(document, now)
        verified = verify(document, policy=policy, nonce=nonce, now=now, purpose="provision")
        if verified.simulated and not _is_loopback(url):
            raise NotTrusted("A simulated platform on another machine: anybody can simulate one.", step="simulator")
        given = release(verified) if callable(release) else release
        message = message_for(verified, nonce, given, owner)
        while not _post(own, url, message, last=time.monotonic() > until):
            time.sleep(_PAUSE)
    finally:
        if client is None:
            own.close()
    return verified


def _fetch(client: httpx2.Client, url: str, nonce: bytes, until: float) -> bytes:
    address = f"{url.rstrip('/')}/.well-known/cloister-attestation?nonce={b64url(nonce)}"
    while True:
        try:
            with client.stream("GET", address) as response:
                status = response.status_code
                if status == 200:
                    return _evidence(response)
        except httpx2.HTTPError:
            status = 0
        if status not in (0, *_NOT_YET) or time.monotonic() > until:
            raise ConnectionFailed(
                "The enclave gives no evidence.",
                step="document",
                got=f"status {status}" if status else "no answer",
                hint="Is it waiting for its owner? `cloister status` and `cloister logs` tell more.",
            )
        time.sleep(_PAUSE)


def _evidence(response: httpx2.Response) -> bytes:
    content = bytearray()
    if response.headers.get("content-type") == MEDIA_TYPE:
        for part in response.iter_bytes():
            content += part
            if len(content) > MAX_DOCUMENT:
                break
    if not 0 < len(content) <= MAX_DOCUMENT:
        raise MalformedMessage("What answers there is no enclave.", step="document", expected=MEDIA_TYPE)
    return bytes(content)


def _post(client: httpx2.Client, url: str, message: bytes, *, last: bool) -> bool:
    """Whether it was taken. False: it was not read, and may be sent again; never after the `last` try, which raises."""
    address = f"{url.rstrip('/')}/.well-known/cloister-release"
    kind = {"content-type": "application/octet-stream"}
    try:
        with client.stream("POST", address, content=message, headers=kind) as response:
            status = response.status_code
            title = _title(response) if status in (400, 403) else ""
    except httpx2.HTTPError as error:
        hint = "Whether it was taken is not known: see `cloister status` before you try again."
        raise ConnectionFailed("The release did not get through.", step="release", hint=hint) from error
    if status == 204 or (status == _BUSY and not last):
        return status == 204
    got = f"status {status}"
    if status == 409:
        hint = "Somebody was first, with your key. Restart the app, and release it anew."
        raise NotTrusted("The enclave has had a release.", step="release", got=got, hint=hint)
    if status in (400, 403):
        raise NotTrusted("The enclave refuses the release.", step="release", got=got, hint=title)
    raise ConnectionFailed("The release did not get through.", step="release", got=got)


def _title(response: httpx2.Response) -> str:
    """Of a problem's details, as far as they are short: whoever stands between may answer without end."""
    content = bytearray()
    for part in response.iter_bytes():
        content += part
        if len(content) > _MOST_PROBLEM:
            return ""
    try:
        title = json.loads(content)["title"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return str(title)[:200]


def _is_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        if "://" not in url:
            raise WrongUse("This is no address.", step="url", got=url[:80]) from error
        return False
