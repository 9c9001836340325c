"""NVIDIA's reference manifests in a document: the step `gpu.rim` is a verdict where they are there, and not checked else."""

from dataclasses import replace
from typing import Any

import pytest
from tests.vendors import intel, nvidia
from tests.verify.test_appraisers import ROOTS
from tests.verify.world import NONCE, NOW

from cloister.errors import MalformedEvidence
from cloister.evidence.binding import gpu_nonce
from cloister.evidence.document import Document, Item
from cloister.evidence.endorsements import Endorsements
from cloister.evidence.nvidia import GpuEvidence
from cloister.verify import Policy
from cloister.verify.appraisers import Subject, appraise
from cloister.verify.factors import Factor

ROOTS_WITH_NVIDIA = replace(ROOTS, nvidia=nvidia.device().root_sha256, rim=nvidia.rim_signer().root_sha256)
RIMS = nvidia.rims()


def appraised(rims: dict[str, bytes], **report: Any) -> dict[str, Factor]:
    made = intel.tdx()
    nonce = gpu_nonce(NONCE, b"{}")
    signed = nvidia.report(nonce=nonce, **{"fields": nvidia.BOARD_FIELDS, **report})
    items = {
        "statement": Item("application/json", b"{}"),
        "cpu": Item("application/octet-stream", made.quote),
        "endorsements": Endorsements(intel=made.collateral, rims=rims).item(),
        "gpu-0": GpuEvidence(signed, nvidia.chain(), nonce).item(),
    }
    subject = Subject(document=Document(items), policy=Policy(), nonce=NONCE, now=NOW, roots=ROOTS_WITH_NVIDIA)
    return {factor.step: factor for factor in appraise(subject, subject.policy.measurements).factors}


def failed(factors: dict[str, Factor]) -> set[str]:
    return {step for step, factor in factors.items() if factor.verdict == "fail" and ".rim" in step}


def test_a_documents_manifests_are_what_the_gpu_is_held_against() -> None:
    factors = appraised(RIMS)
    assert (factors["gpu-0.gpu.rim"].verdict, factors["gpu-0.gpu.rim"].got) == ("pass", "48 reference values")
    assert factors["gpu-0.gpu.rim.root"].verdict == "pass"


def test_without_them_nothing_is_checked_and_it_says_so() -> None:
    for rims in ({}, {"NV_GPU_DRIVER_GH100_590.13": RIMS[nvidia.DRIVER_RIM]}):
        assert appraised(rims)["gpu-0.gpu.rim"].verdict == "not-checked"


def test_a_client_that_cannot_read_them_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.verify.rim.judgeable", lambda: False)
    factor = appraised(RIMS)["gpu-0.gpu.rim"]
    assert factor.verdict == "not-checked"
    assert "cloister[rim]" in factor.hint


def test_other_firmware_than_nvidias_is_refused() -> None:
    assert failed(appraised(RIMS, values=nvidia.measurements(m3=bytes(48)))) == {"gpu-0.gpu.rim"}


def test_one_manifest_of_two_convicts() -> None:
    assert failed(appraised({nvidia.DRIVER_RIM: RIMS[nvidia.DRIVER_RIM]})) == {"gpu-0.gpu.rim"}


def test_a_manifest_under_another_name_convicts() -> None:
    swapped = dict(zip(RIMS, reversed(RIMS.values()), strict=True))
    assert failed(appraised(swapped)) == set()  # both are judged for what they say, not for what they are called
    assert failed(appraised({**RIMS, nvidia.VBIOS_RIM: RIMS[nvidia.DRIVER_RIM]})) == {"gpu-0.gpu.rim"}


def test_a_manifest_that_is_not_nvidias_convicts() -> None:
    changed = RIMS[nvidia.VBIOS_RIM].replace(b'index="98"', b'index="97"').replace(b'index="99"', b'index="98"')
    assert failed(appraised({**RIMS, nvidia.VBIOS_RIM: changed})) == {"gpu-0.gpu.rim.signature", "gpu-0.gpu.rim"}
    with pytest.raises(MalformedEvidence):
        appraised({**RIMS, nvidia.VBIOS_RIM: b"<a/>"})
