from collections.abc import Iterator

import pytest
from tests.client.conftest import deployment, device, stage
from tests.client.deployment import Deployment, Served, Stage

from cloister.client import AsyncSession
from cloister.proxy import ProxyConfig, create_proxy

__all__ = ["deployment", "device", "proxy", "stage"]


@pytest.fixture
def proxy(deployment: Deployment, stage: Stage) -> Iterator[Served]:
    url = stage.show(deployment.gateway)

    def make(port: int) -> object:
        session = AsyncSession(url, policy=deployment.policy, pin_measurement=True)
        return create_proxy(session, ProxyConfig(port=port))

    with Served(None, port_of=make) as served:
        yield served
