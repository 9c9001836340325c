import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cloister.bench.plots import bars, lines, require
from cloister.errors import WrongUse

SERIES = {"pythia-1b": [(1, 27.5), (4, 71.3), (16, 192.5)], "cost in $ and $": [(16, 155.3), (1, 36.9)]}


def test_the_same_figures_give_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines(tmp_path / f"{name}.v1", "Speed", "streams", "tokens/s", SERIES)
    for suffix in ("png", "svg"):
        first, second = ((tmp_path / f"{name}.v1.{suffix}").read_bytes() for name in ("a", "b"))
        assert first == second
    assert (tmp_path / "a.v1.png").read_bytes().startswith(b"\x89PNG\r\n")
    svg = (tmp_path / "a.v1.svg").read_text()
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "<dc:date>" not in svg


def test_other_figures_give_another_file(tmp_path: Path) -> None:
    bars(tmp_path / "a", "Size", "MB", {"q8_0": 1075.2, "q4_0 of a long name": 569.1})
    bars(tmp_path / "b", "Size", "MB", {"q8_0": 1075.2, "q4_0 of a long name": 600.0})
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_without_matplotlib_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(WrongUse) as caught:
        require()
    assert caught.value.hint == "pip install 'cloister[bench]'"
