"""Shared by all rooms' tests."""

import signal

import pytest
from hypothesis import HealthCheck, settings

# A shell that starts us in the background has SIGINT ignored, and so would every program that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What generated tests look for has nothing to do with how fast the machine is today.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


_FIRST = (
    "tests/verify/test_every_check_counts.py",
    "tests/end_to_end/",
    "tests/system/test_tools.py",
    "tests/bench/",
    "tests/cli/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first: of several processes none is left with one of them in the end."""

    def turn(item: pytest.Item) -> int:
        return next((at for at, begin in enumerate(_FIRST) if item.nodeid.startswith(begin)), len(_FIRST))

    items.sort(key=turn)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
