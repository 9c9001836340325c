"""Every recipe of docs/clients.md runs as it is shown (ports apart), against a simulated enclave.

The enclave takes EHBP too, for that recipe's sake; so the policy of all others, in the environment, tolerates it.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import httpx2
import pytest
import yaml
from tests.system.shell import ROOT, Shell, free_port, tool

from cloister.cli.commands import COMPLETIONS

pytestmark = pytest.mark.system

TEXT = (ROOT / "docs" / "clients.md").read_text()
INTEROP = ROOT / ".venv-interop" / "bin"
NODE_MODULES = ROOT / "web" / "interop" / "node_modules"
_FENCE = re.compile(r"^```(python|bash|javascript|json|yaml|ini)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SETTINGS = ("json", "yaml", "ini")
"""Of programs that do not run here: what they would ask with these is asked."""
RECIPES = [(title, *fence) for title, section in _SECTION.findall(TEXT) for fence in _FENCE.findall(section)]
RUNNING = [one for one in RECIPES if one[1] not in SETTINGS]
POLICY = """\
version = 1
dangerously_tolerate_insecure = ['ehbp']
"""
Here: TypeAlias = Callable[[str], str]
"""Writes the ports of these tests into what the document says."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "node_modules").symlink_to(NODE_MODULES)
    return folder


@pytest.fixture(scope="module")
def here(home: Path) -> Iterator[Here]:
    """An enclave, and the proxy as the document starts it first."""
    connect, *_ = re.findall(r"^\$ (cloister connect .*)$", TEXT, re.MULTILINE)
    ports = {"8484": str(free_port()), "8485": str(free_port())}
    (home / "policy.toml").write_text(POLICY)
    shell = Shell(home)

    def written(text: str) -> str:
        return re.sub("8484|8485", lambda found: ports[found[0]], text)

    with (
        shell.background(written("cloister serve --platform sim --ehbp --port 8484")),
        shell.background(written(f"env CLOISTER_POLICY=policy.toml {connect}")),
    ):
        yield written


def test_every_block_is_a_recipe() -> None:
    assert len(RECIPES) == len(re.findall(r"^```\w", TEXT, re.MULTILINE)) - TEXT.count("```console")


@pytest.mark.parametrize("title", dict.fromkeys(title for title, _, _ in RUNNING))
def test_the_recipes_of_a_section_work_one_after_the_other(home: Path, here: Here, title: str) -> None:
    tool("curl")
    for kind, recipe in [(kind, recipe) for where, kind, recipe in RUNNING if where == title]:
        suffix = "mjs" if kind == "javascript" else kind
        program = home / f"recipe.{suffix}"
        program.write_text(here(recipe))
        with_policy = f"export CLOISTER_POLICY=policy.toml PATH=$PATH:{INTEROP}"
        done = Shell(home).run(f"{with_policy}; {interpreter(kind, recipe)} {program.name}")
        assert done.returncode == 0, (recipe, done.stdout, done.stderr)
        assert len(done.stdout.strip()) > 8, (recipe, done.stdout)


def test_every_command_of_the_terminal_chat_is_told() -> None:
    told = set(re.findall(r"`(/[a-z?]+)", TEXT.partition("## The terminal chat")[2].partition("\n## ")[0]))
    assert told == COMPLETIONS.keys()


def interpreter(kind: str, recipe: str) -> str:
    """Python's is this environment's, or the foreign tools' for a package that only they have."""
    if kind == "javascript":
        return tool("node")
    packages = re.findall(r"^(?:from|import) (\w+)", recipe, re.MULTILINE)
    if kind == "python" and any(importlib.util.find_spec(name) is None for name in packages):
        return str(INTEROP / "python")
    return "bash -e" if kind == "bash" else kind


def settings(kind: str) -> str:
    (text,) = [str(recipe) for _, found, recipe in RECIPES if found == kind]
    return text


def ask(url: str, key: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The models that are there, and what was answered."""
    headers = {"authorization": f"Bearer {key}"}
    with httpx2.Client(timeout=60, trust_env=False, headers=headers) as client:
        models = client.get(f"{url}/models").json()["data"]
        lines = client.post(f"{url}/chat/completions", json={"model": models[0]["id"], **body, "stream": True}).text
    events = [json.loads(line[6:]) for line in lines.splitlines() if line.startswith("data: {")]
    return models, "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def test_open_webuis_settings_lead_to_models_and_answers(here: Here) -> None:
    """It lists the models and asks for one of them by the name that stands there."""
    given = dict(line.split("=", 1) for line in settings("ini").splitlines())
    question = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 16}
    models, answer = ask(here(given["OPENAI_API_BASE_URL"]), given["OPENAI_API_KEY"], question)
    assert [one["object"] for one in models] == ["model"]
    assert answer


def test_continues_settings_lead_to_answers(here: Here) -> None:
    (model,) = yaml.safe_load(settings("yaml"))["models"]
    assert (model["provider"], set(model["roles"])) == ("openai", {"chat", "edit", "apply"})
    question = {
        "model": model["model"],
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}],
        "max_tokens": 16,
    }
    _, answer = ask(here(model["apiBase"]), model["apiKey"], question)
    assert answer


def test_an_editors_settings_name_an_address_and_a_model_that_answer(here: Here) -> None:
    """As Zed asks: streamed, with the usage at its end. Zed itself does not run here."""
    given = json.loads(settings("json"))
    chosen = given["agent"]["default_model"]
    provider = given["language_models"]["openai_compatible"][chosen["provider"]]
    (model,) = provider["available_models"]
    assert model["name"] == chosen["model"]
    asked = {
        "model": model["name"],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}],
        "max_completion_tokens": 64,
        "stream": True,
        "stream_options": {"include_usage": True},
        "stop": [],
        "temperature": 1.0,
        "tools": [],
    }
    with httpx2.Client(timeout=60, trust_env=False) as client:
        url = here(provider["api_url"])
        lines = client.post(f"{url}/chat/completions", json=asked, headers={"authorization": "Bearer none"}).text
        (described,) = client.get(f"{url}/models").json()["data"]
    events = [json.loads(line[6:]) for line in lines.splitlines() if line.startswith("data: {")]
    assert "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    assert events[-1]["usage"]["completion_tokens"] > 0
    assert model["max_tokens"] == described["context_length"]
