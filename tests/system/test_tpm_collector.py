"""The TPM's driver against a real TPM in software: keys, quotes, PCRs, NV indices, enrolment."""

import hashlib
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.enclave.attest.fakes.kernel import FakeKernel, content
from tests.system.shell import tool
from tests.vendors.tpm import NOW, event, event_log

from cloister.enclave.attest.boot_log import TPM_LOG
from cloister.enclave.attest.tpm import (
    AttestationKey,
    EndorsementKey,
    SubprocessTools,
    Tpm,
    Vtpm,
    extend_launch,
)
from cloister.errors import ConnectionFailed, NotTrusted
from cloister.evidence.tpm import parse_public, parse_tpm
from cloister.verify.enrol import check_activation, make_credential
from cloister.verify.policy import Policy
from cloister.verify.vtpm import judge

pytestmark = pytest.mark.system

DATA = bytes(range(64))
LAUNCH = b'{"v":1}'


@pytest.fixture
def tools(tmp_path: Path) -> Iterator[SubprocessTools]:
    """A TPM of its own, started and empty."""
    for name in ("tpm2_quote", "tpm2_createek", "tpm2_activatecredential"):
        tool(name)
    path = tmp_path / "s"
    command = [tool("swtpm"), "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--flags", "startup-clear"]
    channels = ["--server", f"type=unixio,path={path}", "--ctrl", f"type=unixio,path={path}.ctrl"]
    process = subprocess.Popen([*command, *channels], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 10
    while not (path.exists() and Path(f"{path}.ctrl").exists()):
        assert process.poll() is None, "swtpm ended"
        assert time.monotonic() < until, "swtpm did not start"
        time.sleep(0.02)
    yield SubprocessTools(f"swtpm:path={path}")
    process.send_signal(signal.SIGTERM)
    process.wait(10)


@pytest.fixture
def tpm(tools: SubprocessTools) -> Tpm:
    return Tpm(tools)


def failed_steps(source: Vtpm, *, launch: bytes = b"", log: bytes | None = None, over: bytes = DATA) -> set[str]:
    evidence = parse_tpm(source.collect(DATA)["tpm"].content)
    judged = judge(
        evidence,
        qualifying_data=over[:32],
        policy=Policy(),
        now=NOW,
        launch=launch,
        ak_pins=frozenset({parse_public(evidence.ak).name_digest}),
        eventlog=log,
    )
    assert judged.launch_sha256 == (hashlib.sha256(launch).digest() if launch else b"")
    return {factor.step for factor in judged.factors if factor.verdict == "fail"}


def test_a_real_quote_is_accepted_and_over_another_question_refused(tpm: Tpm) -> None:
    source = Vtpm(FakeKernel(), tpm)
    assert not failed_steps(source)
    assert failed_steps(source, over=bytes(64))
    assert not failed_steps(source)  # the kept key's context still loads


def test_the_launch_config_is_extended_once_and_judged(tpm: Tpm) -> None:
    source = Vtpm(FakeKernel(), tpm)
    with pytest.raises(NotTrusted):
        source.fix_launch(LAUNCH)
    for _ in range(2):
        extend_launch(tpm, LAUNCH)
    source.fix_launch(LAUNCH)
    assert not failed_steps(source, launch=LAUNCH)
    tpm.extend_pcr(14, bytes(32))
    with pytest.raises(NotTrusted):
        extend_launch(tpm, LAUNCH)


def test_a_boot_log_that_was_measured_replays_to_the_quoted_pcrs(tpm: Tpm) -> None:
    log = event_log(event(4, b"boot loader"), event(8, b"kernel"), event(8, b"command line"))
    for index, data in ((4, b"boot loader"), (8, b"kernel"), (8, b"command line")):
        tpm.extend_pcr(index, hashlib.sha256(data).digest())
    source = Vtpm(FakeKernel(nodes={TPM_LOG: content(log)}), tpm)
    assert source.collect(DATA)["eventlog"].content == log
    assert not failed_steps(source, log=log)
    tpm.extend_pcr(8, bytes(32))
    assert failed_steps(source, log=log)


def test_enrolled_by_its_endorsement_key(tpm: Tpm) -> None:
    source = Vtpm(FakeKernel(), tpm)
    ek, ak = source.enrolment()
    secret = secrets.token_bytes(32)
    name = parse_public(ak.public).name
    credential = make_credential(ek.public, name, secret, secrets.token_bytes).tool_file()
    assert check_activation(secret, source.activate(credential)).verdict == "pass"
    assert not failed_steps(source)


def test_a_credential_for_another_attestation_key_does_not_open(tpm: Tpm) -> None:
    source = Vtpm(FakeKernel(), tpm)
    ek, ak = source.enrolment()
    other = parse_public(another_ak(tpm, ek).public).name
    assert other != parse_public(ak.public).name
    credential = make_credential(ek.public, other, bytes(32), secrets.token_bytes).tool_file()
    with pytest.raises(ConnectionFailed, match="tpm2_activatecredential"):
        source.activate(credential)


def test_a_tpms_own_keys_are_always_the_same(tpm: Tpm) -> None:
    first, second = tpm.endorsement_key(), tpm.endorsement_key()
    assert first.public == second.public
    assert first.certificate == b""
    assert tpm.own_ak().public == tpm.own_ak().public


def another_ak(tpm: Tpm, ek: EndorsementKey) -> AttestationKey:
    """One below the endorsement key, as the TPM's makers tell to make them: another one each time."""
    command = ("tpm2_createak", "-C", "ek.ctx", "-G", "ecc", "-g", "sha256", "-s", "ecdsa")
    outputs = ("-c", "ak.ctx", "-u", "ak.pub", "-f", "tss", "-n", "ak.name")
    files = tpm.tools.run((*command, *outputs), inputs={"ek.ctx": ek.context}, outputs=("ak.ctx", "ak.pub")).files
    return AttestationKey(files["ak.pub"], files["ak.ctx"])


def test_a_key_that_the_provider_left_quotes(tools: SubprocessTools, tpm: Tpm) -> None:
    made = another_ak(tpm, tpm.endorsement_key())
    tools.run(("tpm2_evictcontrol", "-C", "o", "-c", "ak.ctx", "0x81000003"), inputs={"ak.ctx": made.context})
    source = Vtpm(FakeKernel(), tpm, ak_handle=0x81000003)
    assert parse_tpm(source.collect(DATA)["tpm"].content).ak == made.public
    assert not failed_steps(source)


def test_nv_indices_are_defined_written_and_read_whole(tpm: Tpm) -> None:
    assert tpm.nv_indices() == ()
    tpm.nv_write(0x01400002, DATA)
    tpm.nv_write(0x01400002, DATA[::-1])
    assert tpm.nv_read(0x01400002) == DATA[::-1]
    large = secrets.token_bytes(1900)
    tpm.nv_write(0x01400001, large)
    assert tpm.nv_read(0x01400001) == large
    assert tpm.nv_indices() == (0x01400001, 0x01400002)
    with pytest.raises(ConnectionFailed) as caught:
        tpm.nv_read(0x01400003)
    assert "0x18B" in (caught.value.got or "")


def test_many_quotes_leave_no_slot_taken(tpm: Tpm) -> None:
    source = Vtpm(FakeKernel(), tpm)
    for _ in range(6):
        source.collect(DATA)


def test_a_context_of_another_tpm_is_refused(tpm: Tpm) -> None:
    with pytest.raises(ConnectionFailed):
        tpm.quote(AttestationKey(b"", b"no context"), bytes(32))
