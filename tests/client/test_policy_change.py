"""The lines that would make a policy accept what it refused: read back, they do; and where pins are not the matter, none."""

import json
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from tests.verify.world import CONFIG, MEASUREMENT, MODEL, World, make_device

from cloister.client.attestor import CHANGED
from cloister.client.policy_change import policy_change
from cloister.errors import VerificationFailed
from cloister.evidence.simulated import PLATFORM
from cloister.verify import Factor

OTHER = "77" * 32


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(make_device(tmp_path_factory.mktemp("device")))


def factors_of(world: World, **pins: Any) -> list[Factor]:
    with pytest.raises(VerificationFailed) as caught:
        replace(world, pins=pins).verify()
    return [factor for factor in caught.value.factors if isinstance(factor, Factor)]


def test_the_lines_accept_what_was_refused(world: World) -> None:
    pinned = {"sim": ({**MEASUREMENT.components(), "code": f"sha256:{OTHER}"},)}
    wrong = {"config": OTHER, "models": frozenset({OTHER}), "deployment": "other", "measurements": pinned}
    lines = tomllib.loads(policy_change(factors_of(world, **wrong)))
    assert lines == {
        "deployment": "acme-chat",
        "config": f"sha256:{CONFIG}",
        "models": [f"sha256:{MODEL}"],
        "measurements": {"sim": [dict(MEASUREMENT.components())]},
    }


def fail(step: str, got: str, hint: str = "") -> Factor:
    return Factor(step, "fail", "another", got, hint)


@pytest.mark.parametrize(
    "more",
    [
        [fail("evidence.root", "another")],
        [fail("evidence.measurement", "ab")],
        [fail("insecure.ehbp", "weakened")],
        [fail("tcb.status", "OutOfDate")],
        [fail("launch", "ab", "The hardware was started with another launch config.")],
        [fail("binding", "ab")],
        [fail("platform", "tdx")],
        [fail("measurement.code", "sha256:\u202eab")],
    ],
    ids=lambda more: str(more[0].step),
)
def test_there_are_none_where_pins_are_not_all_that_differs(more: list[Factor]) -> None:
    pins = [Factor("platform", "pass", PLATFORM, PLATFORM), fail("config", f"sha256:{CONFIG}")]
    assert policy_change(pins) == f'config = "sha256:{CONFIG}"\n'
    assert policy_change([*pins, *more]) == ""


@pytest.mark.parametrize("factors", [[], [Factor("config", "pass", "a", "a")], [fail("measurement", "tdx")]])
def test_there_are_none_where_nothing_or_nothing_known_differs(factors: Iterable[Factor]) -> None:
    assert policy_change(factors) == ""


def test_a_change_under_a_running_session_is_named_whole() -> None:
    """What passed the policy comes first, then what differs from what was verified first."""
    passed = {"platform": "tdx", "owner": "ed25519:a", "deployment": "acme", "app": "sha256:aa", "config": "sha256:bb"}
    passed |= {"models": f"{MODEL} {OTHER}", "measurement.mr_td": "old", "measurement.rtmr1": "same"}
    factors = [Factor(step, "pass", got, got) for step, got in passed.items()]
    factors += [fail("launch", "cc", CHANGED), fail("measurement.mr_td", "new", CHANGED)]
    assert tomllib.loads(policy_change(factors)) == {
        "owner_key": "ed25519:a",
        "deployment": "acme",
        "app": "sha256:aa",
        "config": "sha256:bb",
        "models": [f"sha256:{MODEL}", f"sha256:{OTHER}"],
        "measurements": {"tdx": [{"mr_td": "new", "rtmr1": "same"}]},
    }


def test_a_simulators_one_measurement_stands_for_all_of_them() -> None:
    factors = [Factor("platform", "pass", PLATFORM, PLATFORM), fail("measurement.code", "a", CHANGED)]
    factors += [fail("measurement.measurement", "sha256:b", CHANGED)]
    assert tomllib.loads(policy_change(factors)) == {"measurements": {"sim": [{"measurement": "sha256:b"}]}}


def test_gpus_of_one_kind_are_named_once_and_least_numbers_are_numbers() -> None:
    factors = [Factor("platform", "pass", "sgx", "sgx"), fail("measurement.min_isv_svn", "7")]
    factors += [Factor("measurement.mr_signer", "pass", "aa", "aa")]
    factors += [fail(f"gpu-{at}.measurement.driver", "560") for at in range(2)]
    assert tomllib.loads(policy_change(factors))["measurements"] == {
        "sgx": [{"min_isv_svn": 7, "mr_signer": "aa"}],
        "nvidia": [{"driver": "560"}],
    }


def test_what_came_from_outside_stays_text() -> None:
    hostile = 'a"\\", trust = "'
    lines = policy_change([Factor("platform", "pass", "sim", "sim"), fail("deployment", hostile)])
    assert tomllib.loads(lines) == {"deployment": hostile}
    assert json.loads(lines.partition(" = ")[2]) == hostile
