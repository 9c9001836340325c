"""How tools/build_engine.py changes llama.cpp's source: exactly as the patch says, or not at all."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("build_engine_under_test", ROOT / "tools" / "build_engine.py")
assert _spec is not None and _spec.loader is not None
engine = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = engine
_spec.loader.exec_module(engine)

SOURCE = "one\ntwo\nthree\nfour\nfive\n"
PATCH = """--- a/src/x.cpp
+++ b/src/x.cpp
@@ -1,2 +1,3 @@
 one
-two
+2
+2.5
@@ -5,1 +6,1 @@
-five
+5
"""


def tree(folder: Path, text: str) -> Path:
    path = folder / "vendor/llama.cpp/src/x.cpp"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_every_hunk_is_applied(tmp_path: Path) -> None:
    path = tree(tmp_path, SOURCE)
    engine.apply_patch(PATCH, tmp_path)
    assert path.read_text() == "one\n2\n2.5\nthree\nfour\n5\n"


@pytest.mark.parametrize(
    "other", ["zero\n" + SOURCE, SOURCE.replace("two", "TWO"), "one\n", ""], ids=["moved", "changed", "cut", "empty"]
)
def test_another_source_is_refused_and_left_as_it_was(tmp_path: Path, other: str) -> None:
    path = tree(tmp_path, other)
    with pytest.raises(engine.BuildFailed, match="is for another version"):
        engine.apply_patch(PATCH, tmp_path)
    assert path.read_text() == other


def test_the_patch_itself_is_whole() -> None:
    """Each hunk holds as many lines as its head says, and starts where the one before it ends, or later."""
    count_of = 0
    for file in re.split(r"(?m)^--- a/", engine.PATCH.read_text())[1:]:
        end = 0
        for hunk in re.split(r"(?m)^@@ ", file)[1:]:
            head, _, body = hunk.partition("\n")
            start, count, _, new = map(int, re.match(r"-(\d+),(\d+) \+(\d+),(\d+) @@", head).groups())  # type: ignore[union-attr]
            lines = body.splitlines()
            assert sum(line[0] != "+" for line in lines) == count
            assert sum(line[0] != "-" for line in lines) == new
            assert start > end
            end = start + count - 1
            count_of += 1
    assert count_of > 10


def test_a_change_of_the_patch_is_another_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = engine.read_lock(engine.LOCK.read_text())
    before = engine.build_key(locked, "flags: amx")
    changed = tmp_path / "engine.patch"
    changed.write_text(engine.PATCH.read_text() + "\n")
    monkeypatch.setattr(engine, "PATCH", changed)
    assert engine.build_key(locked, "flags: amx") != before
