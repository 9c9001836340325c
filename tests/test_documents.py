"""What the documents say is held against the code: links, commands, examples, error codes, the tests that they name."""

import ast
import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import cloister
from cloister.channel.bhttp import Request, encode_content, encode_request, encode_response_end, encode_response_head
from cloister.channel.freshness import DATE_TOLERANCE
from cloister.channel.hpke import AEAD_AES_256_GCM, KEM_X25519, X25519Key, expand, extract, setup_sender
from cloister.channel.keys import KeyConfig, encode_configs, replica_of
from cloister.channel.limits import DEFAULT_LIMITS, MAX_CHUNK
from cloister.channel.ohttp import RESPONSE_LABEL, ResponseSealer, request_info, response_sequence, seal_to
from cloister.cli.main import app
from cloister.enclave.boot import EnclaveConfig
from cloister.enclave.gateway import problems
from cloister.errors import CloisterError
from cloister.evidence.binding import report_data
from cloister.evidence.launch import App, LaunchConfig, launch_digest, parse_launch
from cloister.evidence.simulated import SimBody, combined_measurement
from cloister.evidence.statement import (
    INSECURE_NAMES,
    EngineStatement,
    ModelStatement,
    Statement,
    parse_statement,
)
from cloister.verify import parse_policy

ROOT = Path(__file__).parents[1]
PACKAGE = Path(cloister.__file__).parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROTOCOL = ROOT / "docs" / "protocol.md"
THREATS = ROOT / "docs" / "threat-model.md"

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def fences(path: Path, info: str) -> list[str]:
    return [body for kind, body in _FENCE.findall(path.read_text()) if kind == info]


def only_fence(info: str) -> str:
    (body,) = fences(PROTOCOL, info)
    return body


def prose(path: Path) -> str:
    return _FENCE.sub("", path.read_text())


def section(path: Path, title: str) -> str:
    """From a heading to the next of its level or above."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,6}} |\Z)", path.read_text(), re.MULTILINE | re.DOTALL)
    assert match is not None, title
    return match[2]


def anchors(path: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Links


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for link in _LINK.findall(prose(path)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name} -> {link}"
        assert not anchor or anchor in anchors(target), f"{path.name} -> {link}"


def test_every_screenshot_is_linked_from_a_document() -> None:
    shown = {(path.parent / link).resolve() for path in DOCUMENTS for link in _LINK.findall(prose(path))}
    drawn = {path.resolve() for path in (ROOT / "docs" / "images").glob("*.png")}
    assert drawn
    assert drawn - shown == set()


# Commands


def commands(program: str) -> Iterator[tuple[str, list[str]]]:
    for path in DOCUMENTS:
        for block in fences(path, "console"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ ").partition(" > ")[0], comments=True)
                if line.startswith("$ ") and words and words[0] == program:
                    yield path.name, words[1:]


@pytest.mark.parametrize(("where", "arguments"), list(commands("cloister")), ids=lambda value: str(value)[:60])
def test_commands_parse(where: str, arguments: list[str]) -> None:
    """Every command, option and argument is one; nothing runs."""
    command: Any = get_command(app)
    context = command.make_context("cloister", list(arguments))
    while hasattr(command, "resolve_command") and (words := [*context._protected_args, *context.args]):
        name, command, rest = command.resolve_command(context, words)
        assert command is not None, where
        context = command.make_context(name, list(rest), parent=context)


def test_there_are_commands_to_check() -> None:
    assert len(list(commands("cloister"))) > 5


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {arguments[0] for _, arguments in commands("make")}
    for path in DOCUMENTS:
        named |= set(re.findall(r"`make ([a-z][a-z-]*)", prose(path)))
    assert named
    assert named <= targets


@pytest.mark.parametrize("block", fences(ROOT / "README.md", "python"))
def test_python_in_the_readme_compiles_and_imports_what_there_is(block: str) -> None:
    tree = ast.parse(block)
    compile(tree, "README.md", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cloister"):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


# The threat model


def defined_tests(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_test_that_the_threat_model_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", THREATS.read_text())
    assert len(named) > 50
    missing = [f"{path}::{name}" for path, name in named if name not in defined_by(path)]
    assert missing == []


@cache
def defined_by(path: str) -> frozenset[str]:
    return frozenset(defined_tests(ROOT / path)) if (ROOT / path).is_file() else frozenset()


def test_every_row_of_the_threat_model_names_a_test() -> None:
    tables = section(THREATS, "On the way") + section(THREATS, "On trust")
    tables += section(THREATS, "Inside, and between tenants") + section(THREATS, "On the person's machine")
    rows = [
        line for line in tables.splitlines() if line.startswith("| ") and not line.startswith(("| attack", "| ---"))
    ]
    assert [row for row in rows if "::test_" not in row] == []


def test_the_threat_model_names_every_attack_of_the_demo() -> None:
    module = ast.parse((PACKAGE / "cli" / "demo.py").read_text())
    (table,) = (
        node.value
        for node in module.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "ATTACKS"
    )
    assert isinstance(table, ast.Tuple)
    played = {ast.literal_eval(entry.elts[0]) for entry in table.elts if isinstance(entry, ast.Tuple)}
    assert played == set(re.findall(r'^\| "([^"]+)" \|', THREATS.read_text(), re.MULTILINE))


# The protocol: names and numbers


def first_column(title: str) -> set[str]:
    cells = re.findall(r"^\| ([^|]+) \|", section(PROTOCOL, title), re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_statement_and_launch_are_described_member_by_member() -> None:
    assert first_column("Statement") == {"v", *(field.name for field in dataclasses.fields(Statement))}
    assert first_column("Launch config") == {"v", *(field.name for field in dataclasses.fields(LaunchConfig))}
    config = re.search(r"sorted keys ([^|]+) \|", section(PROTOCOL, "Launch config"))
    assert config is not None
    assert re.findall(r"`(\w+)`", config[1]) == sorted(field.name for field in dataclasses.fields(EnclaveConfig))


def test_weakened_settings_are_those_of_the_code() -> None:
    (row,) = re.findall(r"^\| `insecure` \|(.+)", section(PROTOCOL, "Statement"), re.MULTILINE)
    assert set(re.findall(r"`([a-z-]+)`", row)) == INSECURE_NAMES


def test_problems_are_those_of_the_gateway() -> None:
    rows = re.findall(r"^\| (\d{3}) \| `([^`]+)`", section(PROTOCOL, "Errors"), re.MULTILINE)
    told = {(int(status), kind) for status, kind in rows if "/" in kind or kind == "about:blank"}
    made = [value for value in vars(problems).values() if isinstance(value, problems.Problem)]
    assert told == {(problem.status, problem.type) for problem in made}
    assert problems.DATE_TYPE in PROTOCOL.read_text()


def test_error_codes_are_those_of_the_api_and_the_proxy() -> None:
    words = set(re.findall(r"`([a-z]+(?:_[a-z]+)*)`", section(PROTOCOL, "Errors")))
    made = api_codes() | proxy_codes()
    assert made <= words
    not_codes = {"code", "type", "limit", "prompt_tokens", "requested_tokens", "progress", "proxy_error"}
    assert words - made - not_codes == set()


def api_codes() -> set[str]:
    """The second word of every `Refused` and `Problem`, and the last of every `refuse`, in the API's modules."""
    found: set[object] = {"invalid_value"}  # what `refuse` says when it is not told otherwise
    for path in (PACKAGE / "enclave" / "llm").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                at = {"Refused": 1, "Problem": 1, "refuse": 2}.get(node.func.id, len(node.args))
                found |= {a.value for a in node.args[at : at + 1] if isinstance(a, ast.Constant)}
    return {code for code in found if isinstance(code, str) and re.fullmatch(r"[a-z_]+", code)}


def proxy_codes() -> set[str]:
    """Of the proxy's table of errors (class, status, code) and of its refusals."""
    found: set[object] = set()
    for name in ("app", "dialect", "guard", "upstreams"):
        for node in ast.walk(ast.parse((PACKAGE / "proxy" / f"{name}.py").read_text())):
            if isinstance(node, ast.Tuple) and len(node.elts) == 3 and _is_number(node.elts[1]):
                found.add(ast.literal_eval(node.elts[2]))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refusal":
                found.add(ast.literal_eval(node.args[1]))
    return {code for code in found if isinstance(code, str)}


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def test_errors_that_a_client_raises_exist() -> None:
    raised = set(re.findall(r"`([A-Z][A-Za-z]+)`", section(PROTOCOL, "Errors")))
    known = {name for name, value in vars(cloister.errors).items() if isinstance(value, type)}
    assert raised - known == set()
    assert issubclass(cloister.errors.TruncatedResponse, CloisterError)


def test_limits_are_those_of_the_code() -> None:
    text = PROTOCOL.read_text()
    assert f"at most {MAX_CHUNK:,} bytes of plaintext" in text
    assert f"At most {DEFAULT_LIMITS.request_bytes >> 20} MiB of plaintext" in text
    assert f"{DEFAULT_LIMITS.header_section_bytes >> 10} KiB each for control data" in text
    assert f"at most {DEFAULT_LIMITS.unauthenticated_bytes >> 20} MiB for all requests" in text
    assert f"waits {DEFAULT_LIMITS.open_seconds:.0f} s for one" in text
    assert f"within {DATE_TOLERANCE:.0f} s of the enclave's clock" in text


def test_the_policy_parses() -> None:
    policy = parse_policy(only_fence("toml"), read=lambda name: name.encode())
    assert policy.simulator_root == b"sim-root.pem"
    assert policy.tolerate_insecure == {"api-keys-off"}


# The worked example, computed by the code with fixed keys: what another implementation must get

RECEIVER_KEY = bytes(range(0x20, 0x40))
EPHEMERAL_KEY = bytes(range(0x40, 0x60))
CLIENT_NONCE = bytes(range(32))
RESPONSE_NONCE = bytes(range(0x60, 0x80))
HEADER = bytes.fromhex("01002000010002")
COMPONENTS = {
    "code": f"sha256:{'11' * 32}",
    "interpreter": f"cpython 3.11.2 sha256:{'22' * 32}",
    "engine": f"sha256:{'33' * 32}",
}
LAUNCH = LaunchConfig(
    owner_key="ed25519:" + "A" * 43,
    deployment="example",
    release=1,
    app=App("llm", "11" * 32),
    models=("44" * 32,),
    config_sha256="55" * 32,
).encode()
KEYS = encode_configs([KeyConfig(1, KEM_X25519, X25519Key(RECEIVER_KEY).public, ((1, 2), (1, 1), (1, 3)))])
STATEMENT = Statement(
    purpose="serve",
    aud=(),
    launch_sha256=launch_digest(LAUNCH).hex(),
    iat=1_795_489_200,
    exp=1_795_492_800,
    ohttp_keys=KEYS,
    receipt_key=bytes(32),
    engine=EngineStatement("33" * 32, "native"),
    models=(ModelStatement("default", "44" * 32, "Q8_0"),),
    insecure=("api-keys-off",),
).encode()
REQUEST = Request(
    "POST",
    "https",
    "enclave.invalid",
    "/v1/chat/completions",
    ((b"content-type", b"application/json"), (b"date", b"Tue, 24 Nov 2026 03:00:00 GMT")),
    b'{"messages":[{"role":"user","content":"Hi"}]}',
)
RESPONSE_HEADERS = ((b"content-type", b"application/json"),)
RESPONSE_BODY = b'{"choices":[]}'


def worked_example() -> dict[str, bytes]:
    """Every value by its name in the document, in the document's order."""
    bound = report_data(CLIENT_NONCE, STATEMENT)
    measurement = combined_measurement(COMPONENTS)
    public = X25519Key(RECEIVER_KEY).public
    enc, context = setup_sender(
        KEM_X25519, AEAD_AES_256_GCM, public, request_info(HEADER), entropy=lambda _: EPHEMERAL_KEY
    )
    secret = context.export(RESPONSE_LABEL, 32)
    prk = extract(enc + RESPONSE_NONCE, secret)
    sealer = ResponseSealer(RESPONSE_NONCE, response_sequence(context, enc, RESPONSE_NONCE))
    response = sealer.start(200, RESPONSE_HEADERS, stream=True) + sealer.data(RESPONSE_BODY) + sealer.finish(pad=False)
    return {
        "receiver_private_key": RECEIVER_KEY,
        "ohttp_keys": KEYS,
        "cloister_replica": bytes.fromhex(replica_of(KEYS)),
        "client_nonce": CLIENT_NONCE,
        "launch_sha256": launch_digest(LAUNCH),
        "report_data": bound,
        "sim_measurement": measurement,
        "sim_body": SimBody(bound, launch_digest(LAUNCH), COMPONENTS, measurement).encode(),
        "ephemeral_private_key": EPHEMERAL_KEY,
        "header": HEADER,
        "enc": enc,
        "info": request_info(HEADER),
        "request_message": encode_request(REQUEST).rstrip(b"\0") + b"\0",
        "request_body": seal_to(KEYS, REQUEST, entropy=lambda _: EPHEMERAL_KEY).body,
        "response_nonce": RESPONSE_NONCE,
        "response_secret": secret,
        "response_prk": prk,
        "response_key": expand(prk, b"key", 32),
        "response_base_nonce": expand(prk, b"nonce", 12),
        "response_chunk_0": encode_response_head(200, RESPONSE_HEADERS),
        "response_chunk_1": encode_content(RESPONSE_BODY),
        "response_final": encode_response_end(),
        "response_body": response,
    }


def test_the_worked_example_is_what_the_code_computes() -> None:
    pairs = re.findall(r"^(\w+) =((?:\s+[0-9a-f]+)+)$", only_fence("worked-example"), re.MULTILINE)
    told = {name: bytes.fromhex(digits) for name, digits in pairs}
    assert told == worked_example()
    assert list(told) == list(worked_example())


def test_the_worked_examples_json_is_what_is_hashed() -> None:
    launch, statement = (only_fence(f"json {name}").strip().encode() for name in ("launch", "statement"))
    assert (launch, statement) == (LAUNCH, STATEMENT)
    assert parse_launch(launch).encode() == launch
    assert parse_statement(statement).launch_sha256 == worked_example()["launch_sha256"].hex()


def test_the_worked_examples_padding_is_as_told() -> None:
    assert encode_request(REQUEST) == worked_example()["request_message"].ljust(1024, b"\0")
