"""Whoever starts the same image as somebody else, or for another app, has another enclave; and clients see which."""

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from tests.deploy.test_gramine import ENCLAVE
from tests.vendors import intel
from tests.verify.world import LAUNCH, NONCE, NOW, OTHER_OWNER, OWNER, STATEMENT, failures

from cloister.deploy.gramine import render
from cloister.errors import VerificationFailed
from cloister.evidence.binding import report_data
from cloister.evidence.document import Document, Item
from cloister.evidence.endorsements import Endorsements
from cloister.evidence.launch import App, LaunchConfig, launch_digest
from cloister.verify import Policy, verify
from cloister.verify.roots import PINNED

OTHERS: dict[str, LaunchConfig] = {
    "owner": replace(LAUNCH, owner_key=OTHER_OWNER),
    "app": replace(LAUNCH, app=App("llm", "67" * 32)),
    "deployment": replace(LAUNCH, deployment="other-chat"),
}


def measured(launch: LaunchConfig) -> bytes:
    """In MRENCLAVE's place: like it, a digest over the manifest, which is all that differs between two deployments."""
    return hashlib.sha256(render(replace(ENCLAVE, launch=launch.encode())).encode()).digest()


def document(enclave: LaunchConfig, *, shown: LaunchConfig | None = None) -> Document:
    """Genuine hardware runs `enclave`; the host shows the launch config `shown`."""
    launch = (shown or enclave).encode()
    statement = replace(STATEMENT, launch_sha256=launch_digest(launch).hex()).encode()
    report = {"report_data": report_data(NONCE, statement), "mr_enclave": measured(enclave)}
    made = intel.sgx(report=report)
    return Document(
        {
            "statement": Item("application/json", statement),
            "launch": Item("application/json", launch),
            "cpu": Item("application/octet-stream", made.quote),
            "endorsements": Endorsements(intel=made.collateral).item(),
        }
    )


def policy(**more: Any) -> Policy:
    """What a client must name, and nothing else."""
    pinned: dict[str, str | int] = {
        "mr_enclave": measured(LAUNCH).hex(),
        "launch_sha256": launch_digest(LAUNCH.encode()).hex(),
    }
    return Policy(
        owner_key=OWNER,
        deployment=LAUNCH.deployment,
        app=LAUNCH.app.sha256,
        models=frozenset(LAUNCH.models),
        measurements={"sgx": (pinned,)},
        **more,
    )


def refused(shown: Document) -> set[str]:
    with pytest.raises(VerificationFailed) as caught:
        verify(shown, policy=policy(), nonce=NONCE, now=NOW, roots=replace(PINNED, intel=intel.sgx().root))
    return set(failures(caught.value))


def test_the_deployment_that_was_meant_is_accepted() -> None:
    roots = replace(PINNED, intel=intel.sgx().root)
    verified = verify(document(LAUNCH), policy=policy(), nonce=NONCE, now=NOW, roots=roots)
    assert verified.platform == "sgx"
    assert verified.measurement["mr_enclave"] == measured(LAUNCH).hex()


@pytest.mark.parametrize("what", OTHERS)
def test_the_same_image_for_another_is_refused(what: str) -> None:
    assert refused(document(OTHERS[what])) == {what, "measurement.mr_enclave", "measurement.launch_sha256"}


@pytest.mark.parametrize("what", OTHERS)
def test_the_same_image_for_another_that_shows_our_launch_config_is_refused(what: str) -> None:
    assert refused(document(OTHERS[what], shown=LAUNCH)) == {"measurement.mr_enclave"}


@pytest.mark.parametrize("what", OTHERS)
def test_our_image_under_anothers_launch_config_is_refused(what: str) -> None:
    assert refused(document(LAUNCH, shown=OTHERS[what])) == {what, "measurement.launch_sha256"}
