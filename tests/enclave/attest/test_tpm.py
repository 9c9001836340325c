import errno
import hashlib
import json
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.enclave.attest.fakes.kernel import FakeKernel, content
from tests.enclave.attest.fakes.tpm import FakeTpm, with_ek_certificate
from tests.vendors import tpm as vendor

from cloister.enclave.attest import EvidenceSource
from cloister.enclave.attest.boot_log import TPM_LOG
from cloister.enclave.attest.later_log import LATER_LOG
from cloister.enclave.attest.tpm import (
    AttestationKey,
    SubprocessTools,
    Tpm,
    Vtpm,
    der_prefix,
    extend_launch,
)
from cloister.errors import CloisterError, ConnectionFailed, MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.eventlog import parse_eventlog
from cloister.evidence.tpm import parse_public, parse_tpm
from cloister.verify.policy import Policy
from cloister.verify.vtpm import judge

DATA = bytes(range(64))
LAUNCH = b'{"v":1}'
AK = 0x81010002


def source_on(fake: FakeTpm, kernel: FakeKernel | None = None, **options: object) -> Vtpm:
    return Vtpm(kernel or FakeKernel(), Tpm(fake), **options)  # type: ignore[arg-type]


def test_collects_a_quote_that_the_verifier_accepts_under_a_pinned_key() -> None:
    fake = FakeTpm()
    source = source_on(fake)
    seam: EvidenceSource = source
    extend_launch(source.tpm, LAUNCH)
    items = source.collect(DATA)
    assert seam.platform == "vtpm"
    assert items.keys() == {"tpm"}
    evidence = parse_tpm(items["tpm"].content)
    judged = judge(
        evidence,
        qualifying_data=DATA[:32],
        policy=Policy(),
        now=vendor.NOW,
        launch=LAUNCH,
        ak_pins=frozenset({parse_public(evidence.ak).name_digest}),
    )
    assert judged.launch_sha256 == hashlib.sha256(LAUNCH).digest()
    assert not [factor for factor in judged.factors if factor.verdict == "fail"]


def test_a_providers_key_comes_with_its_certificate_and_the_issuers() -> None:
    maker = vendor.Maker()
    provided = vendor.Tpm().certified(maker)
    fake = FakeTpm(persistent={AK: provided})
    fake.define(0x01C10000, provided.chain[0].ljust(2000, b"\xff"))
    source = source_on(fake, ak_handle=AK, certificate_index=0x01C10000, issuers=provided.chain[1:])
    evidence = parse_tpm(source.collect(DATA)["tpm"].content)
    assert evidence.certificates == provided.chain
    judged = judge(
        evidence,
        qualifying_data=DATA[:32],
        policy=Policy(),
        now=vendor.NOW,
        roots=vendor.pinned(maker.root),
    )
    assert not [factor for factor in judged.factors if factor.verdict == "fail" and factor.step != "evidence.crl"]


def test_a_certificate_without_its_issuers_is_left_out() -> None:
    provided = vendor.Tpm().certified(vendor.Maker())
    fake = FakeTpm(persistent={AK: provided})
    fake.define(0x01C10000, provided.chain[0])
    evidence = parse_tpm(source_on(fake, ak_handle=AK, certificate_index=0x01C10000).collect(DATA)["tpm"].content)
    assert evidence.certificates == ()


def test_an_index_without_a_certificate_is_told() -> None:
    fake = FakeTpm(persistent={AK: vendor.Tpm()})
    fake.define(0x01C10000, bytes(100))
    with pytest.raises(MalformedEvidence):
        source_on(fake, ak_handle=AK, certificate_index=0x01C10000, issuers=(b"x",)).collect(DATA)


def test_one_key_is_made_and_kept() -> None:
    fake = FakeTpm()
    source = source_on(fake)
    keys = {parse_tpm(source.collect(DATA)["tpm"].content).ak for _ in range(3)}
    assert len(keys) == 1
    assert [command[0] for command in fake.commands].count("tpm2_createprimary") == 1


def test_the_tpms_own_key_is_the_same_for_whoever_asks() -> None:
    fake = FakeTpm(ek=EK)
    keys = {parse_tpm(source_on(fake).collect(DATA)["tpm"].content).ak for _ in range(2)}
    assert len(keys) == 1


def test_threads_share_one_key() -> None:
    fake = FakeTpm()
    source = source_on(fake)
    threads = [threading.Thread(target=source.collect, args=(DATA,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [command[0] for command in fake.commands].count("tpm2_createprimary") == 1


def test_brings_the_boot_log() -> None:
    fake, log = booted(b"loader")
    kernel = FakeKernel(nodes={TPM_LOG: content(log)}, max_read=2)
    assert source_on(fake, kernel).collect(DATA)["eventlog"].content == log
    kernel.refused[TPM_LOG] = errno.EPERM
    with pytest.raises(ConnectionFailed, match="boot log"):
        source_on(fake, kernel).collect(DATA)


def booted(*measured: bytes) -> tuple[FakeTpm, bytes]:
    """A TPM after these went into PCR 11, and the firmware's log of them."""
    fake = FakeTpm(ek=EK)
    for data in measured:
        fake.extend(11, hashlib.sha256(data).digest())
    return fake, vendor.event_log(*(vendor.event(11, data) for data in measured))


def record(pcr: int, word: str, digest: bytes | None = None) -> bytes:
    """As systemd writes it."""
    value = hashlib.sha256(word.encode()).digest() if digest is None else digest
    said = {"digests": [{"hashAlg": "sha256", "digest": value.hex()}], "content_type": "systemd"}
    content_of = {"string": word, "eventType": "phase", "bootId": "0" * 32, "timestamp": 7}
    return b"\x1e" + json.dumps({"pcr": pcr, **said, "content": content_of}).encode() + b"\n"


def test_what_systemd_measured_later_completes_the_log() -> None:
    fake, log = booted(b"section")
    for word in ("enter-initrd", "leave-initrd"):
        fake.extend(11, hashlib.sha256(word.encode()).digest())
    later = record(11, "enter-initrd") + record(11, "leave-initrd")
    kernel = FakeKernel(nodes={TPM_LOG: content(log), LATER_LOG: content(later)})
    whole = source_on(fake, kernel).collect(DATA)["eventlog"].content
    events = parse_eventlog(whole).events
    assert [event.data for event in events] == [b"section", b"enter-initrd", b"leave-initrd"]
    assert all(event.proves_data for event in events)


@pytest.mark.parametrize(
    "later",
    [
        b"",
        record(11, "enter-initrd", bytes(32)),
        record(11, "enter-initrd", bytes(31)),
        record(11, "enter-initrd") * 2,
        record(11, "enter-initrd") + b"\x1e{",
        b"\x1e[]\n",
        b'\x1e{"pcr": 11}\n',
        b'\x1e{"pcr": -1, "digests": [], "content": {"string": ""}}\n',
        b"\xff" * 40,
    ],
    ids=range(9),
)
def test_a_log_that_explains_nothing_is_left_out(later: bytes) -> None:
    fake, log = booted(b"section")
    fake.extend(11, hashlib.sha256(b"enter-initrd").digest())
    kernel = FakeKernel(nodes={TPM_LOG: content(log), LATER_LOG: content(later)})
    assert source_on(fake, kernel).collect(DATA).keys() == {"tpm"}


def test_a_pcr_that_changed_between_quote_and_reading_is_quoted_again() -> None:
    left = [2]

    def race(fake: FakeTpm) -> None:
        if left[0]:
            left[0] -= 1
            fake.extend(10, bytes(32))

    fake = FakeTpm(race=race)
    evidence = parse_tpm(source_on(fake).collect(DATA)["tpm"].content)
    assert evidence.pcrs[10] == fake.pcrs[10]
    assert [command[0] for command in fake.commands].count("tpm2_quote") == 3


def test_pcrs_that_never_rest_are_told() -> None:
    with pytest.raises(ConnectionFailed, match="change faster"):
        source_on(FakeTpm(race=lambda fake: fake.extend(10, bytes(32)))).collect(DATA)


def test_a_quote_over_another_question_is_refused() -> None:
    other = vendor.quote(bytes(32), vendor.ZERO_PCRS)
    with pytest.raises(MalformedEvidence, match="another question"):
        source_on(FakeTpm(change={"message": lambda _: other})).collect(DATA)


@pytest.mark.parametrize("change", [lambda values: values[:-1], lambda values: b"", lambda values: values[:32]])
def test_other_than_24_pcrs_are_refused(change: object) -> None:
    with pytest.raises(MalformedEvidence, match="24"):
        source_on(FakeTpm(change={"pcrs": change})).collect(DATA)  # type: ignore[dict-item]


@given(st.binary(max_size=200), st.sampled_from(["message", "signature", "pcrs", "ak.pub", "ek.pub"]))
def test_whatever_the_tools_leave_only_our_errors_escape(junk: bytes, name: str) -> None:
    with pytest.raises(CloisterError):
        source_on(FakeTpm(change={name: lambda _: junk}, ek=EK)).collect(DATA)


EK = FakeTpm().ek


@pytest.mark.parametrize("size", [0, 33, 64])
def test_a_quote_is_over_at_most_32_bytes(size: int) -> None:
    fake = FakeTpm(ek=EK)
    with pytest.raises(WrongUse):
        Tpm(fake).quote(AttestationKey(b"", b"context"), bytes(size))
    assert not fake.commands


@pytest.mark.parametrize("size", [0, 32, 63, 65])
def test_a_question_has_64_bytes(size: int) -> None:
    with pytest.raises(WrongUse):
        source_on(FakeTpm(ek=EK)).collect(bytes(size))


def test_early_boot_extends_pcr14_once() -> None:
    fake = FakeTpm(ek=EK)
    tpm = Tpm(fake)
    for _ in range(2):
        extend_launch(tpm, LAUNCH)
    assert fake.pcrs[14] == hashlib.sha256(bytes(32) + hashlib.sha256(LAUNCH).digest()).digest()
    source_on(fake).fix_launch(LAUNCH)
    with pytest.raises(NotTrusted):
        source_on(fake).fix_launch(LAUNCH + b" ")


def test_another_launch_config_in_pcr14_is_refused() -> None:
    fake = FakeTpm(ek=EK)
    fake.extend(14, hashlib.sha256(b"shim's keys").digest())
    before = fake.pcrs[14]
    with pytest.raises(NotTrusted) as caught:
        extend_launch(Tpm(fake), LAUNCH)
    assert "shim" in caught.value.hint
    assert fake.pcrs[14] == before
    with pytest.raises(NotTrusted):
        source_on(fake).fix_launch(LAUNCH)


def test_a_pcr14_that_early_boot_left_alone_is_refused_not_extended() -> None:
    fake = FakeTpm(ek=EK)
    with pytest.raises(NotTrusted) as caught:
        source_on(fake).fix_launch(LAUNCH)
    assert "early boot" in caught.value.hint
    assert fake.pcrs[14] == bytes(32)


def test_a_tpm_without_a_sha256_bank_is_told() -> None:
    with pytest.raises(MalformedEvidence, match="SHA-256"):
        Tpm(FakeTpm(change={"pcr": lambda _: b""}, ek=EK)).pcr(14)


def test_writes_an_index_that_it_defined_and_one_that_was_there() -> None:
    fake = FakeTpm(ek=EK)
    tpm = Tpm(fake)
    for data in (DATA, bytes(64)):
        tpm.nv_write(0x01400002, data)
        assert tpm.nv_read(0x01400002) == data
    assert [command[0] for command in fake.commands].count("tpm2_nvdefine") == 1
    with pytest.raises(ConnectionFailed):
        tpm.nv_read(0x01400003)


def test_the_endorsement_key_comes_with_the_certificate_in_nv() -> None:
    maker = vendor.Maker()
    der = maker.chain(EK.public_key(), vendor.Terms())[0]
    fake = with_ek_certificate(der)
    ek, ak = source_on(fake).enrolment()
    assert ek.certificate == der
    assert parse_public(ek.public).key.public_numbers() == fake.ek.public_key().public_numbers()
    assert parse_public(ak.public)
    assert source_on(FakeTpm(ek=EK)).enrolment()[0].certificate == b""


def test_a_providers_key_is_not_enrolled() -> None:
    with pytest.raises(WrongUse):
        source_on(FakeTpm(persistent={AK: vendor.Tpm()}, ek=EK), ak_handle=AK).enrolment()


@pytest.mark.parametrize("data", [b"", b"\x30\x82", b"\x30\x82\x00\x05abcd", b"\x02\x82\x00\x01a", bytes(50)])
def test_what_is_no_der_is_no_certificate(data: bytes) -> None:
    assert der_prefix(data) == b""


# The tools themselves ---------------------------------------------------------------------------------------------------


def script(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport os, sys, time\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("TPM2TOOLS_TCTI", "an attacker's")
    monkeypatch.setenv("LD_PRELOAD_OF_SOMEBODY", "x")
    script(tmp_path, "tpm2_flushcontext", "sys.exit(0)")
    return tmp_path


def test_a_tool_runs_in_an_empty_folder_with_its_own_environment(tools: Path) -> None:
    script(tools, "tpm2_show", "print(sorted(os.listdir()), sorted(os.environ)); open('out', 'wb').write(b'made')")
    ran = SubprocessTools(path=str(tools)).run(("tpm2_show",), inputs={"in": b"given"}, outputs=("out",))
    assert ran.files == {"out": b"made"}
    assert ran.stdout.startswith(b"['in'] ['LC_ALL', ")
    assert b"LD_PRELOAD" not in ran.stdout


def test_a_tool_is_told_which_tpm(tools: Path) -> None:
    script(tools, "tpm2_show", "print(os.environ['TPM2TOOLS_TCTI'])")
    assert SubprocessTools(path=str(tools)).run(("tpm2_show",)).stdout == b"device:/dev/tpmrm0\n"
    assert SubprocessTools("swtpm:path=/s", str(tools)).run(("tpm2_show",)).stdout == b"swtpm:path=/s\n"


def test_without_a_resource_manager_the_slots_are_cleared(tools: Path) -> None:
    script(tools, "tpm2_show", "pass")
    script(tools, "tpm2_flushcontext", f"open({str(tools / 'flushed')!r}, 'a').write(' '.join(sys.argv[1:]))")
    SubprocessTools(path=str(tools)).run(("tpm2_show",))
    assert not (tools / "flushed").exists()
    SubprocessTools("device:/dev/tpm0", str(tools)).run(("tpm2_show",))
    assert (tools / "flushed").read_text() == "-t"


def test_a_missing_tool_is_told(tools: Path) -> None:
    with pytest.raises(ConnectionFailed) as caught:
        SubprocessTools(path=str(tools)).run(("tpm2_no_such_tool",))
    assert "tpm2-tools" in caught.value.hint


def test_a_tool_that_fails_says_why_without_control_characters(tools: Path) -> None:
    script(
        tools, "tpm2_show", "sys.stderr.write('WARN: x\\nERROR: out of \\x1b[2Jmemory\\nERROR: second'); sys.exit(1)"
    )
    with pytest.raises(ConnectionFailed) as caught:
        SubprocessTools(path=str(tools)).run(("tpm2_show",))
    assert caught.value.got == "out of ?[2Jmemory"
    script(tools, "tpm2_show", "sys.exit(3)")
    with pytest.raises(ConnectionFailed) as caught:
        SubprocessTools(path=str(tools)).run(("tpm2_show",))
    assert caught.value.got == "no reason given"


def test_a_tool_that_leaves_no_output_is_told(tools: Path) -> None:
    script(tools, "tpm2_show", "pass")
    with pytest.raises(ConnectionFailed, match="left no out"):
        SubprocessTools(path=str(tools)).run(("tpm2_show",), outputs=("out",))


def test_a_tool_that_hangs_is_ended(tools: Path) -> None:
    script(tools, "tpm2_show", "time.sleep(60)")
    with pytest.raises(ConnectionFailed, match="did not end"):
        SubprocessTools(path=str(tools), timeout=0.2).run(("tpm2_show",))
