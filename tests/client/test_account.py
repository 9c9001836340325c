"""The words of a verification, as data: what the terminal and the page both show. The terminal's: tests/cli."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.verify.world import NOW, World, make_device

from cloister.client import account
from cloister.client.account import explained, explained_refusal
from cloister.client.explanations import ABOUT, EXPLANATIONS, about, explain
from cloister.errors import ConnectionFailed, VerificationFailed
from cloister.evidence.statement import ModelStatement


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(make_device(tmp_path))


def test_every_step_with_a_text_is_about_something() -> None:
    names = [name for group in ABOUT.values() for name in group]
    assert len(names) == len(set(names))
    beginnings = {step.partition(".")[0] for step in EXPLANATIONS}
    assert sorted(beginnings - set(names)) == []
    assert sorted({name.partition(".")[0] for name in names} - beginnings) == []


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ("keys", "key"),
        ("measurement.mr_td", "code"),
        ("gpu-0.measurement.driver", "code"),
        ("tpm.evidence.crl", "chip"),
        ("tcb.status", "chip"),
        ("statement.models", "model"),
        ("statement.launch", "code"),
        ("unheard-of", "code"),
    ],
)
def test_what_a_step_is_about(step: str, what: str) -> None:
    assert about(step) == what


def test_a_verification_is_told_whole(world: World) -> None:
    verified = world.verify()
    told = explained(verified)
    assert json.loads(json.dumps(told)) == told
    assert (told["word"], told["platform"], told["first_use"]) == ("SIMULATED", "sim", "")
    assert told["facts"][0] == ["deployment", "acme-chat, release 1"]
    assert "lineage" not in dict(told["facts"])
    traced = ModelStatement("tiny", "cd" * 32, "F16", lineage_sha256="ab" * 32)
    object.__setattr__(verified, "statement", replace(verified.statement, models=(traced,)))
    facts = dict(account.facts(verified))
    assert facts["model tiny"] == f"F16, sha256 {'cd' * 32}"
    assert facts["lineage"].startswith(f"sha256 {'ab' * 32}, ")
    assert [step["step"] for step in told["steps"]] == [factor.step for factor in verified.factors]
    assert {step["about"] for step in told["steps"]} == {"key", "code", "chip", "model"}
    assert {step["remedy"] for step in told["steps"]} == {""}
    assert all(step["meaning"] for step in told["steps"])


def test_a_refusal_says_what_to_do_about_what_failed_alone(world: World) -> None:
    with pytest.raises(VerificationFailed) as caught:
        world.verify(now=NOW + 8000)
    told = explained_refusal(caught.value)
    assert told["word"] == "NOT TRUSTED"
    assert told["sentence"].startswith("TOO OLD: ")
    advised = {step["step"]: step["remedy"] for step in told["steps"] if step["remedy"]}
    expected = explain("expires")
    assert expected is not None
    assert advised == {"expires": expected.remedy}


def test_where_nothing_was_judged_there_is_no_word() -> None:
    told = explained_refusal(ConnectionFailed("Nobody there."))
    assert (told["word"], told["sentence"], told["steps"]) == ("", "", [])
