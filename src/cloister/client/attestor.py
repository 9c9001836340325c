"""What one session knows about its enclave: sans-I/O, the clock is given, the document is brought.

Verification is `cloister.verify.verify` under the caller's policy; here stands what needs memory across documents
(freshness, numbers of releases and collateral that never fall), and a simulator that may only be as far away as this
machine.
"""

import base64
import ipaddress
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import urlsplit

from cloister.client.diagnostic import printable
from cloister.client.memory import Memory, ProcessMemory, platform_scope, release_scope
from cloister.errors import ConnectionFailed, PlaintextRefused, VerificationFailed, WrongUse
from cloister.evidence.document import MEDIA_TYPE, Document, parse_document
from cloister.verify import Factor, Policy, Verified, verify
from cloister.verify.platform import ISSUED

__all__ = ["CHANGED", "Attestor", "Challenge", "Clock", "Completer"]

LONGEST_TRUST = 3600.0  # seconds for which one verification may be used
_NONCE_BYTES = 32
# Stricter than `urlsplit`: what is judged here to be this machine must not be another one for whoever connects.
_NETLOC = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s\\@\[\]:]+)(:[0-9]*)?")


Completer: TypeAlias = Callable[[Document, float], Document]
"""A document and the time (Unix seconds) to the same document, perhaps with other `endorsements`."""


@dataclass(frozen=True, slots=True)
class Clock:
    """`wall` gives Unix seconds and is held against the statement; `monotonic` measures how long ago that was."""

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True)
class Challenge:
    nonce: bytes
    url: str
    asked_at: float  # monotonic seconds


class Attestor:
    """`pin`: the first measurement and launch config that were verified are the only ones for this session's life.

    `memory` holds the highest numbers accepted so far; without one this attestor remembers by itself. `complete` may add
    vendors' collateral to a document that came without, and may take its time; what it adds is judged like the rest.
    """

    def __init__(
        self,
        url: str,
        policy: Policy,
        *,
        clock: Clock,
        pin: bool = False,
        memory: Memory | None = None,
        complete: Completer | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.base, self.loopback = _origin(url)
        self.document = b""
        self.nonce = b""
        self._policy = policy
        self._clock = clock
        self._pin = pin
        self._entropy = entropy
        self._verified: Verified | None = None
        self._first: Verified | None = None
        self._trusted_until = 0.0  # monotonic seconds
        self._memory = memory if memory is not None else ProcessMemory()
        self._complete = complete

    def current(self) -> Verified | None:
        """The last verification while it may still be used: at most an hour, and never past the statement's `exp`."""
        verified = self._verified  # another thread may be judging a new document meanwhile
        if verified is None or self._clock.monotonic() >= self._trusted_until:
            return None
        return verified if self._clock.wall() < verified.expires_at else None

    def challenge(self) -> Challenge:
        nonce = self._entropy(_NONCE_BYTES)
        text = base64.urlsafe_b64encode(nonce).rstrip(b"=").decode()
        url = f"{self.base}/.well-known/cloister-attestation?nonce={text}"
        return Challenge(nonce, url, self._clock.monotonic())

    def accept(self, challenge: Challenge, status: int, media_type: str, body: bytes) -> Verified:
        """Judges what came back for a challenge.

        Raises: ConnectionFailed when there is no evidence to be had now, PlaintextRefused for an answer that is no
        evidence at all, MalformedEvidence, VerificationFailed, WrongUse for a memory that cannot be read or written.
        """
        if status in (429, 502, 503, 504):
            raise ConnectionFailed(f"The enclave has no evidence right now (status {status}).", hint="Try again soon.")
        if status != 200 or media_type != MEDIA_TYPE:
            raise PlaintextRefused(
                f"No attestation document is served there (status {status}).",
                hint="Is this the address of an enclave?",
                step="document",
                expected=MEDIA_TYPE,
                got=printable(media_type),
            )
        # Kept whatever becomes of it: a refused document is the one that somebody wants to look at. What was believed
        # before does not outlive a refusal: nothing is sealed, or shown as verified, until a document is accepted again.
        self.document, self.nonce, self._verified = body, challenge.nonce, None
        document = parse_document(body)
        if self._complete is not None:
            document = self._complete(document, self._clock.wall())
            self.document = document.encode()
        now = self._clock.wall()
        verified = verify(document, policy=self._policy, nonce=challenge.nonce, now=now)
        self._check_simulator(verified)
        self._check_memory(verified)
        self._check_pin(verified)
        for scope, counters in _counted(verified).items():
            self._memory.note(scope, counters)
        self._first = self._first or verified
        self._trusted_until = challenge.asked_at + min(LONGEST_TRUST, verified.expires_at - now)
        self._verified = verified
        return verified

    def _check_simulator(self, verified: Verified) -> None:
        if verified.simulated and not self.loopback:
            factor = Factor("simulator", "fail", "this machine", "another machine", _FAR)
            raise _refused(verified, factor, message="A simulated platform on another machine.")

    def _check_memory(self, verified: Verified) -> None:
        fallen = tuple(
            _fallen(name, seen, value)
            for scope, counters in _counted(verified).items()
            for name, value in sorted(counters.items())
            if value < (seen := self._memory.highest(scope, name)) - _slack(name)
        )
        if fallen:
            raise _refused(verified, *fallen, message="This is older than what was seen before.")

    def _check_pin(self, verified: Verified) -> None:
        if not self._pin or self._first is None:
            return
        old, new = _identity(self._first), _identity(verified)
        changed = tuple(
            Factor(name, "fail", old.get(name, "nothing"), new.get(name, "nothing"), CHANGED)
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        )
        if changed:
            raise _refused(verified, *changed, message="What runs there is not what was verified first.")


_ISSUED_SLACK = 7 * 86400
_FAR = "Anybody can simulate hardware: a simulator is trusted on this machine only."
_ROLLBACK = "An earlier release may have faults that were mended since. Ask the owner."
_OLDER = "Newer collateral was seen before; older may hide a revoked key or a known fault. Ask for current evidence."
CHANGED = "If the change is expected, start again: the policy decides anew."


def _counted(verified: Verified) -> dict[str, dict[str, int]]:
    """By whose count: the owner's of the deployment's releases, the vendor's of the platform's collateral."""
    collateral = {name: value for name, value in verified.counters.items() if name != "release"}
    launch = verified.launch
    release = {"release": launch.release}
    return {release_scope(launch.owner_key, launch.deployment): release, platform_scope(verified.platform): collateral}


def _slack(name: str) -> int:
    """Lists are issued anew every few days, each with a date of its own, and servers fetch theirs at different times."""
    return _ISSUED_SLACK if name.endswith(ISSUED) else 0


def _fallen(name: str, seen: int, value: int) -> Factor:
    step, hint = ("release", _ROLLBACK) if name == "release" else (f"rollback.{name}", _OLDER)
    return Factor(step, "fail", f"{seen} or later", str(value), hint)


def _identity(verified: Verified) -> dict[str, str]:
    return {
        "platform": verified.platform,
        "launch": verified.launch_sha256,
        **{f"measurement.{name}": value for name, value in verified.measurement.items()},
    }


def _refused(verified: Verified, *factors: Factor, message: str) -> VerificationFailed:
    return VerificationFailed(
        message, factors=(*verified.factors, *factors), hint=factors[0].hint, step=factors[0].step
    )


def _no_address() -> WrongUse:
    return WrongUse("The enclave's address must look like https://host or http://127.0.0.1:8484.", step="url")


def _origin(url: str) -> tuple[str, bool]:
    """The address as requests are built on it, and whether it is this machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        fit = url.isprintable() and _NETLOC.fullmatch(parts.netloc) and parts.port != 0 and host.encode("idna")
    except ValueError:
        raise _no_address() from None
    if parts.fragment:
        raise WrongUse(
            "The enclave's address has a fragment, of which a session takes no notice.",
            hint="owner and deployment belong in the policy: Policy(owner_key=…, deployment=…).",
            step="url",
        )
    if not fit or parts.scheme not in ("http", "https") or parts.query:
        raise _no_address()
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}", loopback
