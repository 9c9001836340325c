"""A broker: it hands an owner's keys and secrets to enclaves that verify, while the owner's own machine sleeps.

It looks at the addresses that it was told to watch. Where an enclave waits, it

(1) verifies its evidence over a fresh nonce, by the owner's policy and in every step of a client's;
(2) decides: launched for this broker, a deployment that was handed over and not revoked, the very app that its keys belong to,
    no older release than before, and not an enclave that has taken its release already. What was handed over last and what
    is revoked, the log says: a record that comes back from a copy undoes nothing;
(3) logs that it releases, and what to;
(4) releases, sealed to that enclave's single-use key; and logs what came of it.

A release is to one provision key. It has a number, which stands in the log before anything is sent; whatever ends the broker
between (3) and (4), the same enclave gets the same number again, and no other enclave ever gets it. Refusals are logged too, one
that repeats itself at an address once an hour.

It authorises joins of key groups too (`authorise`): after the same verification, and after it has logged that it does.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import httpx2

from cloister.channel.release import Release
from cloister.errors import CloisterError, Malformed, NotFound, NotTrusted, Unreachable, WrongUse
from cloister.owner.broker_log import Append, Details, Entry, Log
from cloister.owner.broker_state import BrokerKeys, Record, Records
from cloister.owner.joining import judge
from cloister.owner.provision import Completer, provision
from cloister.verify import Policy, VerifiedPeer, VerifiedProvision

__all__ = ["Broker", "Ledger", "Outcome", "Watch"]

Outcome = Literal["nothing", "unreachable", "released", "declined", "unsure", "refused"]
"""Of one look: nobody waits; no answer; taken; the enclave would not have it; whether it was taken is not known; not sent."""

_SAY_AGAIN = 3600.0
_MOST_STATE = 4096
_MOST_WORDS = 500


class Ledger:
    """What a log says was handed over, revoked and released: its lines, summed up."""

    def __init__(self) -> None:
        self._grants: dict[str, int] = {}
        self._taken: set[str] = set()
        self._newest: dict[str, int] = {}
        self._added: dict[str, str] = {}
        self._revoked: set[str] = set()
        self._last = 0

    def note(self, entry: Entry) -> None:
        key, deployment = str(entry.details.get("key_sha256", "")), str(entry.details.get("deployment", ""))
        match entry.event:
            case "added":
                self._added[deployment] = str(entry.details["app"])
                self._revoked.discard(deployment)
            case "revoked":
                self._revoked.add(deployment)
            case "released":
                self._taken.add(key)
            case "releasing":
                number, release = int(entry.details["grant"]), int(entry.details["release"])
                self._grants[key] = number
                self._last = max(self._last, number)
                self._newest[deployment] = max(self._newest.get(deployment, 0), release)

    def added(self, deployment: str) -> str | None:
        """The app (hex SHA-256) of what was handed over last for that deployment, revoked or not; None: nothing ever."""
        return self._added.get(deployment)

    def revoked(self, deployment: str) -> bool:
        """Whether nothing was handed over for it since it was revoked."""
        return deployment in self._revoked

    def taken(self, key_sha256: str) -> bool:
        return key_sha256 in self._taken

    def newest(self, deployment: str) -> int:
        """The highest release of that deployment that anything was handed to; 0 before the first."""
        return self._newest.get(deployment, 0)

    def number(self, key_sha256: str) -> int:
        """The number of the release to that provision key: the one it had, or a new one."""
        return self._grants.get(key_sha256, self._last + 1)


@dataclass(frozen=True, slots=True)
class Watch:
    """One look at an address. `deployment`: "" when nothing verified. `error`: of what was not released, or not logged."""

    outcome: Outcome
    deployment: str = ""
    error: CloisterError | None = None


class Broker:
    """One on this machine or several, on the same log. `clock`: Unix seconds."""

    def __init__(
        self, keys: BrokerKeys, records: Records, log: Path, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.name = keys.name
        self._keys = keys
        self._records = records
        self._clock = clock
        self._ledger = Ledger()
        self._log = Log(log, keys.signing, clock=clock, on_entry=self._ledger.note)
        self._told: dict[str, tuple[str, float]] = {}

    # What the owner does

    def begin(self) -> None:
        """The log's first line, unless it has one. Raises: NotTrusted, WrongUse."""
        with self._log.turn() as append:
            if self._log.last is None:
                append("init", {"broker_key": self.name})

    def add(self, record: Record) -> None:
        """Hands over what may be released for a deployment, in the place of what was there. Raises: NotTrusted, WrongUse."""
        self._records.check(record)  # what cannot be kept is not logged: it would undo what was handed over before
        with self._turn() as append:
            append("added", {"deployment": record.deployment, "app": record.app})
            self._records.save(record)

    def revoke(self, deployment: str) -> None:
        """From now on nothing is released for it; its keys and secrets are taken off the disk.

        Raises: NotFound when there is nothing of it; NotTrusted, WrongUse.
        """
        with self._turn() as append:
            app = self._ledger.added(deployment) or self._records.load(deployment).app
            try:
                append("revoked", {"deployment": deployment})
            finally:  # the keys go, though the log cannot be written
                self._records.save(Record(deployment=deployment, app=app, revoked=True))

    # What it does

    def fit(self, policy: Policy) -> Policy:
        """The policy as the broker applies it. Raises: WrongUse for one that leaves open whose enclaves it is for."""
        if policy.owner_key is None or policy.deployment is None:
            hint = "`cloister deploy` writes one that does, into deployments/ in the owner's state folder."
            raise WrongUse("A broker's policy names the owner and the deployment.", step="policy", hint=hint)
        if policy.broker_key not in (None, self.name):
            raise WrongUse("The policy names another broker.", step="policy", expected=self.name, got=policy.broker_key)
        return replace(policy, broker_key=self.name)

    def look(self, url: str, *, policy: Policy, client: httpx2.Client, complete: Completer | None = None) -> Watch:
        """Once, at `url`; `policy` as `fit` returned it.

        Raises: WrongUse, NotTrusted when the log cannot be written or was tampered with: then nothing was released for certain.
        """
        state = _state(client, url)
        if state != "waiting":
            return Watch("nothing" if state else "unreachable")
        details: dict[str, str | int] = {"url": url[:200]}

        def decide(verified: VerifiedProvision) -> Release:
            details.update(_named(verified, verified.provision_key))
            with self._turn() as append:
                record = self._allowed(verified, str(details["key_sha256"]))
                number = self._ledger.number(str(details["key_sha256"]))
                append("releasing", {**details, "grant": number})
                details["grant"] = number
            return record.release(self._clock())

        try:
            provision(
                url,
                policy=policy,
                owner=self._keys.signing,
                release=decide,
                complete=complete,
                patience=0.0,
                client=client,
                clock=self._clock,
            )
        except CloisterError as error:
            return self._not_released(details, error)
        deployment = str(details["deployment"])
        try:
            self._say("released", details)
        except CloisterError as error:  # the enclave has its keys, whatever can be written down of it
            return Watch("released", deployment, error)
        return Watch("released", deployment)

    def authorise(self, request: bytes, url: str, *, policy: Policy, complete: Completer | None = None) -> bytes:
        """A replica's request to be let into its key group, with this broker's word in it. `url`: whose it is; `policy` as
        `fit` returned it. What the group's keys are made of, the broker never learns.

        Raises: NotTrusted, MalformedEvidence, MalformedMessage for a replica that gets no word, which is logged; WrongUse.
        """
        details: dict[str, str | int] = {"url": url[:200]}
        try:
            asked = judge(request, policy=policy, now=self._clock(), complete=complete)
            details.update(_named(asked.replica, asked.replica.join_key or b""))
            with self._turn() as append:
                self._check_revoked(asked.replica.launch.deployment)
                append("join-authorised", details)
        except (NotTrusted, Malformed) as error:
            self._say_once(f"join {error.message}", "join-refused", {**details, "reason": error.message[:_MOST_WORDS]})
            raise
        return asked.authorised(self._keys.signing.sign)

    def _check_revoked(self, deployment: str) -> None:
        """One that was never handed over may have a group too. Within a turn. Raises: NotTrusted, WrongUse."""
        with suppress(NotFound):
            self._standing(deployment)

    def _standing(self, deployment: str) -> Record:
        """The record of a deployment, where it is what the log says was handed over last. Within a turn.

        Raises: NotFound for one that was never handed over; NotTrusted for one that was revoked, or whose record is gone,
        another's or an older one; WrongUse.
        """
        added = self._ledger.added(deployment)
        try:
            record = None if self._ledger.revoked(deployment) else self._records.load(deployment)
        except NotFound as error:
            if added is None:
                raise
            raise _stale(deployment, added, "none") from error
        if record is None or record.revoked:
            raise _refusal("revoked", "The owner has revoked this deployment.")
        if record.app != added:
            raise _stale(deployment, added or "none", record.app)
        return record

    def _say_once(self, words: str, event: str, details: Details) -> None:
        """What is said of an address again and again, once an hour."""
        url = str(details["url"])
        before, at = self._told.get(url, ("", 0.0))
        if words != before or self._clock() - at >= _SAY_AGAIN:
            self._say(event, details)
            self._told[url] = words, self._clock()

    def _say(self, event: str, details: Details) -> None:
        with self._turn() as append:
            append(event, details)

    @contextmanager
    def _turn(self) -> Iterator[Append]:
        """At a log that was begun: one that is empty has lost all its lines."""
        with self._log.turn() as append:
            if self._log.last is None:
                hint = "Bring it back from a copy; `cloister broker init` begins a new one."
                raise NotTrusted("The broker's log is not there any more.", step="log", hint=hint)
            yield append

    def _allowed(self, verified: VerifiedProvision, key_sha256: str) -> Record:
        """Raises: NotTrusted, NotFound, WrongUse."""
        launch = verified.launch
        if launch.broker_key != self.name:
            raise _refusal("broker", "It was not launched for this broker.", self.name, launch.broker_key or "none")
        record = self._standing(launch.deployment)
        if launch.app.sha256 != record.app:
            raise _refusal("app", "It runs another app than the one handed over.", record.app, launch.app.sha256)
        if record.expires is not None and record.expires <= self._clock():
            raise _refusal("expired", "The deployment's time is over.")
        newest = self._ledger.newest(launch.deployment)
        if launch.release < newest:
            raise _refusal("release", "An older release than before.", f"{newest} or more", str(launch.release))
        if self._ledger.taken(key_sha256):
            raise _refusal("released", "This enclave has had its release.")
        return record

    def _not_released(self, details: dict[str, str | int], error: CloisterError) -> Watch:
        """Logged, unless nobody was there."""
        sent = "grant" in details
        deployment = str(details.get("deployment", ""))
        if not sent and isinstance(error, Unreachable):
            return Watch("unreachable", error=error)
        outcome: Outcome = "refused" if not sent else "unsure" if isinstance(error, Unreachable) else "declined"
        words = f"{outcome} {details.get('key_sha256')} {error.message}"
        found = {"step": error.step, "reason": error.message, "expected": error.expected, "got": error.got}
        told = {name: value[:_MOST_WORDS] for name, value in found.items() if value}
        self._say_once(words, outcome, {**details, **told})
        return Watch(outcome, deployment, error)


def _named(verified: VerifiedProvision | VerifiedPeer, key: bytes) -> dict[str, str | int]:
    return {
        "deployment": verified.launch.deployment,
        "release": verified.launch.release,
        "platform": verified.platform,
        "launch_sha256": verified.launch_sha256,
        "statement_sha256": verified.statement_sha256,
        "key_sha256": hashlib.sha256(key).hexdigest(),
    }


def _refusal(step: str, message: str, expected: str | None = None, got: str | None = None) -> NotTrusted:
    return NotTrusted(message, step=step, expected=expected, got=got)


def _stale(deployment: str, added: str, found: str) -> NotTrusted:
    message = "The record of this deployment is not the one that was handed over last."
    return NotTrusted(message, step="record", expected=added, got=found, hint=f"cloister broker add {deployment}")


def _state(client: httpx2.Client, url: str) -> str:
    """What the enclave, or whoever answers in its place, says it does; "" when nobody says anything. Nothing rests on it."""
    content = bytearray()
    try:
        with client.stream("GET", f"{url.rstrip('/')}/readyz") as response:
            for part in response.iter_bytes():
                content += part
                if len(content) > _MOST_STATE:
                    return ""
        state = json.loads(content)["status"]
    except (httpx2.HTTPError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return state if isinstance(state, str) else ""
