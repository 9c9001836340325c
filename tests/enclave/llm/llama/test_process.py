import sys
from pathlib import Path

import pytest

import cloister
from cloister.enclave.llm.llama.process import _search_path

OWN = str(Path(cloister.__file__).parents[1])


def test_the_child_looks_where_this_process_looks_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file beside the package, named like a module of the standard library, must not come first."""
    monkeypatch.setattr(sys, "path", ["", "/usr/lib/python", OWN, "relative", "/packages"])
    assert _search_path() == ["/usr/lib/python", OWN, "/packages"]


def test_the_child_finds_this_package_however_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/usr/lib/python"])
    assert _search_path() == ["/usr/lib/python", OWN]
