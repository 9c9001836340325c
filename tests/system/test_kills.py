"""kill -9 of host, broker and enclave at random moments: no app is lost, nothing is released twice, nothing is half written.

`python -m tests.system.test_kills 50` runs more rounds than CI does.
"""

import contextlib
import hashlib
import json
import os
import random
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from tests.end_to_end.hosting import ANSWER, Host, ask, children_of, gone, running, told_of, write_words
from tests.host.stage import eventually

from cloister.evidence.strict_json import from_b64url
from cloister.owner.broker_log import Entry, read_entries

pytestmark = pytest.mark.system

ROUNDS = 3
SEED = 6
ORDER = ("starting", "waiting", "opening", "loading", "ready")
MOMENTS = ("starting", "waiting", "opening", "ready")
LATER = 0.5  # seconds after such a moment, at most
PATIENCE = 20.0  # seconds: after many kills of an enclave its host pauses for longer than a round shall last
VICTIMS = ("host", "broker", "enclave")
KEPT = ("port", "owner", "deployment", "release", "launch_sha256", "bundle", "model", "wanted", "expires_at")


@dataclass
class Stage:
    """A sealed app that its broker releases to, and one with a public model; and what is known of them."""

    host: Host
    home: Path
    broker_key: str
    words: dict[str, Any] = field(default_factory=dict)
    apps: dict[str, dict[str, Any]] = field(default_factory=dict)
    broker: "subprocess.Popen[bytes] | None" = None
    killed: Counter[str] = field(default_factory=Counter)

    @property
    def state(self) -> Path:
        return self.home / ".local" / "state" / "cloister"

    def deploy(self) -> None:
        write_words(self.home)
        self.words = told_of(self.host.do(f"cloister deploy words --broker {self.broker_key} --json"))
        self.host.do("cloister broker add words words")
        self.host.do("cloister deploy --model tiny --name public --platform sim")
        self.apps = self.kept()

    def kept(self) -> dict[str, dict[str, Any]]:
        return {name: {word: app[word] for word in KEPT} for name, app in self.host.apps().items()}

    def start_broker(self) -> None:
        policy = self.state / "deployments" / "words.policy.toml"
        watch = f"cloister broker serve --policy {policy} --watch {self.words['app']['address']} --every 0.2"
        quiet = subprocess.DEVNULL
        self.broker = subprocess.Popen(
            shlex.split(watch), cwd=self.home, env=self.host.shell.environment, stdout=quiet, stderr=quiet
        )

    def end_broker(self) -> None:
        if self.broker is not None:
            self.broker.kill()
            self.broker.wait()
            self.broker = None

    def enclaves(self) -> list[int]:
        """The processes that the host has started, once there is one."""
        alive: list[int] = []

        def look() -> list[int]:
            alive[:] = children_of(self.host.pid)
            return alive

        eventually(look)
        return alive

    # What is done to them

    def wait_for(self, moment: str) -> None:
        """Until the sealed app has come that far, if it does in time."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            state = self.host.apps()["words"]["state"]
            if state in ORDER[ORDER.index(moment) :]:
                return
            time.sleep(0.02)

    def kill(self, victim: str, chance: random.Random) -> None:
        if victim == "enclave":
            front = chance.choice(self.enclaves())
            with contextlib.suppress(ProcessLookupError):  # it ends by itself when its host has stopped it just now
                os.kill(chance.choice([front, *children_of(front)]), signal.SIGKILL)
        elif victim == "broker":
            self.end_broker()
            self.start_broker()
        else:
            enclaves = children_of(self.host.pid)
            self.host.end(signal.SIGKILL)
            gone(enclaves)
            self.host.start()
        self.killed[victim] += 1

    # What must be so at any time

    def check(self) -> None:
        assert self.kept() == self.apps
        with closing(sqlite3.connect(self.state / "host" / "host.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (bundle,) = (self.state / "host" / "bundles").iterdir()
        assert hashlib.sha256(bundle.read_bytes()).hexdigest() == bundle.name == self.apps["words"]["bundle"]
        assert json.loads((self.state / "releases.json").read_bytes()) == {"words": 1, "public": 1}
        check_releases(self.log())

    def log(self) -> list[Entry]:
        """Its whole lines: a kill may leave a piece of one, which the broker's next turn takes away."""
        whole = (self.state / "broker" / "log.jsonl").read_bytes().rpartition(b"\n")[0] + b"\n"
        key = Ed25519PublicKey.from_public_bytes(from_b64url(self.broker_key.removeprefix("ed25519:"), what="key"))
        return list(read_entries(whole, key))


def check_releases(log: list[Entry]) -> None:
    """One number for each provision key and one key for each number, and no key that took two releases."""
    numbers = {(entry.details["grant"], entry.details["key_sha256"]) for entry in log if entry.event == "releasing"}
    assert len(numbers) == len({number for number, _ in numbers}) == len({key for _, key in numbers})
    taken: set[Any] = set()
    for entry in log:
        key = entry.details.get("key_sha256")
        if entry.event in ("releasing", "released"):
            assert key not in taken, f"line {entry.number} releases to {key} once more"
        if entry.event == "released":
            taken.add(key)


def rounds(stage: Stage, count: int, seed: int) -> None:
    chance = random.Random(seed)
    victims = [VICTIMS[number % len(VICTIMS)] for number in range(count)]
    chance.shuffle(victims)
    for victim in victims:
        stage.wait_for(chance.choice(MOMENTS))
        time.sleep(chance.random() ** 2 * LATER)
        stage.kill(victim, chance)
        stage.check()
    stage.kill("host", chance)  # what is tried again after ever longer pauses begins anew
    for name in ("public", "words"):
        stage.host.reaches("ready", name)
    assert ask(stage.words) == ANSWER
    stage.check()
    assert "whole: " in stage.host.do("cloister broker log verify").stdout
    log = stage.log()
    assert [entry for entry in log if entry.event == "released"]
    stage.end_broker()
    again = told_of(stage.host.do("cloister restart words --json"))  # the owner's own state is whole too
    assert ask(again) == ANSWER


def run(home: Path, count: int, seed: int) -> Stage:
    with running(home) as host:
        stage = Stage(host, home, host.do("cloister broker init").stdout.strip())
        stage.deploy()
        stage.start_broker()
        try:
            rounds(stage, count, seed)
        finally:
            stage.end_broker()
    return stage


def test_nothing_is_lost_doubled_or_half_written_whoever_is_killed_and_when(tmp_path: Path) -> None:
    stage = run(tmp_path, ROUNDS, SEED)
    assert set(stage.killed) == set(VICTIMS)


if __name__ == "__main__":
    with TemporaryDirectory() as place:
        done = run(Path(place), int(sys.argv[1]), SEED)
        released = sum(entry.event == "released" for entry in done.log())
        print(f"killed {dict(done.killed)}; {released} releases in {len(done.log())} lines of the broker's log")
