from pathlib import Path

import pytest

from cloister.errors import MalformedApp
from cloister.evidence.bundle import Resources
from cloister.owner.appfile import parse_appfile, read_appfile

WHOLE = """
name = "hello"
app = "main:app"
kind = "wsgi"
code = "src"
requirements = "requirements.txt"
python = "3.13"
health = "/health"
tests = "python tests/check.py 'one word'"
expiry = "12h"
secrets = ["API_TOKEN"]
egress = ["api.example.com", "db.example.com:5432"]
domain = "hello.example.com"
platform = "sim"
policy = "policy.toml"

[resources]
memory = "2G"
cores = 2
context = 4096

[settings]
GREETING = "hi"

[client]
require_pq = true
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    for name in ("requirements.txt", "policy.toml"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_whole_file_is_read(folder: Path) -> None:
    (folder / "cloister.toml").write_text(WHOLE)
    app = read_appfile(folder)
    assert (app.name, app.kind, app.entry, app.model) == ("hello", "wsgi", "main:app", "")
    assert (app.code, app.requirements, app.policy) == (
        folder / "src",
        folder / "requirements.txt",
        folder / "policy.toml",
    )
    assert (app.health, app.tests, app.expiry) == ("/health", ("python", "tests/check.py", "one word"), 43_200)
    assert (app.secrets, app.egress) == (("API_TOKEN",), ("api.example.com", "db.example.com:5432"))
    assert app.python == "3.13"
    assert (app.domain, app.platform) == ("hello.example.com", "sim")
    assert app.resources == Resources(memory=2048, cores=2, context=4096)
    assert app.settings == {"GREETING": "hi"}


def test_a_language_model_needs_two_lines(folder: Path) -> None:
    app = parse_appfile(b'name = "chat"\napp = "llm"\n', folder)
    assert (app.kind, app.entry, app.model, app.code, app.health) == ("llm", "", "default", None, "/health")
    assert app.expiry is None


@pytest.mark.parametrize(
    ("old", "new", "line", "remedy"),
    [
        ('name = "hello"', 'name = "Hello"', 2, "lower-case"),
        ('name = "hello"\n', "", 0, 'name = "my-app"'),
        ('app = "main:app"', 'app = "main"', 3, 'app = "main:app"'),
        ('app = "main:app"', "app = 3", 3, "in quotes"),
        ('kind = "wsgi"\n', "", 0, "Flask, Django"),
        ('kind = "wsgi"', 'kind = "cgi"', 4, "asgi, wsgi"),
        ('code = "src"', 'code = "../src"', 5, "Name a folder in it"),
        ('code = "src"', 'code = "nowhere"', 5, "Looked for"),
        ('requirements = "requirements.txt"', 'requirements = "src"', 6, "Looked for"),
        ('python = "3.13"', 'python = "3"', 7, 'python = "3.13"'),
        ('python = "3.13"', "python = 3.13", 7, "in quotes"),
        ('requirements = "requirements.txt"\n', "", 6, "Leave it away"),
        ('health = "/health"', 'health = "health"', 8, 'health = "/health"'),
        ("'one word'\"", "'one word\"", 9, "tests ="),
        ('expiry = "12h"', "expiry = 12", 10, "in quotes"),
        ('expiry = "12h"', 'expiry = "12 weeks"', 10, "30d"),
        ('["API_TOKEN"]', '["API TOKEN"]', 11, "Names only"),
        ('["API_TOKEN"]', '["GREETING"]', 11, "never stands in this file"),
        ('["API_TOKEN"]', '{ API_TOKEN = "x" }', 11, "Names only"),
        ('"db.example.com:5432"', '"https://db.example.com"', 12, "Hosts"),
        ('"db.example.com:5432"', '"db.example.com:65536"', 12, "from 1 to 65535"),
        ('"db.example.com:5432"', '"db.example.com:0"', 12, "from 1 to 65535"),
        ('"db.example.com:5432"', '"127.0.0.1:5432"', 12, "without being allowed to"),
        ('"db.example.com:5432"', '"169.254.169.254:80"', 12, "without being allowed to"),
        ('"db.example.com:5432"', '"api.example.com"', 12, "Leave one of the two away"),
        ('domain = "hello.example.com"', 'domain = "hello"', 13, "leads to the host"),
        ('platform = "sim"', 'platform = "moon"', 14, "sev-snp"),
        ('platform = "sim"', 'logs = "all"', 14, "none, public"),
        ('policy = "policy.toml"', 'policy = "none.toml"', 15, "Looked for"),
        ('memory = "2G"', 'memory = "2T"', 18, "gibibytes"),
        ("cores = 2", "cores = 0", 19, "from 1 to 1024"),
        ("cores = 2", "cores = true", 19, "from 1 to 1024"),
        ("cores = 2", "core = 2", 19, "Known here: memory"),
        ("context = 4096", "context = 1", 20, "from 64"),
        ('GREETING = "hi"', "GREETING = 1", 23, "in quotes"),
        ('GREETING = "hi"', '"A B" = "hi"', 23, "no digit first"),
        ("require_pq = true", "require_pg = true", 26, "Known here: policy, policy_signer, require_pq"),
        ('domain = "hello.example.com"', 'domains = "x"', 13, "Known here"),
        ('name = "hello"', "name = hello", 2, "text in quotes"),
    ],
)
def test_each_fault_is_told_with_its_line_and_a_remedy(
    folder: Path, old: str, new: str, line: int, remedy: str
) -> None:
    parse_appfile(WHOLE.encode(), folder)
    content = WHOLE.replace(old, new)
    assert content != WHOLE
    with pytest.raises(MalformedApp) as caught:
        parse_appfile(content.encode(), folder)
    where = f"line {line}" if line else "the file's end"
    assert caught.value.message.startswith(f"cloister.toml, {where}:")
    assert remedy in caught.value.hint


@pytest.mark.parametrize("key", ["kind", "code", "requirements", "python", "secrets", "settings", "logs"])
def test_what_means_nothing_for_the_built_in_app_is_refused(folder: Path, key: str) -> None:
    value = {"secrets": "[]", "settings": "{}"}.get(key, '"x"')
    with pytest.raises(MalformedApp, match=f"line 3: {key} means nothing"):
        parse_appfile(f'name = "chat"\napp = "llm"\n{key} = {value}\n'.encode(), folder)


def test_an_apps_words_are_its_own_unless_it_says_otherwise(folder: Path) -> None:
    assert parse_appfile(WHOLE.encode(), folder).logs == "none"
    assert parse_appfile(WHOLE.replace('platform = "sim"', 'logs = "public"').encode(), folder).logs == "public"


def test_a_key_of_the_same_name_in_another_table_is_not_taken_for_the_line(folder: Path) -> None:
    content = WHOLE.replace("cores = 2", 'cores = "2"').replace('GREETING = "hi"', 'cores = "1"')
    with pytest.raises(MalformedApp, match="line 19"):
        parse_appfile(content.encode(), folder)


def test_no_file_is_said_with_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(MalformedApp) as caught:
        read_appfile(tmp_path)
    assert "cloister init" in caught.value.hint


def test_a_file_that_is_too_long_or_no_text_is_refused(folder: Path) -> None:
    for content in (b"#" * 300_000, b"\xff"):
        with pytest.raises(MalformedApp):
            parse_appfile(content, folder)
