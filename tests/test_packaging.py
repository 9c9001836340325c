"""The container's recipe: locked like the rest, and made of files that are there."""

import re
import shlex
from pathlib import Path

from typer.main import get_command

from cloister.cli.main import app

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "packaging" / "container" / "Containerfile"
_PIN = re.compile(r"^([a-z0-9-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)


def pins(path: Path) -> dict[str, tuple[str, frozenset[str]]]:
    """Name -> version and hashes."""
    return {name: (version, frozenset(hashes.split())) for name, version, hashes in _PIN.findall(path.read_text())}


def instructions() -> list[list[str]]:
    text = re.sub(r"^#.*\n", "", RECIPE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line]


def test_the_container_installs_what_is_tested_here_and_nothing_unlocked() -> None:
    ours, tested = pins(RECIPE.with_name("requirements.txt")), pins(ROOT / "requirements" / "dev.txt")
    assert {name: tested.get(name) for name in ours} == ours
    client = pins(ROOT / "requirements" / "client.txt")
    assert ours.keys() == client.keys() | {"starlette", "uvicorn", "click", "setuptools"}, (
        "client, proxy, and the build"
    )
    installs = [words for words in instructions() if words[0] == "RUN" and "install" in words]
    assert len(installs) == 2
    assert all("--no-deps" in words for words in installs)
    assert all("--require-hashes" in words or "--no-index" in words for words in installs)


def test_the_recipes_files_are_there() -> None:
    copied = [words for words in instructions() if words[0] == "COPY" and not words[1].startswith("--from")]
    assert len(copied) == 3
    for words in copied:
        for name in words[1:-1]:
            assert (ROOT / name).exists(), name


def test_it_runs_the_proxy_as_nobody_in_particular() -> None:
    last = instructions()[-5:]
    assert ["USER", "65532:65532"] in last
    (entry,) = [words for words in last if words[0] == "ENTRYPOINT"]
    program, command = "".join(entry[1:]).strip("[]").split(",")
    assert (Path(program).name, command) == ("cloister", "connect")
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert command in commands
