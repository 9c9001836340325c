"""A saved document is judged with the network cut: all that it needs is inside."""

import os
from pathlib import Path

import pytest
from tests.cli import hardware
from tests.system.shell import Shell, free_port, tool

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
