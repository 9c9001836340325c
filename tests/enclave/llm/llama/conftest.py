from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.enclave.llm.llama.random_model import write_model

from cloister.enclave.llm.llama import LoopSettings
from cloister.enclave.llm.llama.library import load_library
from cloister.enclave.llm.llama.model import Model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "random.gguf")


@pytest.fixture(scope="session")
def slow_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that a long prompt takes a noticeable while."""
    return write_model(tmp_path_factory.mktemp("models") / "slow.gguf", context=16384, layers=4, width=256)


@pytest.fixture(scope="session")
def library() -> Any:
    return load_library()


SETTINGS = LoopSettings(slots=8)


@pytest.fixture(params=["parted", "shared"])
def model(library: Any, model_path: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    """Once with a part of the cache for each stream, once with one cache for all."""
    cells = 0 if request.param == "parted" else (SETTINGS.slots - 1) * 512
    loaded = Model(library, model_path, replace(SETTINGS, kv_tokens=cells))
    assert loaded.parted == (request.param == "parted")
    yield loaded
    loaded.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
