"""Other people's tools, unchanged, and twice: straight on loopback (`--plaintext`), and through the verifying proxy.

Both ways must see the same. Python's tools run in an environment of their own (requirements/interop.txt), npm's from
web/interop.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.end_to_end.answers import PLACE, same
from tests.end_to_end.proxying import both_ways
from tests.system.shell import ROOT, tool

from cloister.cli.local import LocalEnclave, Plan
from cloister.enclave.llm.api import ROUTES
from cloister.models.download import resolve

pytestmark = pytest.mark.system

BIN = ROOT / ".venv-interop" / "bin"
SCRIPTS = Path(__file__).parent / "interop"
NPM = ROOT / "web" / "interop"


@contextmanager
def started(folder: Path, model: str, **settings: Any) -> Iterator[dict[str, str]]:
    """Addresses of an enclave of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        with LocalEnclave(Plan.make(resolve(model), slots=4, plaintext=True, **settings)) as enclave:
            enclave.start()
            with both_ways(enclave) as addresses:
                yield addresses


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with started(tmp_path_factory.mktemp("state"), "default") as addresses:
        yield addresses


@pytest.fixture
def home(tmp_path: Path) -> Path:
    assert (BIN / "python").exists(), "`make test-system` installs other people's tools in .venv-interop"
    return tmp_path


def run(
    home: Path, *command: object, cwd: Path | None = None, codes: Sequence[int] = (0,), **more: str
) -> "subprocess.CompletedProcess[str]":
    """In a home of its own, with no keys and no settings of this user's."""
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8", **more}
    ran = subprocess.run(
        list(map(str, command)),
        cwd=cwd or home,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode in codes, (command, ran.stdout[-4000:], ran.stderr[-4000:])
    return ran


# npm


def by_node(home: Path, script: str, address: str) -> Any:
    assert (NPM / "node_modules").is_dir(), "npm ci, in web/interop, fetches what the lock names"
    return json.loads(run(home, tool("node"), script, address, cwd=NPM).stdout)


def test_openai_from_npm(home: Path, ways: dict[str, str]) -> None:
    seen = same({way: by_node(home, "openai.mjs", f"{address}/v1") for way, address in ways.items()})
    assert seen["models"] == ["demo"]
    assert seen["whole"] == seen["streamed"] == seen["response"] == seen["afterCancelling"] != ""
    assert 0 < seen["tokens"] == seen["streamedTokens"] <= 24
    PLACE.validate(seen["typed"])
    assert (seen["call"]["reason"], seen["call"]["name"]) == ("tool_calls", "place")
    PLACE.validate(json.loads(seen["call"]["arguments"]))
    assert seen["events"][0] == "response.created"
    assert seen["events"][-1] in ("response.completed", "response.incomplete")
    assert seen["errors"] == [
        {"name": "BadRequestError", "status": 400, "code": "invalid_value", "param": "temperature"},
        {"name": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"},
        {"name": "BadRequestError", "status": 400, "code": "invalid_type", "param": "messages"},
    ]


def test_anthropic_from_npm(home: Path, ways: dict[str, str]) -> None:
    seen = same({way: by_node(home, "anthropic.mjs", address) for way, address in ways.items()})
    assert (seen["models"], seen["retrieved"]) == ([["demo", "model"]], "demo")
    assert seen["whole"] == seen["streamed"] == seen["afterCancelling"] != ""
    assert 0 < seen["tokens"] <= 24
    assert seen["counted"] > 0
    assert seen["stopReason"] in ("end_turn", "max_tokens")
    assert (seen["call"]["reason"], seen["call"]["type"], seen["call"]["name"]) == ("tool_use", "tool_use", "place")
    PLACE.validate(seen["call"]["input"])
    assert seen["errors"] == [
        {"name": "BadRequestError", "status": 400, "type": "invalid_request_error"},
        {"name": "NotFoundError", "status": 404, "type": "not_found_error"},
        {"name": "BadRequestError", "status": 400, "type": "invalid_request_error"},
    ]


# LangChain

UNREAD = "langchain_core.exceptions.OutputParserException:"
# A call that is valid, but a toy does not find out what to fill in.
_CALL = re.compile(r"AssertionError: assert \{'input': -?\d+\} == \{'input': 3\}\n")
CANNOT = {
    "test_tool_calling[model0]": _CALL,
    "test_tool_calling[model1]": _CALL,
    "test_tool_calling_async": _CALL,
    "test_unicode_tool_call_integration": re.compile(
        r"AssertionError: Unicode characters not found in: [^\\\n]*\nassert "
    ),
    # JSON, but a toy does not find out from the prompt which names it must have.
    "test_json_mode": re.compile(
        re.escape(UNREAD) + r" Failed to parse Joke from completion \{.*\}\. "
        r"Got: [12] validation errors? for Joke\n(?:setup|punchline)\n  Field required \[type=missing, "
    ),
}
"""Tests of the suite that fail with this model, each by comparing contents: how what pytest says of it begins. What is no
JSON, of another type, or an error of the server's, begins otherwise."""

NOT_CLAIMED = {
    "test_anthropic_inputs": "Anthropic's parts in OpenAI's dialect",
    "test_audio_inputs": "text only",
    "test_image_inputs": "text only",
    "test_image_tool_message": "text only",
    "test_pdf_inputs": "text only",
    "test_pdf_tool_message": "text only",
    "test_stream_time": "compares with recorded traffic of a vendor's",
}
"""Tests that the suite leaves out, by what nobody claims; beside those for choosing another model in a call."""


def outcomes(report: Path) -> dict[str, str]:
    """Test -> passed, skipped, or what failed, from pytest's JUnit report."""
    return {case.attrib["name"]: outcome(case) for case in ElementTree.parse(report).iter("testcase")}


def outcome(case: ElementTree.Element) -> str:
    failed = [child.attrib["message"] for child in case if child.tag in ("failure", "error")]
    return "\n".join(failed) or ("passed" if case.find("skipped") is None else "skipped")


def suite(home: Path, address: str) -> dict[str, str]:
    report = home / "report.xml"
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "-c",
        home / "none.ini",
        "--rootdir",
        home,
        f"--junitxml={report}",
    ]
    loops = [f"asyncio_default_{what}_loop_scope = session" for what in ("test", "fixture")]
    (home / "none.ini").write_text("\n".join(["[pytest]", "asyncio_mode = auto", *loops]))
    run(
        home,
        *(BIN / "python", "-m", "pytest", *options, SCRIPTS / "langchain_suite.py"),
        codes=(0, 1),
        CLOISTER_BASE_URL=f"{address}/v1",
    )
    return outcomes(report)


def test_langchains_standard_suite(home: Path, ways: dict[str, str]) -> None:
    seen = same({way: suite(home, address) for way, address in ways.items()})
    failed = {name: said for name, said in seen.items() if said not in ("passed", "skipped")}
    assert failed.keys() == CANNOT.keys(), failed
    for name, reason in CANNOT.items():
        assert reason.match(failed[name]), (name, failed[name])
    skipped = {name for name, said in seen.items() if said == "skipped" and "model_override" not in name}
    assert skipped == set(NOT_CLAIMED)
    assert sum(said == "passed" for said in seen.values()) > 20


@pytest.mark.parametrize("name", CANNOT)
@pytest.mark.parametrize(
    "said",
    [
        "openai.InternalServerError: Error code: 500 - {'error': {'message': 'The engine stopped.'}}",
        "AssertionError: assert {'input': '3'} == {'input': 3}\n  \n  Differing items:",
        "AssertionError: assert {} == {'input': 3}\n  \n  Right contains 1 more item:",
        "assert 0 == 1\n +  where 0 = len([])",
        "AssertionError: Unicode characters not found in: \\u4f60\nassert ('x' in 'y')",
        f"{UNREAD} Invalid json output: {{\n",
        f"{UNREAD} Failed to parse Joke from completion {{}}. Got: 1 validation error for Joke\nsetup\n  Input should be a",
    ],
)
def test_no_other_failure_of_the_suite_is_excused(name: str, said: str) -> None:
    assert CANNOT[name].match(said) is None


# LiteLLM and llm


def test_litellm(home: Path, ways: dict[str, str]) -> None:
    command = [BIN / "python", SCRIPTS / "litellm_tool.py", *ways.values()]
    told = run(home, *command, LITELLM_LOCAL_MODEL_COST_MAP="True").stdout.splitlines()[-1]
    seen = same(dict(zip(ways, json.loads(told), strict=True)))
    PLACE.validate(seen["typed"])
    for dialect in ("openai", "anthropic"):
        one = seen[dialect]
        assert one["whole"] == one["streamed"] != ""
        assert 0 < one["tokens"] <= 24
        assert one["call"][:2] == ["tool_calls", "place"]
        PLACE.validate(one["call"][2])
        assert one["errors"] == ["NotFoundError", "BadRequestError"]


def test_llm(home: Path, ways: dict[str, str]) -> None:
    seen = same({way: by_llm(home / way, f"{address}/v1") for way, address in ways.items()})
    assert seen["streamed"] == seen["whole"] != ""
    PLACE.validate(json.loads(seen["typed"]))
    assert "temperature" in seen["error"]


def by_llm(home: Path, base: str) -> dict[str, str]:
    home.mkdir()
    model = {"model_id": "cloister", "model_name": "default", "api_base": base, "supports_schema": True}
    (home / "extra-openai-models.yaml").write_text(json.dumps([model]))  # YAML takes JSON
    (home / "schema.json").write_text(json.dumps(PLACE.schema))

    def llm(*words: str, **more: Any) -> "subprocess.CompletedProcess[str]":
        cold = ("-o", "temperature", "0", "-o", "max_tokens", "200")
        return run(home, BIN / "llm", "-m", "cloister", *cold, *words, LLM_USER_PATH=str(home), **more)

    question = "What does attestation prove?"
    return {
        "streamed": llm(question).stdout,
        "whole": llm(question, "--no-stream").stdout,
        "typed": llm(question, "--schema", "schema.json").stdout,
        "error": llm(question, "-o", "temperature", "3", codes=(1,)).stderr,
    }


# Schemathesis


CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
# To a POST whose body is no JSON the proxy says 415, before it knows whether there is anything to post to.
ONLY = {"plaintext": ("unsupported_method",), "proxy": ()}


@pytest.fixture(scope="module")
def quick_ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of an enclave that answers as quickly as can be."""
    with started(tmp_path_factory.mktemp("state"), "tiny", context_length=256) as addresses:
        yield addresses


@pytest.mark.parametrize("way", ["plaintext", "proxy"])
def test_schemathesis_finds_no_fault(home: Path, quick_ways: dict[str, str], way: str) -> None:
    url = quick_ways[way]
    options = ["--max-examples=5", "--seed=1", "--phases=examples,coverage,fuzzing", "--request-timeout=30"]
    command = [
        BIN / "schemathesis",
        "run",
        f"{url}/v1/openapi.json",
        "--url",
        url,
        f"--checks={','.join(CHECKS + ONLY[way])}",
    ]
    ran = run(home, *command, *options, codes=(0, 1))
    assert (ran.returncode, "Failures" in ran.stdout) == (0, False), ran.stdout[-8000:]
    (tested,) = re.findall(r"Tested: (\d+)", ran.stdout)
    assert int(tested) == len(ROUTES) - 1  # it leaves out the document itself
