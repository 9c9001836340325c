import json
from pathlib import Path

import pytest
from tests.cli.running import run

from cloister.cli.demo import ATTACKS, Outcome, _judge
from cloister.cli.main import app
from cloister.errors import EngineDied, NotTrusted

STOPPED_BY = {
    "listens": "the seal",
    "answers by itself, in plain text": "response",
    "flips a bit of a request": "open",
    "flips a bit of an answer": "channel",
    "cuts an answer short": "channel",
    "replays a request": "replay",
    "replays old evidence": "binding",
    "swaps the keys in the statement": "binding",
    "impersonates, with a chip of its own": "evidence.chip-certificate",
    "hands over another model": "launch.models",
    "launches another model": "models",
    "changes the code by a byte": "measurement.code",
    "changes the engine by a byte": "measurement.engine",
    "boots the same image under another owner": "owner",
    "switches the padding off": "insecure.padding-off, config",
    "simulates, to a client that trusts no simulator": "evidence.root, insecure.api-keys-off",
}


def test_every_attack_is_stopped_by_the_check_that_is_meant_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    ran = run(app, "demo", "attack", "--json")
    assert {one["attack"]: one["blocked_by"] for one in json.loads(ran.stdout)} == STOPPED_BY
    assert ran.exit_code == 0
    assert list(STOPPED_BY) == [name for name, _ in ATTACKS]


def test_an_attack_that_did_not_take_place_was_not_stopped() -> None:
    def fail(error: Exception) -> str:
        raise error

    assert _judge("x", lambda: fail(EngineDied("gone"))) == Outcome("x", "", "Not tried: gone")
    assert _judge("x", lambda: fail(NotTrusted("no", step="s"))) == Outcome("x", "s", "no")
    assert _judge("x", lambda: "words") == Outcome("x", "", "words")
