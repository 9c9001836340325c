import json

import pytest

from cloister.bench.bundle import Step
from cloister.cli.bench_bundle import steps

SIZE = 64 << 20
MOST = SIZE // 3


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """What `cloister bench bundle --size 96MiB` measures: real processes, a real host."""
    return steps(tmp_path_factory.mktemp("large"), SIZE)


def test_each_step_is_measured_over_what_it_went_over(found: list[Step]) -> None:
    names = ["package", "upload", "upload, the host", "upload gone on with", "open"]
    assert [step.name for step in found] == names
    package, upload, host, rest, opened = found
    assert SIZE < package.size == upload.size == host.size
    assert SIZE < opened.size < package.size
    assert package.size // 4 < rest.size < package.size * 3 // 4  # what had arrived before the cut was not sent again
    assert all(step.seconds > 0 and step.cpu > 0 and step.peak > step.before > 10 << 20 for step in found)


def test_no_step_holds_in_memory_what_it_works_on(found: list[Step]) -> None:
    assert [step.name for step in found if step.growth > MOST] == []


def test_figures_are_told_in_bytes_and_megabytes_a_second() -> None:
    told = json.loads(json.dumps(Step("open", 3_000_000, 1.5, 1.0, 100, 150).to_json()))
    assert (told["mb_per_second"], told["growth_bytes"], told["bytes"]) == (2.0, 50, 3_000_000)
