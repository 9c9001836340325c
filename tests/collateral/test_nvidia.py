"""NVIDIA's manifests: asked for, checked, kept, carried; and no condition where they are not to be had."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.collateral.service import NOW, Reply, Service, document, intel_replies, nvidia_replies, roots
from tests.vendors import intel
from tests.vendors import nvidia as maker
from tests.vendors.p384 import issue

from cloister.collateral import Addresses, Cache, Completed, Key, Vendor, complete, review
from cloister.collateral import nvidia as collateral
from cloister.collateral.pieces import Answer
from cloister.errors import CloisterError, MalformedEvidence, NotTrusted
from cloister.evidence.document import Document, Item
from cloister.evidence.endorsements import MAX_RIMS, Endorsements, parse_endorsements
from cloister.evidence.nvidia import GpuEvidence

DRIVER = Key("nvidia", "gpu-driver", "gh100-590-12")
VBIOS = Key("nvidia", "gpu-vbios", "g520-0200-885-9600a50001")
RIMS = maker.rims()
TDX = intel.tdx()
PATHS = [f"/v1/rim/{name}" for name in RIMS]
DAY = 86400.0


def gpu(**report: Any) -> Item:
    made = maker.report(**{"fields": maker.BOARD_FIELDS, **report})
    return GpuEvidence(made, maker.chain(), maker.NONCE).item()


GPU = gpu()


def with_gpus(carried: Endorsements | None = None, *gpus: Item) -> Document:
    given = replace(carried or Endorsements(), intel=TDX.collateral)
    items = {f"gpu-{at}": each for at, each in enumerate(gpus or (GPU,))}
    return Document({**document(TDX.quote, given).items, **items})


Ask = Callable[..., Completed]


@pytest.fixture
def ask(vendor: Vendor, cache: Cache) -> Ask:
    believed = replace(roots(tdx=TDX), rim=maker.rim_signer().root_sha256)

    def ask(bare: Document, **changes: Any) -> Completed:
        return complete(bare, **{"vendor": vendor, "cache": cache, "roots": believed, "now": NOW, **changes})

    return ask


def rims_of(completed: Completed) -> dict[str, bytes]:
    return dict(parse_endorsements(completed.document.items["endorsements"].content).rims)


def sources(completed: Completed) -> list[str]:
    return [found.source for found in completed.found if found.piece.key.vendor == "nvidia"]


@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        (DRIVER, maker.DRIVER_RIM, "NVIDIA driver manifest (GH100 590.12)"),
        (VBIOS, maker.VBIOS_RIM, "NVIDIA VBIOS manifest (G520 0200 885 9600A50001)"),
        (Key("nvidia", "gpu-cc-driver", "gb100-575-32"), "NV_GPU_CC_DRIVER_GB100_575.32", "NVIDIA driver manifest (GB100 575.32)"),
        (Key("nvidia", "switch-bios", "5612-0002-890-9610550001"), "NV_SWITCH_BIOS_5612_0002_890_9610550001", "NVIDIA switch manifest (5612 0002 890 9610550001)"),
    ],
)  # fmt: skip
def test_each_manifest_has_nvidias_own_address(key: Key, name: str, words: str) -> None:
    assert Addresses().of(key) == f"https://rim.attestation.nvidia.com/v1/rim/{name}"
    assert Addresses(nvidia="https://mirror.example/").of(key) == f"https://mirror.example/v1/rim/{name}"
    assert str(key) == words


@pytest.mark.parametrize(
    "key", [("gpu-driver", "gb100-590-12"), ("gpu-vbios", "g520"), ("ids", "x"), ("gpu-driver", "gh100-a-b")]
)
def test_a_key_that_is_no_manifests_has_no_name(key: tuple[str, str]) -> None:
    with pytest.raises(MalformedEvidence):
        collateral.name_of(Key("nvidia", *key))


def test_manifests_are_fetched_kept_and_put_into_the_document(service: Service, ask: Ask, cache: Cache) -> None:
    service.serve(nvidia_replies(RIMS))
    completed = ask(with_gpus())
    assert (service.requests, sources(completed), rims_of(completed)) == (PATHS, ["vendor"] * 2, RIMS)
    assert completed.intel == TDX.collateral
    assert {entry.key for entry in cache.entries()} == {DRIVER, VBIOS}
    again = ask(with_gpus(), vendor=None)
    assert (sources(again), again.document) == (["cache"] * 2, completed.document)
    service.requests.clear()
    carried = ask(completed.document, cache=None)
    assert (service.requests, sources(carried), carried.document) == ([], ["document"] * 2, completed.document)


def test_two_of_a_kind_are_asked_about_once_and_two_kinds_twice(service: Service, ask: Ask) -> None:
    other = {**maker.BOARD_FIELDS, 6: bytes.fromhex("00a5009602000000")}
    more = {
        "NV_GPU_VBIOS_G520_0200_885_9600A50002": maker.signed_manifest(
            maker.manifest("96.00.A5.00.02", maker.VBIOS_GOLDEN)
        )
    }
    service.serve(nvidia_replies({**RIMS, **more}))
    completed = ask(with_gpus(None, gpu(), gpu(), gpu(fields=other)), cache=None)
    assert rims_of(completed) == {**RIMS, **more}
    assert len(service.requests) == 4


def test_what_is_wrong_in_the_document_is_fetched_anew(service: Service, ask: Ask) -> None:
    service.serve(nvidia_replies(RIMS))
    wrong = Endorsements(rims={maker.DRIVER_RIM: RIMS[maker.VBIOS_RIM], maker.VBIOS_RIM: RIMS[maker.VBIOS_RIM]})
    completed = ask(with_gpus(wrong))
    assert (sources(completed), rims_of(completed)) == (["vendor", "document"], RIMS)
    assert "another driver" in completed.complaints[0]


@pytest.mark.parametrize("missing", RIMS)
def test_one_that_nvidia_does_not_know_leaves_none_and_stops_nothing(service: Service, ask: Ask, missing: str) -> None:
    service.serve({**nvidia_replies({name: rim for name, rim in RIMS.items() if name != missing})})
    bare = with_gpus()
    completed = ask(bare)
    assert completed.document is bare
    assert "The vendor does not know NVIDIA" in completed.complaints[0]
    assert len(completed.found) == 4


def test_offline_and_without_a_cache_the_rest_is_as_before(ask: Ask) -> None:
    bare = with_gpus()
    completed = ask(bare, vendor=None)
    assert completed.document is bare
    assert "may not be asked" in completed.complaints[0]


def test_certificates_spelt_in_another_way_are_the_same_certificates() -> None:
    """They lie outside what is signed: whoever carries a manifest may write them as XML allows."""
    plain = RIMS[maker.DRIVER_RIM]
    spelt = plain.replace(b"<ds:X509Certificate>", b'<ds:X509Certificate Id="x" >')
    assert spelt != plain
    root = maker.rim_signer().root_sha256
    found = [collateral.check(DRIVER, Answer(body), root_sha256=root, now=NOW) for body in (plain, spelt)]
    assert (found[0].issued, found[0].next_update) == (found[1].issued, found[1].next_update)


FORGED = maker.signed_manifest(issued=issue(maker.RIM_LINKS))
WRONG: dict[str, Reply] = {
    "another root": nvidia_replies({"x": FORGED})["/v1/rim/x"],
    "changed": nvidia_replies({"x": RIMS[maker.DRIVER_RIM].replace(b'index="99"', b'index="98"')})["/v1/rim/x"],
    "another driver": nvidia_replies({"x": maker.signed_manifest(maker.manifest("590.13"))})["/v1/rim/x"],
    "another chip": nvidia_replies({"x": maker.signed_manifest(maker.manifest(product="GB100"))})["/v1/rim/x"],
    "a VBIOS": nvidia_replies({"x": RIMS[maker.VBIOS_RIM]})["/v1/rim/x"],
    "no manifest": Reply(b"{}"),
    "no base64": Reply(json.dumps({"rim": "?"}).encode()),
    "no text": Reply(json.dumps({"rim": 1}).encode()),
    "no JSON": Reply(b"<html>"),
    "no XML": nvidia_replies({"x": b"plain"})["/v1/rim/x"],
    "an error": Reply(status=500),
    "too much": Reply(bytes(600 << 10)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_nothing_that_is_not_nvidias_own_is_kept(service: Service, ask: Ask, cache: Cache, wrong: str) -> None:
    service.serve({**nvidia_replies(RIMS), PATHS[0]: WRONG[wrong]})
    completed = ask(with_gpus())
    assert [entry.key for entry in cache.entries()] == []
    assert (rims_of(completed), len(completed.complaints)) == ({}, 1)


def test_a_vbios_of_another_version_is_refused() -> None:
    other = maker.signed_manifest(maker.manifest("96.00.A5.00.02", maker.VBIOS_GOLDEN))
    with pytest.raises(NotTrusted, match="another driver or VBIOS"):
        collateral.check(VBIOS, Answer(other), root_sha256=maker.rim_signer().root_sha256, now=NOW)


def test_a_manifest_lives_as_long_as_its_signers() -> None:
    known = {"root_sha256": maker.rim_signer().root_sha256}
    piece = collateral.check(DRIVER, Answer(RIMS[maker.DRIVER_RIM]), now=NOW, **known)
    assert (piece.issued, piece.next_update) == (NOW - DAY, NOW + DAY)
    for then in (NOW - 2 * DAY, NOW + 2 * DAY):
        with pytest.raises(NotTrusted):
            collateral.check(DRIVER, Answer(RIMS[maker.DRIVER_RIM]), now=then, **known)


def test_without_the_extra_nobody_is_asked_nothing_is_kept_and_it_is_said(
    service: Service, ask: Ask, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.verify.rim.judgeable", lambda: False)
    service.serve(nvidia_replies(RIMS))
    bare = with_gpus()
    completed = ask(bare)
    assert (service.requests, completed.document, [*cache.entries()]) == ([], bare, [])
    assert "pip install 'cloister[rim]'" in completed.complaints[-1]
    assert ask(with_gpus(None, Item("application/cbor", b"\xa0"))).complaints == ()


def test_a_device_that_nobody_can_name_or_read_needs_none(service: Service, ask: Ask) -> None:
    for odd in (gpu(fields=maker.GPU_FIELDS), Item("application/cbor", b"\xa0"), Item("application/cbor", b"")):
        bare = with_gpus(None, odd)
        assert ask(bare).document is bare
    assert service.requests == []


def test_no_more_manifests_than_a_document_holds(service: Service, ask: Ask) -> None:
    full = Endorsements(rims={f"NV_{at}": b"<a/>" for at in range(MAX_RIMS - 1)})
    service.serve(nvidia_replies(RIMS))
    bare = with_gpus(full)
    completed = ask(bare)
    assert completed.document is bare
    assert "no document holds as many" in completed.complaints[-1]


def test_a_failure_of_the_cpus_collateral_is_still_raised(service: Service, ask: Ask) -> None:
    service.serve(nvidia_replies(RIMS))
    without = {label: item for label, item in with_gpus().items.items() if label != "endorsements"}
    with pytest.raises(CloisterError):
        ask(Document(without))
    service.serve(intel_replies(TDX))
    assert rims_of(ask(Document(without))) == RIMS


def test_a_review_judges_manifests_too(service: Service, ask: Ask, cache: Cache) -> None:
    service.serve(nvidia_replies(RIMS))
    ask(with_gpus())
    believed = replace(roots(), rim=maker.rim_signer().root_sha256)
    assert [each.problem for each in review(cache, roots=believed, now=NOW)] == ["", ""]
    assert all(each.problem for each in review(cache, now=NOW))
