import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from tests.enclave.runtime.world import bundle

from cloister.errors import WrongUse
from cloister.evidence.bundle import parse_bundle_head
from cloister.evidence.launch import App, parse_launch
from cloister.owner.deployment import launch_bytes, next_release

OWNER = "ed25519:" + "A" * 43


def test_the_launch_config_names_exactly_this_bundle() -> None:
    head = parse_bundle_head(bundle({"code": b"c", "model": b"m"}, model="toy", egress=("api.example.com",))[0])
    launch = parse_launch(launch_bytes(head, owner_key=OWNER, deployment="acme", release=3, config=b"{}"))
    assert launch.app == App("wsgi", head.sha256)
    assert launch.models == (hashlib.sha256(b"m").hexdigest(),)
    assert (launch.owner_key, launch.deployment, launch.release) == (OWNER, "acme", 3)
    assert launch.config_sha256 == hashlib.sha256(b"{}").hexdigest()
    assert launch.egress == ("api.example.com",)


def test_each_deployment_counts_for_itself_and_never_twice(tmp_path: Path) -> None:
    assert [next_release(tmp_path, name) for name in ("a", "a", "b", "a")] == [1, 2, 1, 3]
    assert (tmp_path / "releases.json").stat().st_mode & 0o777 == 0o600


def test_processes_at_once_get_different_numbers(tmp_path: Path) -> None:
    code = "import sys, pathlib; from cloister.owner.deployment import next_release as n\n"
    code += "print(*[n(pathlib.Path(sys.argv[1]), 'a') for _ in range(20)])"
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    numbers = sorted(int(word) for run in runs for word in run.communicate()[0].split())
    assert numbers == list(range(1, 61))


@pytest.mark.parametrize("content", ["[]", "{", '{"a": "x"}'])
def test_a_damaged_count_is_told_and_not_begun_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "releases.json").write_text(content)
    with pytest.raises(WrongUse):
        next_release(tmp_path, "a")
