from collections.abc import Iterator

import pytest
from tests.client.deployment import Deployment, Stage

from cloister.sim import Device


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    return Device.open(tmp_path_factory.mktemp("sim") / "state")


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage


@pytest.fixture
def deployment(device: Device) -> Deployment:
    return Deployment(device)
