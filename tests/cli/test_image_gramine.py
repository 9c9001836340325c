"""`cloister image gramine`: what is built, from which settings, and what is said of it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import cloister
from cloister.cli import image_gramine
from cloister.cli.image_gramine import Image, boot_lines, build, gramine_command
from cloister.cli.local import file_digest
from cloister.deploy.gramine import Gramine
from cloister.deploy.gramine_sign import Signed
from cloister.enclave.boot import EnclaveConfig, parse_boot, parse_config
from cloister.errors import CloisterError, WrongUse
from cloister.evidence.launch import App, LaunchConfig, launch_digest, parse_launch
from cloister.models.store import embedded_path
from cloister.verify import parse_policy

GRAMINE = Gramine("/usr/lib/gramine/libsysdb.so", "/usr/lib/gramine/runtime/glibc")
CONFIG = EnclaveConfig(platform="sgx", api_keys=False, engine="thread", context_length=512)
TINY = embedded_path("tiny")


def launch_of(config: EnclaveConfig = CONFIG, model: str = "") -> bytes:
    return LaunchConfig(
        owner_key="ed25519:" + "A" * 43,
        deployment="one",
        release=1,
        app=App("llm", "ab" * 32),
        models=(model or file_digest(TINY),),
        config_sha256=config.digest().hex(),
    ).encode()


def image(config: EnclaveConfig = CONFIG, **more: Any) -> Image:
    return Image(**{"launch": launch_of(config), "config": config.encode(), "model": TINY, **more})


def few_files(code: Mapping[str, Path], _engine: Path, model: Path) -> dict[str, Path]:
    """In the place of all that an enclave opens, which the tests of its start have."""
    return {"/app/cloister/__init__.py": code["cloister/__init__.py"], "/model.gguf": model}


@pytest.fixture(autouse=True)
def _few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_gramine, "collect", few_files)
    monkeypatch.setattr(image_gramine, "code_files", lambda: {"cloister/__init__.py": Path(cloister.__file__)})


def test_the_same_image_comes_out_twice(tmp_path: Path) -> None:
    folders = [tmp_path / "here", tmp_path / "elsewhere"]
    assert [build(folder, image(), GRAMINE) for folder in folders] == [3, 3]
    first, second = (folder / "cloister.manifest" for folder in folders)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("what", "named"),
    [
        (image(EnclaveConfig(platform="tdx", engine="thread")), "not for an enclave of SGX"),
        (image(EnclaveConfig(platform="sgx")), "not for an enclave of SGX"),
        (image(EnclaveConfig(platform="sgx", engine="thread", upstream="http://127.0.0.1:1")), "not for an enclave"),
        (image(launch=launch_of(EnclaveConfig(platform="sgx"))), "not the one that the launch config names"),
        (image(size=1 << 30), "less memory"),
        (image(most=1 << 30), "less memory"),
        (image(launch=launch_of(model="cd" * 32)), "another model"),
    ],
)
def test_what_makes_no_enclave_is_refused(tmp_path: Path, what: Image, named: str) -> None:
    with pytest.raises(WrongUse, match=named):
        build(tmp_path / "image", what, GRAMINE)
    assert not (tmp_path / "image" / "cloister.manifest").exists()


def test_a_folder_that_is_in_use_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with pytest.raises(WrongUse, match="laid out"):
        build(tmp_path, image(), GRAMINE)
    assert [path.name for path in tmp_path.rglob("*")] == ["root"]


def test_the_enclave_is_told_where_its_files_lie() -> None:
    place, _, boot = boot_lines(image(), "tiny", (), host="127.0.0.1", port=8500).partition(b"\n")
    assert json.loads(place) == {"host": "127.0.0.1", "port": 8500}
    parsed = parse_boot(boot)
    assert (parsed.listen_fd, parsed.model_path, parsed.launch) == (-1, "/model.gguf", launch_of())


# The command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "state").mkdir()
    app = typer.Typer()
    app.command()(gramine_command)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, [str(tmp_path / "image"), "--model", "tiny", "--context", "512", *arguments])

    yield invoke


def test_without_gramine_nothing_is_built(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run("--dangerously-without-api-keys")
    assert isinstance(done.exception, CloisterError)
    assert "gramine-manifest" in done.exception.message
    assert not (tmp_path / "image").exists()


@pytest.mark.parametrize("options", [[], ["--launch", "x"], ["--config", "x"], ["--kv-type", "f8"]])
def test_settings_that_do_not_fit_together_are_refused(run: Any, options: list[str]) -> None:
    assert isinstance(run("--unsigned", *options).exception, WrongUse)


def test_what_is_there_already_stays_as_it_is(run: Any, tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    done = run("--unsigned", "--dangerously-without-api-keys")
    assert isinstance(done.exception, WrongUse)
    assert "already" in done.exception.message
    assert list((tmp_path / "image").iterdir()) == []


def test_unsigned_it_can_be_carried_to_a_machine_with_gramine(run: Any, tmp_path: Path) -> None:
    done = run("--unsigned", "--json", "--dangerously-without-api-keys")
    assert done.exit_code == 0, done.output
    folder, told = tmp_path / "image", json.loads(done.stdout)
    launch = (folder / "launch.json").read_bytes()
    assert told["launch_sha256"] == launch_digest(launch).hex()
    assert "mr_enclave" not in told
    assert (folder / "root" / "launch.json").read_bytes() == launch
    config = parse_config((folder / "config.json").read_bytes())
    assert (config.platform, config.engine) == ("sgx", "thread")
    assert parse_launch(launch).config_sha256 == config.digest().hex()
    assert (folder / "boot").stat().st_mode & 0o077 == 0


def test_signed_it_gives_the_lines_of_a_policy(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    signed = Signed("ab" * 32, "cd" * 32, 0, 0, debug=False)
    monkeypatch.setattr(image_gramine, "find_gramine", lambda: GRAMINE)
    monkeypatch.setattr(image_gramine, "sign", lambda _folder, _key: signed)
    done = run("--dangerously-without-api-keys")
    assert done.exit_code == 0, done.output
    policy = parse_policy("version = 1\n" + done.stdout, read=lambda name: name.encode())
    assert policy.measurements["sgx"][0]["mr_enclave"] == "ab" * 32
