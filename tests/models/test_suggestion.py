import pytest

from cloister.models.reference import HubModel, parse_reference
from cloister.models.suggestion import suggest

GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "cores", "expected"),
    [(1, 1, "0.6B"), (24, 2, "1.7B"), (16, 4, "4B"), (32, 8, "8B"), (64, 8, "14B"), (256, 64, "32B"), (256, 1, "0.6B")],
)
def test_suggests_what_fits(memory: int, cores: int, expected: str) -> None:
    assert expected in suggest(memory * GIB, cores).reference


def test_what_it_suggests_can_be_fetched_by_name() -> None:
    assert isinstance(parse_reference(suggest().reference), HubModel)
