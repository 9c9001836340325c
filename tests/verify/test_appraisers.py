"""What each label of a document must be, and how evidence of two kinds is joined; whole documents: `test_composition`."""

import hashlib

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from tests.vendors import intel, tpm
from tests.verify.world import NONCE, NOW

from cloister.evidence.binding import report_data
from cloister.evidence.document import Document, Item
from cloister.evidence.endorsements import Endorsements
from cloister.evidence.tpm import tpm_item
from cloister.verify import Policy
from cloister.verify.appraisers import Subject, appraise, check_labels
from cloister.verify.roots import Roots

RAW = "application/octet-stream"
CPU = Item(RAW, bytes.fromhex("0400020081000000"))
MAKER = tpm.Maker()
TPM = tpm.Tpm().certified(MAKER)
PCRS = {**tpm.ZERO_PCRS, 4: tpm.extended(b"loader")}
PCR_LOG = Item(RAW, tpm.event_log(tpm.event(4, b"loader")))
ROOTS = Roots(
    intel=intel.intel().certificate("root", intel.Settings()).public_bytes(Encoding.DER),
    amd={},
    nitro="",
    nvidia="",
    ak=tpm.pinned(MAKER.root),
)


def refused(items: dict[str, Item], policy: Policy | None = None) -> set[str]:
    subject = Subject(document=Document(items), policy=policy or Policy(), nonce=NONCE, now=NOW, roots=ROOTS)
    return {
        factor.step for factor in appraise(subject, subject.policy.measurements).factors if factor.verdict == "fail"
    }


@pytest.mark.parametrize("label", ["eventlog", "tpm", "endorsements", "gpu-0"])
def test_every_label_has_one_media_type(label: str) -> None:
    (factor,) = check_labels(Document({"cpu": CPU, label: Item("text/plain", b"")}))
    assert (factor.step, factor.verdict, factor.got) == (f"document.{label}", "fail", "text/plain")


def test_the_log_beside_a_tpm_in_front_of_a_trust_domain_is_the_tpms() -> None:
    made = intel.tdx()
    evidence = TPM.evidence(hashlib.sha256(made.quote).digest(), PCRS)
    endorsements = Endorsements(intel=made.collateral, tpm_crls=(MAKER.crl(),))
    items = {"cpu": Item(RAW, made.quote), "endorsements": endorsements.item(), "tpm": tpm_item(evidence)}
    assert refused(items) == set()
    assert refused({**items, "eventlog": PCR_LOG}) == set()
    other = Item(RAW, tpm.event_log(tpm.event(4, b"another loader")))
    assert refused({**items, "eventlog": other}) == {"tpm.evidence.eventlog"}


@pytest.mark.parametrize(
    ("platforms", "steps"),
    [
        (None, {"evidence.provider"}),
        (("tdx",), {"evidence.provider"}),
        (("azure-tdx", "tdx"), {"evidence.provider"}),
        (("vtpm",), set()),
    ],
)
def test_a_tpm_alone_is_believed_where_the_policy_names_it(platforms: tuple[str, ...] | None, steps: set[str]) -> None:
    evidence = TPM.evidence(report_data(NONCE, b"{}")[:32], PCRS)
    items = {
        "statement": Item("application/json", b"{}"),
        "tpm": tpm_item(evidence),
        "eventlog": PCR_LOG,
        "endorsements": Endorsements(tpm_crls=(MAKER.crl(),)).item(),
    }
    assert refused(items, Policy(platforms=platforms)) == steps


def test_a_log_beside_an_amd_report_is_its_tpms_and_nobodys_without_one() -> None:
    report, tpm_there = Item(RAW, bytes(1184)), Item("application/cbor", b"")
    assert [*check_labels(Document({"cpu": report, "tpm": tpm_there, "eventlog": PCR_LOG}))] == []
    (factor,) = check_labels(Document({"cpu": report, "eventlog": PCR_LOG}))
    assert (factor.step, factor.verdict) == ("document.eventlog", "fail")
