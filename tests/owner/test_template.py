import ast
from pathlib import Path

import pytest

from cloister.errors import WrongUse
from cloister.owner.appfile import read_appfile
from cloister.owner.ignoring import app_files
from cloister.owner.template import TEMPLATES, name_of, write_template


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_written_is_an_app(tmp_path: Path, template: str) -> None:
    written = write_template(tmp_path / "app", template, "my-app")
    assert sorted(path.name for path in (tmp_path / "app").iterdir()) == written
    app = read_appfile(tmp_path / "app")
    assert app.name == "my-app"
    assert app.tests
    for path in (tmp_path / "app").glob("*.py"):
        ast.parse(path.read_text())
    if app.code is not None:
        assert [name for name, _ in app_files(app.code)] == ["app.py"]
        assert app.requirements is not None
        assert "--hash=sha256:" in app.requirements.read_text()
        assert "://" not in app.requirements.read_text()


def test_nothing_that_is_there_is_changed(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("mine")
    with pytest.raises(WrongUse, match="there already"):
        write_template(tmp_path, "flask", "my-app")
    assert [path.name for path in tmp_path.iterdir()] == ["app.py"]


def test_an_unknown_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongUse):
        write_template(tmp_path, "../flask", "my-app")


@pytest.mark.parametrize(
    ("folder", "name"), [("My App!", "my-app"), ("a.b_c", "a-b-c"), ("---", "my-app"), ("é" * 5, "my-app")]
)
def test_a_name_is_made_of_the_folders(tmp_path: Path, folder: str, name: str) -> None:
    assert name_of(tmp_path / folder) == name
