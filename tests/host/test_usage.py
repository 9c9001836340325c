import subprocess
import sys
from pathlib import Path

from tests.host.stage import eventually

from cloister.host.usage import usage_of

_BUSY = "import subprocess, sys, time; x = bytearray(50 << 20)\nwhile True: x[0] ^= 1"
_PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_BUSY!r}])"


def test_a_groups_children_count_too() -> None:
    process = subprocess.Popen([sys.executable, "-c", _PARENT], process_group=0)
    try:
        eventually(lambda: usage_of([process.pid])[process.pid].memory_bytes > 50 << 20)
        eventually(lambda: usage_of([process.pid])[process.pid].cpu_seconds > 0.1)
    finally:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            subprocess.run(["kill", "-9", child], check=True)
        process.kill()
        process.wait()
    eventually(lambda: usage_of([process.pid]) == {})


def test_what_the_kernel_writes_is_read(tmp_path: Path) -> None:
    fields = ["S", "1", "77", *["0"] * 8, "150", "50", "10", "5", *["0"] * 6, "3", *["0"] * 20]
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "stat").write_text(f"5 (a) b (c) {' '.join(fields)}\n")
    (tmp_path / "6").mkdir()
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text("damaged")
    (tmp_path / "self").mkdir()
    found = usage_of([77], tmp_path)
    assert found[77].cpu_seconds == 2.15
    assert found[77].memory_bytes == 3 * 4096
    assert usage_of([], tmp_path) == {}
