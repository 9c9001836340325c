"""Against systemd's own prediction of PCR 11."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from tests.deploy.efi import CMDLINE, INITRD, OSREL, kernel, uki
from tests.system.shell import tool

from cloister.deploy.predict import PHASES, boot_events, predict_pcrs
from cloister.deploy.uki import parse_image
from cloister.evidence.eventlog import EventLog, replay_pcrs
from cloister.evidence.tpm import ALG_SHA384

pytestmark = pytest.mark.system

MEASURE = "/usr/lib/systemd/systemd-measure"
IMAGE = parse_image(uki("252.39", sbat=None, uname=None, splash=b"a picture", pcrpkey=b"a key"))


def predicted_by_systemd(folder: Path, bank: str) -> dict[str, str]:
    """Phases, joined by colons -> PCR 11."""
    parts = {"linux": kernel(), "osrel": OSREL, "cmdline": CMDLINE, "initrd": INITRD, "splash": b"a picture"}
    for name, content in {**parts, "pcrpkey": b"a key"}.items():
        (folder / name).write_bytes(content)
    files = [f"--{name}={folder / name}" for name in (*parts, "pcrpkey")]
    phases = [f"--phase={':'.join(PHASES[:count])}" for count in range(1, 7)]
    ran = subprocess.run(
        [tool(MEASURE), "calculate", *files, *phases, f"--bank={bank}", "--json=short"], capture_output=True, check=True
    )
    return {entry.get("phase", ""): entry["hash"] for entry in json.loads(ran.stdout)[bank]}


def test_every_phase_of_a_boot_is_predicted_as_systemd_does(tmp_path: Path) -> None:
    theirs = predicted_by_systemd(tmp_path, "sha256")
    assert theirs == {
        ":".join(PHASES[:count]): predict_pcrs(IMAGE, phases=PHASES[:count])[11].hex() for count in range(1, 7)
    }


def test_the_sections_are_measured_alike_in_a_longer_hash(tmp_path: Path) -> None:
    """What a trust domain's RTMR2 begins with: a register that goes on from the same value after the first phase."""
    events = [event for event in boot_events(IMAGE, started_by="disk", algorithm=ALG_SHA384) if event.index == 11]
    sections = replay_pcrs(EventLog({ALG_SHA384: 48}, tuple(events)), ALG_SHA384)[11]
    word = hashlib.sha384(PHASES[0].encode()).digest()
    assert hashlib.sha384(sections + word).hexdigest() == predicted_by_systemd(tmp_path, "sha384")[PHASES[0]]
