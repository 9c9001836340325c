import json
from pathlib import Path

import pytest
from tests.cli.running import run
from typer.testing import CliRunner

from cloister.cli import output
from cloister.cli.main import app
from cloister.owner.template import TEMPLATES


@pytest.mark.parametrize("template", TEMPLATES)
def test_writes_an_app_named_after_its_folder(tmp_path: Path, template: str) -> None:
    ran = run(app, "init", str(tmp_path / "My App"), "--template", template, "--json")
    assert ran.exit_code == 0
    told = json.loads(ran.stdout)
    assert (told["name"], told["template"]) == ("my-app", template)
    assert sorted(told["files"]) == sorted(path.name for path in (tmp_path / "My App").iterdir())
    assert 'name = "my-app"' in (tmp_path / "My App" / "cloister.toml").read_text()


def test_asks_nobody_where_nobody_is(tmp_path: Path) -> None:
    ran = run(app, "init", str(tmp_path / "a"))
    assert ran.exit_code == 2
    assert "--template llm|flask|fastapi" in ran.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("answer", "template"), [("flask\n", "flask"), ("\n", "llm"), (" fastapi \n", "fastapi")])
def test_asks_on_a_terminal_which_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, template: str
) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda _stream: True)
    ran = CliRunner().invoke(app, ["init", str(tmp_path / "a"), "--json"], input=answer)
    assert ran.exit_code == 0
    assert json.loads(ran.stdout[ran.stdout.index("{") :])["template"] == template  # after what was typed
    for one, what in TEMPLATES.items():
        assert one in ran.stderr
        assert what in ran.stderr
    assert (tmp_path / "a" / "cloister.toml").is_file()


def test_an_answer_that_is_no_template_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda _stream: True)
    ran = CliRunner().invoke(app, ["init", str(tmp_path / "a")], input="django\n")
    assert ran.exit_code == 2
    assert "no such template" in ran.stderr
    assert not (tmp_path / "a").exists()


def test_a_second_time_changes_nothing(tmp_path: Path) -> None:
    run(app, "init", str(tmp_path), "--template", "flask")
    (tmp_path / "app.py").write_text("mine")
    ran = run(app, "init", str(tmp_path), "--template", "flask")
    assert ran.exit_code == 2
    assert (tmp_path / "app.py").read_text() == "mine"


def test_a_name_that_no_app_may_have_is_refused(tmp_path: Path) -> None:
    ran = run(app, "init", str(tmp_path / "a"), "--template", "llm", "--name", 'x"\npolicy = "evil')
    assert ran.exit_code == 2
    assert not (tmp_path / "a").exists()
