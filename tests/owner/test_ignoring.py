from pathlib import Path

import pytest

from cloister.errors import MalformedApp
from cloister.owner.ignoring import Ignored, app_files


@pytest.mark.parametrize(
    ("rule", "path", "is_folder", "left_out"),
    [
        ("*.log", "a.log", False, True),
        ("*.log", "deep/er/a.log", False, True),
        ("*.log", "a.log.txt", False, False),
        ("/notes.txt", "notes.txt", False, True),
        ("/notes.txt", "sub/notes.txt", False, False),
        ("data/", "data", True, True),
        ("data/", "sub/data", True, True),
        ("data/", "data", False, False),
        ("docs/*.md", "docs/a.md", False, True),
        ("docs/*.md", "docs/sub/a.md", False, False),
        ("docs/**.md", "docs/sub/a.md", False, True),
        ("a?c", "abc", False, True),
        ("a?c", "a/c", False, False),
        ("[ab].py", "b.py", False, True),
        ("[!ab].py", "b.py", False, False),
        ("[!ab].py", "c.py", False, True),
        ("a.c", "abc", False, False),
        ("# *", "x", False, False),
        ("", "x", False, False),
        ("[", "[", False, True),
    ],
)
def test_rules(rule: str, path: str, is_folder: bool, left_out: bool) -> None:
    assert ((path, is_folder) in Ignored([rule])) is left_out


@pytest.mark.parametrize("rule", ["[z-a]*", "[!]"])
def test_a_rule_that_is_none_is_told_with_its_line(tmp_path: Path, rule: str) -> None:
    (tmp_path / "main.py").touch()
    (tmp_path / ".cloisterignore").write_text(f"# notes\n*.log\n{rule}\n")
    with pytest.raises(MalformedApp, match=r"\.cloisterignore, line 3") as caught:
        app_files(tmp_path)
    assert (caught.value.got, "[a-z]" in caught.value.hint) == (rule, True)


def test_the_last_rule_that_fits_decides() -> None:
    ignored = Ignored(["*.log", "!keep.log"])
    assert ("a.log", False) in ignored
    assert ("keep.log", False) not in ignored


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".env.local",
        "secrets.toml",
        "server.pem",
        "id.key",
        "sub/.env",
        "old.cloister",
        "main.pyc",
        "cloister.toml",
    ],
)
def test_what_holds_secrets_is_always_left_out(name: str) -> None:
    assert (name, False) in Ignored([])


def test_an_apps_files_are_sorted_and_without_what_is_left_out(tmp_path: Path) -> None:
    for name in (
        "main.py",
        "b/x.py",
        "a/y.html",
        ".git/config",
        "__pycache__/m.pyc",
        "secrets.toml",
        "data/big",
        "a/.env",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".cloisterignore").write_text("data/\n")
    assert [name for name, _ in app_files(tmp_path)] == ["a/y.html", "b/x.py", "main.py"]


def test_links_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedApp):
        app_files(tmp_path)
    (tmp_path / "main.py").symlink_to("/etc/passwd")
    with pytest.raises(MalformedApp, match=r"main\.py is no file"):
        app_files(tmp_path)
    (tmp_path / "main.py").unlink()
    (tmp_path / "folder").symlink_to("/etc")
    with pytest.raises(MalformedApp, match="folder is no file"):
        app_files(tmp_path)
