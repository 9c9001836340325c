import subprocess
import sys
from types import ModuleType
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from cloister import __version__
from cloister.cli import main as cli
from cloister.errors import ConnectionFailed, EngineDied, MalformedEvidence, NotTrusted, WrongUse

RUNNER = CliRunner()


def _install(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(word: Annotated[str, typer.Argument()] = "") -> None:
        raise error

    def register(app: typer.Typer) -> None:
        app.command()(fail)

    module = ModuleType("cloister.cli.pretend")
    module.register = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cloister.cli.pretend", module)
    monkeypatch.setattr(cli, "COMMANDS", {"ask": ("cloister.cli.pretend", "Pretend.")})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WrongUse("no"), 2),
        (NotTrusted("no"), 3),
        (MalformedEvidence("no"), 4),
        (ConnectionFailed("no"), 5),
        (EngineDied("no"), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, error)
    assert RUNNER.invoke(cli.app, ["ask"]).exit_code == code


def test_an_error_is_shown_with_its_hint_and_nothing_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, NotTrusted("It is not trusted.", hint="Ask the owner."))
    ran = RUNNER.invoke(cli.app, ["ask"])
    assert ran.stdout == ""
    assert ran.stderr == "error: It is not trusted.\nhint: Ask the owner.\n"


@pytest.mark.parametrize("arguments", [["ask", "--nonsense"], ["nonsense"], ["ask", "a", "b"]])
def test_wrong_usage_is_2(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, WrongUse("no"))
    assert RUNNER.invoke(cli.app, arguments).exit_code == 2


def test_a_typing_error_is_met_with_a_suggestion() -> None:
    assert "Did you mean 'verify'?" in RUNNER.invoke(cli.app, ["verfy"]).stderr


def test_version_and_help() -> None:
    assert RUNNER.invoke(cli.app, ["--version"]).stdout == f"cloister {__version__}\n"
    shown = RUNNER.invoke(cli.app, ["--help"]).stdout
    for name, (_, line) in cli.COMMANDS.items():
        assert f"{name} " in shown
        assert line in shown, "the line is too long for a terminal of 80 columns"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", {"ask": ("cloister.cli.pretend", "Pretend.")})

    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")

    monkeypatch.setattr("importlib.import_module", missing)
    ran = RUNNER.invoke(cli.app, ["ask"])
    assert ran.exit_code == 2
    assert "'uvicorn'" in ran.stderr
    assert "cloister[server]" in ran.stderr


def test_help_loads_no_command(tmp_path: object) -> None:
    probe = (
        "import sys, contextlib, io, cloister.cli.main as m\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): m.main(['--help'])\n"
        "print([n for n in ('cloister.client', 'uvicorn', 'huggingface_hub') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("{}[prompt]", "error: cloister did not foresee this: KeyError at "),
        ("raise PermissionError(13, 'Permission denied', '/x\\x1b[2J')", "error: /x[2J: Permission denied.\n"),
    ],
)
def test_an_unforeseen_error_is_a_line_without_values(raised: str, told: str) -> None:
    probe = (
        "import sys, types, cloister.cli.main as m\n"
        f"def fail():\n    prompt = 'my ' + 'secret'\n    {raised}\n"
        "p = types.ModuleType('p'); p.register = lambda app: app.command()(fail); sys.modules['p'] = p\n"
        "m.COMMANDS = {'ask': ('p', 'x')}\n"
        "m.main(['ask'])"
    )
    ran = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith(told)
    assert "my secret" not in ran.stderr
    assert "Traceback" not in ran.stderr
