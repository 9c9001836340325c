from collections.abc import Iterator

import pytest
from tests.client.deployment import Deployment, Served, Stage

from cloister.client import AsyncSession
from cloister.proxy import ProxyConfig, create_proxy
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


@pytest.fixture
def proxy(deployment: Deployment, stage: Stage) -> Iterator[Served]:
    url = stage.show(deployment.gateway)

    def make(port: int) -> object:
        session = AsyncSession(url, policy=deployment.policy, pin_measurement=True)
        return create_proxy(session, ProxyConfig(port=port))

    with Served(None, port_of=make) as served:
        yield served
