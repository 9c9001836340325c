"""From nothing to an answer with each template that has requirements, as its owner types it: one host for both, and the
wheels from the package registry, by the hashes that the template locks."""

import json
import shlex
from collections.abc import Iterator

import pytest
from tests.end_to_end.hosting import Host, running, told_of

pytestmark = pytest.mark.system

ANSWERS = {
    "flask": ("Hello, you!", "0\n1\n2\n3\n4\n"),
    "fastapi": (json.dumps({"greeting": "Hello, you!"}, separators=(",", ":")), "data: 4\n\n"),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with running(tmp_path_factory.mktemp("home")) as one:
        yield one


@pytest.mark.parametrize("template", ANSWERS)
def test_a_template_is_written_tested_deployed_and_answers(host: Host, template: str) -> None:
    greeting, last = ANSWERS[template]
    name = f"my-{template}"
    host.do(f"cloister init {name} --template {template}")
    tested = host.do(f"cloister test {name}")
    assert tested.stdout == f"{name}: passed\n"
    assert "/?name=you ->" in tested.stderr  # its own check asked it
    told = told_of(host.do(f"cloister deploy {name} --platform sim --json"))
    assert told["verification"]["deployment"] == name
    words = shlex.split(told["try"])
    address = shlex.join([told["url"]])
    policy = shlex.join(["--policy", words[words.index("--policy") + 1]])
    assert host.do(f"cloister fetch {address} '/?name=you' {policy}").stdout == greeting
    assert last in host.do(f"cloister fetch {address} /count {policy}").stdout  # events are padded
