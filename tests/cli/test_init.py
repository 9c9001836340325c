import json
from pathlib import Path

import pytest
from tests.cli.running import run

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
