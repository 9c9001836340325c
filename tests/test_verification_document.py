"""docs/verification.md is one session at a terminal, played again: every screen in it is what the commands show."""

import hashlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from tests.cli import hardware
from tests.vendors import intel
from tests.verify.world import LAUNCH
from typer.testing import CliRunner

from cloister.cli import main, output, trust
from cloister.cli.policy_file import key_name
from cloister.verify.policy import PLATFORMS

DOCUMENT = Path(__file__).parents[1] / "docs" / "verification.md"
COLUMNS = 104
"""Wide enough for a digest in a table, so that the two that are made anew by every run can be found."""

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
_BLOCK = re.compile(r"^```screen\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With everything that the document speaks of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    (tmp_path / "policy.toml").write_text(hardware.POLICY)
    (tmp_path / "owner.pem").write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "owner.pem").chmod(0o600)
    documents = {
        "good": hardware.document(),
        "old": hardware.out_of_date(),
        "debug": hardware.document(report={"td_attributes": hardware.DEBUG}),
        "forged": hardware.document(intel.other_intel()),
        "changed": hardware.document(launch=replace(LAUNCH, config_sha256="77" * 32), report={"rtmr2": b"\xbb" * 48}),
    }
    for name, document in documents.items():
        hardware.save(tmp_path / f"{name}.json", document)
    return tmp_path


def play(command: str) -> str:
    """What a terminal shows, without colours."""
    with hardware.trusting_the_synthetic_root():
        ran = CliRunner().invoke(main.app, shlex.split(command)[1:])
    assert ran.exception is None or isinstance(ran.exception, SystemExit)
    shown = ran.output
    for root, stands_for in ((intel.intel(), "5a"), (intel.other_intel(), "f0")):
        digest = hashlib.sha256(root.make(platform="tdx", version=4).root).hexdigest()
        shown = shown.replace(digest, stands_for * 32)
    return "".join(f"{line.rstrip()}\n" for line in shown.splitlines())


def told() -> Iterator[tuple[str, str]]:
    """Each command and the output under it."""
    for block in _BLOCK.findall(DOCUMENT.read_text()):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield command, shown


def played() -> str:
    """The document with each command's output as it is now."""

    def play_block(block: re.Match[str]) -> str:
        commands = re.findall(r"^\$ (.*)$", block[1], re.MULTILINE)
        return "```screen\n" + "".join(f"$ {command}\n{play(command)}" for command in commands) + "```"

    return _BLOCK.sub(play_block, DOCUMENT.read_text())


def test_every_screen_is_what_the_command_shows(folder: Path) -> None:
    now = folder / "verification.md"
    now.write_text(played())
    assert now.read_text() == DOCUMENT.read_text(), f"If the change is meant: cp {now} {DOCUMENT}"


def test_the_four_screens_are_there(folder: Path) -> None:
    screens = dict(told())
    starts = {name: screens[f"cloister verify {name}.json --policy policy.toml"] for name in ("good", "old", "debug")}
    assert "VERIFIED  tdx\n" in starts["good"]
    assert "\nOUT OF DATE, not an attack" in starts["old"]
    assert re.search("^evidence.debug +FAIL", starts["debug"], re.MULTILINE)
    forged = screens["cloister verify forged.json --policy policy.toml"]
    assert re.search("^evidence.root +FAIL", forged, re.MULTILINE)
    assert "\nAN ATTACK OR A MISTAKE" in forged
    (accepted,) = [shown for command, shown in told() if command.startswith("cloister policy accept")]
    assert accepted == "accepted first.toml\n"


def test_the_screens_fit_a_terminal() -> None:
    assert max(len(line) for _, shown in told() for line in shown.splitlines()) <= 120


def test_the_policy_is_the_one_that_was_used() -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks[0] == hardware.POLICY
    assert f'policy_signer = "{key_name(KEY)}"' in blocks[1]


def test_it_names_every_platform() -> None:
    section = DOCUMENT.read_text().partition("## What each platform proves\n")[2].partition("\n## ")[0]
    assert [platform for platform in PLATFORMS if f"`{platform}`" not in section] == []


def test_every_vendor_option_is_told_with_its_environment_variable() -> None:
    text = DOCUMENT.read_text()
    for option in (trust.Offline, trust.IntelService, trust.AmdService, trust.NvidiaService):
        (told,) = option.__metadata__  # type: ignore[union-attr]
        assert f"`{told.envvar}`" in text
        assert f"`{told.param_decls[0] if told.param_decls else told.default}" in text
