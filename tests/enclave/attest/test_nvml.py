import ctypes
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.enclave.attest.fakes.nvml import FakeNvml
from tests.vendors import nvidia

from cloister.enclave.attest.nvml import AttestationReport, GpuCertificate, NvidiaGpus, SystemState
from cloister.errors import CloisterError, ConnectionFailed, MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.nvidia import parse_gpu
from cloister.verify.nvidia import judge
from cloister.verify.policy import Policy

NONCE = bytes(range(32))


def gpus(fake: FakeNvml) -> NvidiaGpus:
    return NvidiaGpus(lambda: fake)


def test_collects_what_the_verifier_accepts() -> None:
    fake = FakeNvml(gpus=3)
    items = gpus(fake).collect(NONCE)
    assert list(items) == ["gpu-0", "gpu-1", "gpu-2"]
    for item in items.values():
        evidence = parse_gpu(item.content)
        assert evidence.nonce == NONCE
        judged = judge(
            evidence.report,
            evidence.chain,
            nonce=NONCE,
            policy=Policy(),
            now=1_800_000_000.0,
            root_sha256=nvidia.device().root_sha256,
        )
        assert not [factor for factor in judged.factors if factor.verdict == "fail"]
    assert fake.open == fake.closed == 1


def test_structures_have_the_librarys_layout() -> None:
    assert ctypes.sizeof(SystemState) == 12
    assert ctypes.sizeof(GpuCertificate) == 9224
    assert GpuCertificate.attestation_chain.offset == 4104
    assert ctypes.sizeof(AttestationReport) == 12332
    assert (AttestationReport.nonce.offset, AttestationReport.report.offset) == (12, 44)


@pytest.mark.parametrize(
    ("fake", "what"),
    [
        (FakeNvml(cc_feature=0), "confidential computing"),
        (FakeNvml(dev_tools_mode=1), "developer tools"),
        (FakeNvml(environment=1), "environment"),
        (FakeNvml(environment=0), "environment"),
    ],
)
def test_refuses_gpus_in_another_mode(fake: FakeNvml, what: str) -> None:
    for ask in (lambda: gpus(fake).collect(NONCE), lambda: gpus(fake).confidential()):
        with pytest.raises(NotTrusted, match=what):
            ask()
    assert fake.open == fake.closed


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_refuses_a_nonce_of_another_size(size: int) -> None:
    fake = FakeNvml()
    with pytest.raises(WrongUse):
        gpus(fake).collect(bytes(size))
    assert fake.open == 0


def test_a_report_over_another_nonce_is_refused() -> None:
    with pytest.raises(MalformedEvidence, match="another question"):
        gpus(FakeNvml(report=lambda *_: nvidia.report(nonce=bytes(32)))).collect(NONCE)


@pytest.mark.parametrize("size", [0, 0x2001, 0xFFFFFFFF])
def test_a_length_beyond_the_buffer_is_refused(size: int) -> None:
    with pytest.raises(MalformedEvidence, match="length"):
        gpus(FakeNvml(claimed_size=size)).collect(NONCE)


def test_a_chain_that_is_no_pem_is_refused() -> None:
    with pytest.raises(MalformedEvidence):
        gpus(FakeNvml(chain=b"no certificates")).collect(NONCE)


@given(st.binary(min_size=1, max_size=300))
def test_whatever_the_gpu_reports_only_our_errors_escape(report: bytes) -> None:
    with pytest.raises(CloisterError):
        gpus(FakeNvml(report=lambda *_: report)).collect(NONCE)


@pytest.mark.parametrize(
    ("function", "code", "got"),
    [
        ("nvmlInit_v2", 9, "DRIVER_NOT_LOADED"),
        ("nvmlSystemGetConfComputeState", 3, "NOT_SUPPORTED"),
        ("nvmlDeviceGetConfComputeGpuCertificate", 4, "NO_PERMISSION"),
        ("nvmlDeviceGetConfComputeGpuAttestationReport", 15, "GPU_IS_LOST"),
        ("nvmlDeviceGetCount_v2", 77, "error 77"),
    ],
)
def test_the_drivers_refusals_are_told(function: str, code: int, got: str) -> None:
    fake = FakeNvml(code={function: code})
    with pytest.raises(ConnectionFailed) as caught:
        gpus(fake).collect(NONCE)
    assert caught.value.got == got
    assert fake.open == fake.closed


def test_a_driver_too_old_for_a_function_is_told() -> None:
    with pytest.raises(ConnectionFailed) as caught:
        gpus(FakeNvml(code={"nvmlDeviceGetConfComputeGpuAttestationReport": -1})).collect(NONCE)
    assert "550" in caught.value.hint


def test_a_machine_without_the_library_is_told() -> None:
    def absent() -> Any:
        raise OSError("cannot open shared object file")

    with pytest.raises(ConnectionFailed) as caught:
        NvidiaGpus(absent).collect(NONCE)
    assert "driver" in caught.value.hint


def test_more_gpus_than_a_machine_has_are_refused() -> None:
    with pytest.raises(MalformedEvidence):
        gpus(FakeNvml(gpus=17)).collect(NONCE)


def test_no_gpu_is_no_evidence() -> None:
    assert gpus(FakeNvml(gpus=0)).collect(NONCE) == {}
    assert gpus(FakeNvml(gpus=2)).confidential() == 2
