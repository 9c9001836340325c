import errno
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from tests.enclave.attest.fakes import gramine, nsm, sev, tdx
from tests.enclave.attest.fakes.azure import FakeMetadata, Paravisor
from tests.enclave.attest.fakes.kernel import FakeKernel, OpenFile, content
from tests.enclave.attest.fakes.nvml import FakeNvml
from tests.enclave.attest.fakes.tpm import FakeTpm
from tests.enclave.attest.fakes.tsm import FakeTsm
from tests.vendors.tpm import event, event_log

from cloister.enclave.attest import EvidenceSource
from cloister.enclave.attest.boot_log import TPM_LOG
from cloister.enclave.attest.detect import Detection, Finding, Machine, detect, open_source
from cloister.enclave.attest.fronted import FrontedByTpm
from cloister.enclave.attest.nvml import NvidiaGpus
from cloister.enclave.attest.tsm import REPORTS
from cloister.errors import ConnectionFailed, NotTrusted, WrongUse
from cloister.evidence.azure import SNP, TDX
from cloister.evidence.tpm import parse_quote, parse_tpm

DATA = bytes(range(64))
TPM = "/dev/tpmrm0"


def no_library() -> Any:
    raise OSError("not there")


def machine(kernel: FakeKernel, *, tools: FakeTpm | None = None, load: Callable[[], Any] = no_library) -> Machine:
    return Machine(kernel, tools or FakeTpm(), FakeMetadata(), NvidiaGpus(load))


def with_tpm(kernel: FakeKernel) -> FakeKernel:
    kernel.nodes[TPM] = lambda _: OpenFile()
    return kernel


def snp() -> FakeKernel:
    firmware = sev.Firmware(table=sev.whole_table())
    return sev.machine(firmware, tsm=sev.tsm_of(firmware))


def td() -> FakeKernel:
    module = tdx.TdModule()
    return tdx.machine(module, tsm=tdx.tsm_of(module))


MACHINES: dict[str, Callable[[], Machine]] = {
    "sgx": lambda: machine(gramine.machine()),
    "nitro": lambda: machine(nsm.machine(nsm.FakeModule())),
    "tdx": lambda: machine(td()),
    "sev-snp": lambda: machine(snp()),
    "azure-sev-snp": lambda: machine(with_tpm(FakeKernel()), tools=Paravisor(kind=SNP).tpm),
    "azure-tdx": lambda: machine(with_tpm(FakeKernel()), tools=Paravisor(kind=TDX).tpm),
    "vtpm": lambda: machine(with_tpm(FakeKernel())),
}


@pytest.mark.parametrize("platform", MACHINES)
def test_finds_the_platform_and_its_driver_collects(platform: str) -> None:
    made = MACHINES[platform]()
    detection = detect(made)
    assert detection.platform == platform
    source: EvidenceSource = open_source(detection, made)
    assert source.platform == platform
    assert source.collect(DATA)


def test_an_ordinary_machine_is_none_and_everything_that_was_looked_for_is_told() -> None:
    made = machine(FakeKernel())
    detection = detect(made)
    assert detection.platform is None
    assert detection.gpus == 0
    assert [finding.what for finding in detection.findings] == [
        "SGX through Gramine",
        "AWS Nitro",
        "configfs-tsm",
        "Intel TDX",
        "AMD SEV-SNP",
        "TPM 2.0",
        "NVIDIA GPUs",
    ]
    assert {finding.detail for finding in detection.findings[:-1]} == {"not there"}
    with pytest.raises(WrongUse) as caught:
        open_source(detection, made)
    assert "doctor" in caught.value.hint


@pytest.mark.parametrize("kernel", [td, snp])
def test_a_tpm_in_front_of_a_confidential_vm_is_no_platform_of_its_own(kernel: Callable[[], FakeKernel]) -> None:
    detection = detect(machine(with_tpm(kernel())))
    assert detection.platform in ("tdx", "sev-snp")
    assert Finding("TPM 2.0", TPM, "vtpm", "present") in detection.findings


def test_a_paravisor_comes_before_the_devices_that_it_may_show() -> None:
    made = machine(with_tpm(snp()), tools=Paravisor().tpm)
    assert detect(made).platform == "azure-sev-snp"


def test_the_tpm_in_front_quotes_the_cpus_evidence() -> None:
    made = machine(with_tpm(snp()))
    source = open_source(detect(made), made, with_tpm=True)
    assert isinstance(source, FrontedByTpm)
    items = source.collect(DATA)
    assert items.keys() == {"cpu", "endorsements", "tpm"}
    quote = parse_quote(parse_tpm(items["tpm"].content).quote)
    assert quote.extra_data == hashlib.sha256(items["cpu"].content).digest()
    assert source.platform == "sev-snp"
    with pytest.raises(NotTrusted):
        source.fix_launch(b"{}")


PROGRAM = b"a program that the firmware started"


@pytest.mark.parametrize("log", [None, event_log(event(4, PROGRAM))])
def test_the_log_beside_a_tpm_is_the_tpms_or_none(log: bytes | None) -> None:
    module = tdx.TdModule()
    kernel = with_tpm(tdx.machine(module, tsm=tdx.tsm_of(module), log=b"CCEL"))
    if log is not None:
        kernel.nodes[TPM_LOG] = content(log)
    fake = FakeTpm()
    fake.extend(4, hashlib.sha256(PROGRAM).digest())
    made = machine(kernel, tools=fake)
    items = open_source(detect(made), made, with_tpm=True).collect(DATA)
    assert (items["eventlog"].content if "eventlog" in items else None) == log
    assert open_source(detect(made), made).collect(DATA)["eventlog"].content == b"CCEL"


def test_a_gramine_without_dcap_is_told_and_is_no_platform() -> None:
    detection = detect(machine(gramine.machine(gramine.FakeGramine(kind="none"))))
    assert detection.platform is None
    assert "dcap" in detection.findings[0].detail


def test_a_driver_that_is_broken_is_told_with_its_reason() -> None:
    kernel = FakeKernel(folders={REPORTS: FakeTsm(None, lambda *_: (b"", b""))})
    detection = detect(machine(kernel))
    finding = detection.findings[2]
    assert detection.platform is None
    assert "ENXIO" in finding.detail
    assert "modprobe" in finding.hint


def test_an_unknown_provider_is_named() -> None:
    kernel = FakeKernel(folders={REPORTS: FakeTsm("arm_cca_guest", lambda *_: (b"", b""))})
    detection = detect(machine(kernel))
    assert detection.platform is None
    assert detection.findings[2].detail == "provider arm_cca_guest"


def test_a_file_that_may_not_be_read_is_told() -> None:
    kernel = gramine.machine()
    kernel.refused["/dev/attestation/attestation_type"] = errno.EACCES
    assert detect(machine(kernel)).findings[0].detail == "cannot be read: Permission denied"


def test_a_tpm_that_does_not_answer_is_still_a_tpm() -> None:
    class Dead(FakeTpm):
        def run(self, *arguments: Any, **options: Any) -> Any:
            raise ConnectionFailed("tpm2_getcap is missing.", hint="Install the package tpm2-tools.")

    detection = detect(machine(with_tpm(FakeKernel()), tools=Dead()))
    assert detection.platform == "vtpm"
    assert detection.findings[-2].detail == "tpm2_getcap is missing."
    assert "tpm2-tools" in detection.findings[-2].hint


def test_counts_gpus_that_can_attest_and_says_why_others_cannot() -> None:
    assert detect(machine(td(), load=lambda: FakeNvml(gpus=2))).gpus == 2
    off = detect(machine(td(), load=lambda: FakeNvml(gpus=2, cc_feature=0)))
    assert off.gpus == 0
    assert "confidential computing" in off.findings[-1].detail


def test_detection_leaves_nothing_open_and_makes_no_evidence() -> None:
    module = tdx.TdModule()
    tsm = tdx.tsm_of(module)
    kernel = tdx.machine(module, tsm=tsm)
    detect(machine(kernel))
    assert not kernel.leaked
    assert not tsm.entries
    assert tsm.made == 0


def test_the_real_machine_is_looked_at_without_error() -> None:
    assert isinstance(detect(Machine()), Detection)
