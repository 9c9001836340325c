"""Carrying a join between two replicas of a key group: the enclaves do not speak to each other, so whoever runs them does it.

Who carries sees nothing: the secret is sealed from one enclave to the other, and each judges the other's evidence itself. A
broker that a group's policy names carries too, and authorises (`Broker.authorise`): it says yes or no, and holds no key.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import httpx2

from cloister.channel.group import MAX_MESSAGE, Join, Request, parse_request
from cloister.errors import ConnectionFailed, Malformed, MalformedEvidence, MalformedMessage, NotTrusted
from cloister.evidence.document import parse_document
from cloister.evidence.launch import launch_digest
from cloister.evidence.statement import parse_statement
from cloister.owner.provision import Completer
from cloister.verify import Policy, VerifiedPeer, verify

__all__ = ["Asked", "Standing", "carry", "judge", "keep_together", "standing"]

_PATH = "/.well-known/cloister-group"
_KIND = {"content-type": "application/octet-stream"}
_MOST_STATE = 4096
_NOT_YET = frozenset({429, 502, 503, 504})
_PAUSE = 0.2


@dataclass(frozen=True, slots=True)
class Standing:
    """What a replica says of itself; nothing rests on it. `keys` and `next` name its keys, "" before it has any."""

    state: str
    keys: str = ""
    next: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to be let in, of a replica that verified."""

    request: Request
    join: Join
    replica: VerifiedPeer

    def authorised(self, sign: Callable[[bytes], bytes]) -> bytes:
        """The request with a broker's word in it. `sign` is the broker's Ed25519."""
        statement_sha256 = bytes.fromhex(self.replica.statement_sha256)
        return replace(self.request, word=sign(self.join.authorisation(statement_sha256))).encode()


def judge(message: bytes, *, policy: Policy, now: float, complete: Completer | None = None) -> Asked:
    """A replica's request, by the policy that a client would apply to it. That its nonces are fresh, the member knows.

    Raises: VerificationFailed; NotTrusted for a member's evidence; MalformedMessage, MalformedEvidence.
    """
    request = parse_request(message)
    document = parse_document(request.document)
    if complete is not None:
        document = complete(document, now)
    for label in ("statement", "launch"):
        if label not in document.items:
            raise MalformedEvidence(f"The evidence has no {label}.", step="document")
    statement = parse_statement(document.items["statement"].content)
    join = Join(
        launch_sha256=launch_digest(document.items["launch"].content),
        group_policy_sha256=bytes.fromhex(statement.group_policy_sha256 or "00" * 32),
        member_nonce=request.member_nonce,
        joiner_nonce=request.joiner_nonce,
    )
    replica = verify(document, policy=policy, nonce=join.request_nonce, now=now, purpose="key-join")
    if replica.join_key is None:
        raise NotTrusted("Who asks to be let in offers no key for it.", step="keys")
    return Asked(request, join, replica)


def standing(client: httpx2.Client, url: str) -> Standing:
    """Raises: ConnectionFailed; MalformedMessage for what answers otherwise."""
    try:
        with client.stream("GET", url.rstrip("/") + _PATH) as response:
            content = _read(response, _MOST_STATE)
            if response.status_code != 200:
                raise MalformedMessage("No replica of a key group answers there.", step="group", got=url[:80])
        told = json.loads(content)
        return Standing(*(str(told.get(name, ""))[:64] for name in ("state", "keys", "next")))
    except httpx2.HTTPError as error:
        raise _nobody(url) from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise MalformedMessage("No replica of a key group answers there.", step="group", got=url[:80]) from error


def carry(
    client: httpx2.Client, *, joiner: str, member: str, authorise: Callable[[bytes], bytes] = lambda request: request
) -> None:
    """Has `member` let `joiner` in (both are addresses). `authorise` may put a broker's word into the request, or refuse.

    Raises: NotTrusted with what the refusing one says; ConnectionFailed for one that is not there, or not able to yet;
    MalformedMessage; what `authorise` raises.
    """
    challenge = _post(client, member, "challenge", b"")
    request = authorise(_post(client, joiner, "request", challenge))
    _post(client, joiner, "accept", _post(client, member, "admit", request))


def keep_together(
    client: httpx2.Client,
    *,
    joiner: str,
    member: str,
    stopped: Callable[[float], bool],
    authorise: Callable[[bytes], bytes] = lambda request: request,
    on_refusal: Callable[[NotTrusted], None] = lambda _error: None,
    pause: float = 30.0,
) -> None:
    """Lets `joiner` in whenever its keys, now or next, are not the member's: at its start, before a day's chain ends, and after
    either was restarted. Until `stopped(seconds)`, which waits as long, says so."""
    wait = again = _PAUSE
    while not stopped(wait):
        wait = pause
        try:
            there, here = standing(client, member), standing(client, joiner)
            if here.state == "starting" or there.state != "member":
                wait = _PAUSE
            elif (here.keys, here.next) != (there.keys, there.next):
                carry(client, joiner=joiner, member=member, authorise=authorise)
            again = _PAUSE
        except NotTrusted as error:
            wait, again = again, min(2 * again, pause)
            on_refusal(error)
        except ConnectionFailed:
            wait = _PAUSE
        except Malformed:
            wait, again = again, min(2 * again, pause)


def _post(client: httpx2.Client, url: str, step: str, message: bytes) -> bytes:
    try:
        with client.stream("POST", f"{url.rstrip('/')}{_PATH}/{step}", content=message, headers=_KIND) as response:
            content = _read(response, MAX_MESSAGE)
            status = response.status_code
    except httpx2.HTTPError as error:
        raise _nobody(url) from error
    if status == 200:
        return content
    if status in _NOT_YET:
        raise ConnectionFailed(
            "That replica cannot do it now.", step="group", got=f"status {status}", hint="Try again."
        )
    if status in (400, 403):
        raise NotTrusted(f"The replica refuses at {step}: {_title(content)}", step="group", got=f"status {status}")
    raise MalformedMessage("No replica of a key group answers there.", step="group", got=f"status {status}")


def _read(response: httpx2.Response, most: int) -> bytes:
    content = bytearray()
    for part in response.iter_bytes():
        content += part
        if len(content) > most:
            raise MalformedMessage("That is more than a replica says.", step="group")
    return bytes(content)


def _title(content: bytes) -> str:
    try:
        return str(json.loads(content)["title"])[:200]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "it does not say why."


def _nobody(url: str) -> ConnectionFailed:
    return ConnectionFailed("No replica answers there.", step="group", got=url[:80])
