"""Every recipe of docs/clients.md runs as it is shown (ports apart), against a simulated enclave."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from tests.system.shell import ROOT, Shell, free_port, tool

pytestmark = pytest.mark.system

TEXT = (ROOT / "docs" / "clients.md").read_text()
INTEROP = ROOT / ".venv-interop" / "bin"
NODE_MODULES = ROOT / "web" / "interop" / "node_modules"
_FENCE = re.compile(r"^```(python|bash|javascript|json|yaml|ini)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SETTINGS = ("json", "yaml", "ini")
"""Of programs that do not run here: what they would ask with these is asked."""
RECIPES = [(title, *fence) for title, section in _SECTION.findall(TEXT) for fence in _FENCE.findall(section)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "node_modules").symlink_to(NODE_MODULES)
    return folder


@pytest.fixture(scope="module")
def port(home: Path) -> Iterator[str]:
    """The proxy's, started as the document says."""
    (connect,) = re.findall(r"^\$ (cloister connect .*)$", TEXT, re.MULTILINE)
    serve, port = str(free_port()), str(free_port())
    shell = Shell(home)
    with (
        shell.background(f"cloister serve --platform sim --port {serve}"),
        shell.background(connect.replace("8484", serve).replace("8485", port)),
    ):
        yield port


def test_every_block_is_a_recipe() -> None:
    assert len(RECIPES) == len(re.findall(r"^```\w", TEXT, re.MULTILINE)) - TEXT.count("```console")


@pytest.mark.parametrize(
    ("title", "kind", "recipe"), [one for one in RECIPES if one[1] not in SETTINGS], ids=lambda value: value[:30]
)
def test_the_recipe_works(home: Path, port: str, title: str, kind: str, recipe: str) -> None:
    tool("curl")
    suffix = "mjs" if kind == "javascript" else kind
    program = home / f"recipe.{suffix}"
    program.write_text(recipe.replace("8485", port))
    done = Shell(home).run(f"PATH=$PATH:{INTEROP}; {interpreter(kind, recipe)} {program.name}")
    assert done.returncode == 0, (title, done.stdout, done.stderr)
    assert len(done.stdout.strip()) > 8, (title, done.stdout)


def interpreter(kind: str, recipe: str) -> str:
    """Python's is this environment's, or the foreign tools' for a package that only they have."""
    if kind == "javascript":
        return tool("node")
    packages = re.findall(r"^(?:from|import) (\w+)", recipe, re.MULTILINE)
    if kind == "python" and any(importlib.util.find_spec(name) is None for name in packages):
        return str(INTEROP / "python")
    return kind


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


def test_open_webuis_settings_lead_to_models_and_answers(port: str) -> None:
    """It lists the models and asks for one of them by the name that stands there."""
    given = dict(line.split("=", 1) for line in settings("ini").splitlines())
    question = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 16}
    models, answer = ask(given["OPENAI_API_BASE_URL"].replace("8485", port), given["OPENAI_API_KEY"], question)
    assert [one["object"] for one in models] == ["model"]
    assert answer


def test_continues_settings_lead_to_answers(port: str) -> None:
    (model,) = yaml.safe_load(settings("yaml"))["models"]
    assert (model["provider"], set(model["roles"])) == ("openai", {"chat", "edit", "apply"})
    question = {
        "model": model["model"],
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}],
        "max_tokens": 16,
    }
    _, answer = ask(model["apiBase"].replace("8485", port), model["apiKey"], question)
    assert answer


def test_an_editors_settings_name_an_address_and_a_model_that_answer(port: str) -> None:
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
        url = provider["api_url"].replace("8485", port)
        lines = client.post(f"{url}/chat/completions", json=asked, headers={"authorization": "Bearer none"}).text
        (described,) = client.get(f"{url}/models").json()["data"]
    events = [json.loads(line[6:]) for line in lines.splitlines() if line.startswith("data: {")]
    assert "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    assert events[-1]["usage"]["completion_tokens"] > 0
    assert model["max_tokens"] == described["context_length"]
