"""A process's memory in huge pages, where the machine has them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from pathlib import Path
from cloister.enclave.pages import collapse

def huge():
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("AnonHugePages")))

held = [str(number) for number in range(400_000)]
before, pages = huge(), collapse()
print(before, pages, huge(), held == [str(number) for number in range(400_000)])
"""
KERNEL = tuple(int(part) for part in os.uname().release.split(".")[:2])


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or KERNEL < (6, 1), reason="a kernel without MADV_COLLAPSE"
)
def test_what_a_process_holds_is_gathered_into_huge_pages() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, pages, after, same = done.stdout.split()
    assert same == "True"
    assert int(pages) >= 4
    assert int(after) - int(before) >= 4 * 2048  # KiB


def test_where_there_are_none_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from cloister.enclave import pages

    monkeypatch.setattr(pages, "_MADV_COLLAPSE", -1)  # no kernel knows it
    assert pages.collapse() == 0


def test_a_process_that_is_not_told_of_its_memory_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cloister.enclave import pages

    monkeypatch.setattr(pages, "_MAPS", tmp_path / "maps")
    assert pages.collapse() == 0
