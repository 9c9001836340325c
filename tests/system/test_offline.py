"""A saved document is judged with the network cut: all that it needs is inside."""

import json
import os
import sys
from pathlib import Path

import pytest
from tests.cli import hardware
from tests.system.shell import Shell, free_port, tool
from tests.vendors import amd, intel

pytestmark = pytest.mark.system


def _cut() -> str:
    """A command in front of another that leaves it without any network, loopback too."""
    return f"{tool('unshare')} --net" if os.getuid() == 0 else f"{tool('unshare')} --map-root-user --net"


def test_a_saved_document_verifies_without_a_network(shell: Shell) -> None:
    port = free_port()
    root = shell.home / ".local/state/cloister/sim-root.pem"
    trusted = f"--dangerously-trust-simulator {root}"
    with shell.background(f"cloister serve tiny --platform sim --port {port}"):
        kept = shell.run(f"cloister verify http://127.0.0.1:{port} {trusted} --save kept.json")
        assert kept.returncode == 0, kept.stderr
        cut = shell.run(f"{_cut()} cloister verify http://127.0.0.1:{port} {trusted}")
        assert cut.returncode == 5  # the network is cut indeed
    done = shell.run(f"{_cut()} cloister verify kept.json {trusted}")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "SIMULATED  sim"), done.stderr


def test_hardware_evidence_is_judged_without_a_network(shell: Shell) -> None:
    """Under the vendors' own roots, which is the one thing that synthetic evidence does not have."""
    saved = {"tdx.json": hardware.document(), "snp.json": hardware.snp_document()}
    for name, document in saved.items():
        hardware.save(Path(shell.home / name), document)
        done = shell.run(f"{_cut()} cloister verify {name} --json")
        assert done.returncode == 3, done.stderr
        assert '"evidence.root"' in done.stdout
        assert "collateral" not in done.stderr  # nobody was asked


TRUSTING = """
import json, sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock
from cloister.cli.main import main
from cloister.verify import verify
from cloister.verify.roots import PINNED
made = json.loads(Path("roots.json").read_text())
roots = replace(PINNED, intel=bytes.fromhex(made["intel"]), amd=made["amd"])
with mock.patch("cloister.cli.verify.judge", partial(verify, roots=roots)):
    main()
"""
"""`cloister`, with the roots of this test's own vendors in the place of the pinned ones."""


SNP_POLICY = f"""\
{hardware.POLICY.partition("platforms")[0]}
platforms = ["sev-snp"]
[measurements]
sev-snp = [{{ measurement = "{bytes(range(48)).hex()}" }}]
[tcb]
min_sev_snp = {{ snp = 24 }}
"""


@pytest.mark.parametrize("platform", ["tdx", "sev-snp"])
def test_hardware_evidence_with_its_endorsements_is_accepted_without_a_network(shell: Shell, platform: str) -> None:
    home = Path(shell.home)
    made = {"tdx": hardware.document, "sev-snp": hardware.snp_document}[platform]()
    hardware.save(home / "kept.json", made)
    (home / "policy.toml").write_text(hardware.POLICY if platform == "tdx" else SNP_POLICY)
    (home / "roots.json").write_text(json.dumps({"intel": intel.tdx().root.hex(), "amd": dict(amd.make().roots)}))
    (home / "trusting.py").write_text(TRUSTING)
    command = f"{_cut()} {sys.executable} trusting.py verify kept.json --policy policy.toml --json"
    done = shell.run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["platform"], [one for one in told["factors"] if one["verdict"] == "fail"]) == (platform, [])
    assert {"evidence.root", "evidence.crl"} <= {one["step"] for one in told["factors"] if one["verdict"] == "pass"}
    (home / "roots.json").write_text(json.dumps({"intel": "00", "amd": {}}))
    refused = shell.run(command)
    assert refused.returncode == 3
    failed = {one["step"] for one in json.loads(refused.stdout)["factors"] if one["verdict"] == "fail"}
    assert failed == {"evidence.root"}, "by these roots, and no others"
