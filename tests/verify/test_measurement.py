from collections.abc import Mapping

import pytest

from cloister.verify.factors import Factor
from cloister.verify.measurement import check_measurement
from cloister.verify.platform import Appraisal
from cloister.verify.policy import Measurements

GOT = {"code": "c", "interpreter": "i", "engine": "e", "measurement": "m"}


def check(allowed: Measurements, *, simulated: bool = True, got: Mapping[str, str] = GOT) -> dict[str, Factor]:
    appraisal = Appraisal(
        platform="sim",
        simulated=simulated,
        report_data=bytes(64),
        launch_sha256=bytes(32),
        measurement=got,
        engine=None,
        platform_id="",
        factors=(),
    )
    return {factor.step: factor for factor in check_measurement(allowed, appraisal)}


def verdicts(*entries: Mapping[str, str | int]) -> dict[str, str]:
    """Of the components that an entry names."""
    return {step: factor.verdict for step, factor in check({"sim": entries}).items() if step != "measurement"}


def test_any_one_entry_is_enough() -> None:
    assert verdicts({"code": "old"}, {"code": "c", "engine": "e"}) == {
        "measurement.code": "pass",
        "measurement.engine": "pass",
    }


def test_every_component_of_that_entry_must_match() -> None:
    assert verdicts({"code": "c", "engine": "x"}) == {"measurement.code": "pass", "measurement.engine": "fail"}
    assert verdicts({"code": "c", "engine": "x"}, {"code": "x", "engine": "e"})["measurement.engine"] == "fail"


def test_the_nearest_entry_is_shown() -> None:
    factors = check({"sim": ({"code": "x", "engine": "x"}, {"code": "new", "engine": "e"})})
    assert (factors["measurement.code"].expected, factors["measurement.code"].got) == ("new", "c")
    assert factors["measurement.engine"].verdict == "pass"


def test_a_component_that_the_platform_does_not_measure_never_matches() -> None:
    assert verdicts({"mr_td": "x"}) == {"measurement.mr_td": "fail"}
    assert check({"sim": ({"mr_td": "nothing"},)})["measurement.mr_td"].verdict == "fail"


@pytest.mark.parametrize(
    ("got", "least", "verdict"),
    [("7", 7, "pass"), ("8", 7, "pass"), ("6", 7, "fail"), ("x7", 7, "fail"), ("-8", -9, "fail"), ("7", "7", "fail")],
)
def test_a_least_number_must_be_reached_by_a_number(got: str, least: str | int, verdict: str) -> None:
    factors = check({"sim": ({"min_isv_svn": least},)}, got={"isv_svn": got})
    assert {step: factor.verdict for step, factor in factors.items()} == {"measurement.min_isv_svn": verdict}


def test_a_least_number_of_what_is_not_measured_is_not_reached() -> None:
    assert verdicts({"min_isv_svn": 0}) == {"measurement.min_isv_svn": "fail"}


def test_a_note_is_no_component_and_makes_no_entry_nearer() -> None:
    assert verdicts({"code": "c", "vcpus": 4}) == {"measurement.code": "pass"}
    noted: Mapping[str, str | int] = {"code": "c", "engine": "x", "vcpus": 4}
    plain = {"code": "x", "engine": "x"}
    assert verdicts(plain, noted) == {"measurement.code": "pass", "measurement.engine": "fail"}
    assert verdicts({"engine": "x", "vcpus": 4}, {"engine": "y"}) == {"measurement.engine": "fail"}
    assert check({"sim": ({"engine": "x", "vcpus": 4}, {"engine": "y"})})["measurement.engine"].expected == "x"


def test_what_the_entry_leaves_open_is_said() -> None:
    assert "code, interpreter" in check({"sim": ({"engine": "e"},)})["measurement"].hint
    assert "measurement" not in check({"sim": ({"code": "c", "interpreter": "i", "engine": "e"},)})
    assert check({"sim": ({"measurement": "m"},)}).keys() == {"measurement.measurement"}


@pytest.mark.parametrize("allowed", [{"tdx": ({"mr_td": "x"},)}, {"sim": ()}])
def test_a_platform_without_entries_is_refused(allowed: Measurements) -> None:
    assert check(allowed)["measurement"].verdict == "fail"


def test_only_a_simulator_may_run_unmeasured_and_that_is_said() -> None:
    assert check({})["measurement"].verdict == "not-checked"
    assert check({}, simulated=False)["measurement"].verdict == "fail"


def test_on_hardware_a_launch_measurement_does_not_stand_for_what_else_is_reported() -> None:
    """A simulator's `measurement` is over all of its components; a processor's is of a guest's first memory."""
    entry: Measurements = {"sim": ({"measurement": "m"},)}
    assert "measurement" not in check(entry)
    assert check(entry, simulated=False)["measurement"].verdict == "not-checked"
