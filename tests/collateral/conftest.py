from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.collateral.service import Running, Service

from cloister.collateral import Cache, Vendor


@pytest.fixture
def service() -> Iterator[Service]:
    running = Running()
    yield running.service
    running.stop()


@pytest.fixture
def vendor(service: Service) -> Iterator[Vendor]:
    with service.vendor() as vendor:
        yield vendor


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "collateral")
