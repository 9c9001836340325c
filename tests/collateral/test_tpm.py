"""A TPM's revocation lists: asked for where good certificates say, checked, kept, carried."""

import ssl
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from tests.collateral.service import NOW, Reply, Service, document, roots
from tests.vendors import intel
from tests.vendors.tpm import CA, DAY, EK, ZERO_PCRS, Maker, Tpm, pinned

from cloister.collateral import Addresses, Cache, Completed, Key, Vendor, complete, review, tpm
from cloister.collateral.pieces import Answer
from cloister.errors import ConnectionFailed, MalformedEvidence, NotTrusted
from cloister.evidence.document import Document, Item
from cloister.evidence.endorsements import MAX_LIST, Endorsements, parse_endorsements
from cloister.evidence.tpm import tpm_item
from cloister.verify.policy import Policy
from cloister.verify.tpm_certificates import ATTESTATION_KEY, judge_chain

PATH = "/pki/root.crl"
KEY = ec.generate_private_key(ec.SECP256R1()).public_key()
TDX = intel.tdx()


@pytest.fixture
def maker(service: Service) -> Maker:
    """Its certificates name a list on this machine."""
    return Maker(ca_terms=replace(CA, crl_address=service.url + PATH))


def vtpm(maker: Maker, *lists: bytes) -> Document:
    evidence = Tpm().certified(maker).evidence(bytes(32), ZERO_PCRS)
    items = {"statement": Item("application/json", b"{}"), "tpm": tpm_item(evidence)}
    return Document({**items, "endorsements": Endorsements(tpm_crls=lists).item()} if lists else items)


Ask = Callable[..., Completed]


@pytest.fixture
def ask(vendor: Vendor, cache: Cache, maker: Maker) -> Ask:
    believed = replace(roots(tdx=TDX), ak=pinned(maker.root))

    def ask(bare: Document, **changes: Any) -> Completed:
        return complete(bare, **{"vendor": vendor, "cache": cache, "roots": believed, "now": NOW, **changes})

    return ask


def lists_of(completed: Completed) -> tuple[bytes, ...]:
    item = completed.document.items.get("endorsements")
    return parse_endorsements(item.content).tpm_crls if item else ()


def sources(completed: Completed) -> list[str]:
    return [found.source for found in completed.found]


def verdict(maker: Maker, lists: Sequence[bytes]) -> str:
    judged = judge_chain(
        maker.chain(KEY), lists, purpose=ATTESTATION_KEY, roots=pinned(maker.root), policy=Policy(), now=NOW
    )
    return {factor.step: factor.verdict for factor in judged.factors}["evidence.crl"]


def test_the_list_is_fetched_kept_and_put_into_the_document(
    service: Service, maker: Maker, ask: Ask, cache: Cache
) -> None:
    service.serve({PATH: Reply(maker.crl())})
    bare = vtpm(maker)
    completed = ask(bare)
    assert (service.requests, sources(completed), completed.complaints) == ([PATH], ["vendor"], ())
    assert (verdict(maker, []), verdict(maker, lists_of(completed))) == ("fail", "pass")
    assert [str(entry.key) for entry in cache.entries()] == ["TPM revocation list (127.0.0.1)"]
    again = ask(bare, vendor=None)
    assert (sources(again), again.document) == (["cache"], completed.document)
    carried = ask(completed.document, vendor=None, cache=None)
    assert (sources(carried), carried.document) == (["document"], completed.document)
    assert service.requests == [PATH]


def test_beside_a_cpu_it_comes_with_the_cpus_collateral(service: Service, maker: Maker, ask: Ask) -> None:
    service.serve({PATH: Reply(maker.crl())})
    cpu = document(TDX.quote, Endorsements(intel=TDX.collateral))
    completed = ask(Document({**vtpm(maker).items, **cpu.items}))
    assert sources(completed) == ["document"] * 4 + ["vendor"]
    assert (completed.intel, len(lists_of(completed))) == (TDX.collateral, 1)


def test_a_genuine_list_that_revokes_is_kept_too(service: Service, maker: Maker, ask: Ask, cache: Cache) -> None:
    service.serve({PATH: Reply(maker.crl(maker.ca_terms.serial))})
    assert verdict(maker, lists_of(ask(vtpm(maker)))) == "fail"
    assert len([*cache.entries()]) == 1


def test_a_stale_list_in_the_document_gives_way_to_a_fresh_one(service: Service, maker: Maker, ask: Ask) -> None:
    service.serve({PATH: Reply(maker.crl())})
    stale, others = maker.crl(until=NOW - 1), [b"no list", Maker().crl(issuer="Somebody")]
    completed = ask(vtpm(maker, *others, stale))
    assert "out of date" in completed.complaints[0]
    assert lists_of(completed)[1:] == (*others, stale)
    assert verdict(maker, lists_of(completed)[:1]) == "pass"
    most = [maker.crl(until=NOW - at) for at in range(1, MAX_LIST + 1)]
    assert len(lists_of(ask(vtpm(maker, *most)))) == MAX_LIST


@pytest.mark.parametrize(
    "wrong",
    [
        lambda maker: Reply(maker.crl(until=NOW - 1)),
        lambda maker: Reply(maker.crl(since=NOW + 1)),
        lambda maker: Reply(maker.crl(key=ec.generate_private_key(ec.SECP256R1()))),
        lambda maker: Reply(maker.crl(issuer="Somebody")),
        lambda maker: Reply(maker.crl(critical=x509.DeltaCRLIndicator(1))),
        lambda maker: Reply(maker.crl()[:-1]),
        lambda maker: Reply(b"<html>"),
        lambda maker: Reply(bytes(600 << 10)),
        lambda maker: Reply(status=404),
        lambda maker: Reply(status=302, headers={"Location": "/else"}),
    ],
)
def test_what_is_not_the_issuers_own_is_not_kept_and_stops_nothing(
    service: Service, maker: Maker, ask: Ask, cache: Cache, wrong: Callable[[Maker], Reply]
) -> None:
    service.serve({PATH: wrong(maker)})
    bare = vtpm(maker)
    completed = ask(bare)
    assert (completed.document, [*cache.entries()], len(completed.complaints)) == (bare, [], 1)
    assert service.requests == [PATH]


def test_nobody_is_asked_for_certificates_that_cannot_be_believed(service: Service, maker: Maker, ask: Ask) -> None:
    service.serve({PATH: Reply(maker.crl())})
    expired = replace(maker, ca_terms=replace(maker.ca_terms, until=NOW - 1))
    bare = vtpm(expired)
    assert ask(bare, roots=replace(roots(), ak=pinned(expired.root))) == Completed(bare)
    for bare in (
        vtpm(Maker(ca_terms=maker.ca_terms)),
        Document({"tpm": Item("application/cbor", b"\xa0")}),
        Document({"tpm": tpm_item(Tpm().evidence(bytes(32), ZERO_PCRS))}),
    ):
        assert ask(bare) == Completed(bare)
    assert service.requests == []


@pytest.mark.parametrize(
    "address",
    [
        "ldap://127.0.0.1/x", "http:///x", "file:///etc/passwd", "http://user@127.0.0.1/x", "http://127.0.0.1:x/",
        "http://127.0.0.1/ x", "http://127.0.0.1/" + "x" * 150,
    ],
)  # fmt: skip
def test_an_address_that_is_not_plain_is_not_asked(maker: Maker, address: str) -> None:
    odd = replace(maker, ca_terms=replace(maker.ca_terms, crl_address=address))
    assert tpm.points_of(odd.chain(KEY), roots=pinned(odd.root), now=NOW) == ()
    good = replace(maker, ca_terms=replace(maker.ca_terms, crl_address="http://127.0.0.1/" + "x" * 133))
    assert len(tpm.points_of(good.chain(KEY), roots=pinned(good.root), now=NOW)) == 1


def test_the_longest_of_the_providers_addresses_is_a_key_and_back() -> None:
    address = "http://privateca-content-62d71773-0000-21da-852e-f4f5e80d7778.storage.googleapis.com/032bf9d39db4fa06aade/crl.crl"
    maker = Maker(ca_terms=replace(CA, crl_address=address))
    (point,) = tpm.points_of(maker.chain(KEY), roots=pinned(maker.root), now=NOW)
    assert (tpm.address_of(point.key), Addresses().of(point.key)) == (address, address)
    assert len(f"{point.key.platform}.json") < 255
    assert point.key.about.endswith(".storage.googleapis.com")


@pytest.mark.parametrize("key", [("crl", "a"), ("crl", "1"), ("list", "nb2hi4b2f4xq"), ("crl", "nrsgc4b2f4xwc")])
def test_a_key_that_is_no_lists_has_no_address(key: tuple[str, str]) -> None:
    with pytest.raises(MalformedEvidence):
        tpm.address_of(Key("tpm", *key))
    assert str(Key("tpm", *key))


def test_a_list_is_filed_under_what_its_certificates_name(maker: Maker) -> None:
    (point,) = tpm.points_of(maker.chain(KEY), roots=pinned(maker.root), now=NOW)
    elsewhere = Maker(ca_terms=replace(CA, crl_address="http://elsewhere.example/"))
    (other,) = tpm.points_of(elsewhere.chain(KEY), roots=pinned(elsewhere.root), now=NOW)
    with pytest.raises(NotTrusted, match="No certificate"):
        tpm.check(other.key, Answer(maker.crl(), point.chain), roots=pinned(maker.root), now=NOW)
    for chain in (b"", other.chain):
        with pytest.raises((NotTrusted, MalformedEvidence)):
            tpm.check(point.key, Answer(maker.crl(), chain), roots=pinned(maker.root), now=NOW)
    with pytest.raises(NotTrusted):
        ek = maker.chain(KEY, EK)
        tpm.check(point.key, replace(Answer(maker.crl()), chain=_pem(ek)), roots=pinned(maker.root), now=NOW)


def _pem(ders: Sequence[bytes]) -> bytes:
    return "".join(map(ssl.DER_cert_to_PEM_cert, ders)).encode()


def test_a_review_judges_lists_too(service: Service, maker: Maker, ask: Ask, cache: Cache) -> None:
    service.serve({PATH: Reply(maker.crl())})
    ask(vtpm(maker))
    believed = replace(roots(), ak=pinned(maker.root))
    assert [each.problem for each in review(cache, roots=believed, now=NOW)] == [""]
    assert [each.piece for each in review(cache, roots=believed, now=NOW + 2 * DAY)] == [None]
    assert [each.piece for each in review(cache, now=NOW)] == [None]


def test_an_unreachable_issuer_is_told(maker: Maker, ask: Ask, vendor: Vendor) -> None:
    gone = replace(maker, ca_terms=replace(maker.ca_terms, crl_address="http://127.0.0.1:9/crl"))
    (point,) = tpm.points_of(gone.chain(KEY), roots=pinned(gone.root), now=NOW)
    with pytest.raises(ConnectionFailed):
        vendor.get(point.key)
    assert "could not be reached" in ask(vtpm(gone), roots=replace(roots(), ak=pinned(gone.root))).complaints[0]
