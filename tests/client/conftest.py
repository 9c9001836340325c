from collections.abc import Iterator

import pytest
from tests.client.deployment import Deployment, Served

from cloister.sim import Device


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    return Device.open(tmp_path_factory.mktemp("sim") / "state")


@pytest.fixture
def deployment(device: Device) -> Deployment:
    return Deployment(device)


@pytest.fixture
def enclave(deployment: Deployment) -> Iterator[Served]:
    with Served(deployment.gateway) as served:
        yield served
