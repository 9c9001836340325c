import pytest

from cloister.errors import HostFull, WrongUse
from cloister.host.resources import TIERS, Capacity, Resources, choose_cores

GIB = 1 << 30
CAPACITY = Capacity(4 * GIB, (0, 1, 2, 3))


def test_what_is_left_is_given_and_no_more() -> None:
    others = [Resources(GIB, 1), Resources(2 * GIB, 4)]
    assert CAPACITY.admit(Resources(GIB, 2), others) == Resources(GIB, 2)
    with pytest.raises(HostFull) as caught:
        CAPACITY.admit(Resources(GIB + 1, 2), others)
    assert caught.value.got == "1024 MiB"


def test_more_cores_than_there_are_are_all_there_are() -> None:
    assert CAPACITY.admit(Resources(GIB, 99), []).cores == 4


@pytest.mark.parametrize("wanted", [Resources(GIB, 0), Resources(0, 1), Resources((64 << 20) - 1, 1)])
def test_no_sensible_size_is_refused(wanted: Resources) -> None:
    with pytest.raises(WrongUse):
        CAPACITY.admit(wanted, [])


def test_the_least_used_cores_are_taken_first() -> None:
    assert choose_cores((0, 1, 2, 3), [], 2) == (0, 1)
    assert choose_cores((0, 1, 2, 3), [(0, 1)], 2) == (2, 3)
    assert choose_cores((0, 1, 2, 3), [(0, 1), (0, 2, 7)], 1) == (3,)
    assert choose_cores((0, 1), [(0, 1), (1,)], 1) == (0,)
    assert choose_cores((0, 1), [], 5) == (0, 1)


def test_tiers_grow() -> None:
    sizes = [(tier.memory_bytes, tier.cores) for tier in TIERS.values()]
    assert sizes == sorted(sizes)
    assert Capacity.of_this_machine().memory_bytes > GIB
