from pathlib import Path
from typing import Any

import pytest

from cloister.enclave.llm.llama.config import LoopSettings, physical_cores
from cloister.enclave.llm.llama.library import library_dir
from cloister.errors import WrongUse


@pytest.mark.parametrize(
    "fields",
    [
        {"slots": 0},
        {"slots": 65},
        {"context": -1},
        {"chunk": 1},
        {"threads": True},
        {"variant": "fast"},
        {"kv_type": "q2"},
    ],
)
def test_refuses_settings_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(WrongUse):
        LoopSettings(**fields)


def test_settings_survive_encoding() -> None:
    settings = LoopSettings(slots=3, context=100, threads=2)
    assert LoopSettings.decode(settings.encode()) == settings
    with pytest.raises(WrongUse):
        LoopSettings.decode({"slots": 1})


def test_counts_at_least_one_core() -> None:
    assert 1 <= physical_cores() <= 64


def test_says_how_to_get_a_missing_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOISTER_ENGINE_DIR", str(tmp_path))
    with pytest.raises(WrongUse) as caught:
        library_dir()
    assert "make setup" in caught.value.hint
