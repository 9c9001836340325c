from pathlib import Path

import pytest
from tests.verify.world import World, make_device


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(make_device(tmp_path_factory.mktemp("device")))


@pytest.fixture
def other_world(tmp_path: Path) -> World:
    """The same in everything, but for its root: an attacker's own simulator."""
    return World(make_device(tmp_path))
