from pathlib import Path

import pytest
from tests.owner.wheels import lock


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip looks for packages, and nowhere else: the folder holds `itsdangerous` and its lock, `lock.txt`."""
    folder = tmp_path / "index"
    lock(["itsdangerous"], folder, tmp_path / "lock.txt")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder
