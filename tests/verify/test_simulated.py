import base64
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from tests.verify.world import World, failures, replaced

from cloister.errors import MalformedEvidence, MalformedPolicy, VerificationFailed
from cloister.evidence.document import Document
from cloister.evidence.simulated import SimBody, endorsements_item, parse_report, report_item, signed_bytes


def signed(world: World, body: SimBody) -> bytes:
    """By the genuine chip, as only broken hardware would."""
    encoded = body.encode()
    r, s = decode_dss_signature(world.device._keys.chip_key.sign(signed_bytes(encoded), ec.ECDSA(hashes.SHA384())))
    return report_item(encoded, r.to_bytes(48, "big") + s.to_bytes(48, "big")).content


def refused(world: World, document: Document) -> set[str]:
    with pytest.raises(VerificationFailed) as caught:
        world.verify(document)
    return set(failures(caught.value))


def test_a_report_that_contradicts_itself_is_refused(world: World) -> None:
    document = world.document()
    body = replace(parse_report(document.items["cpu"].content).body, measurement=bytes(32))
    assert refused(world, replaced(document, "cpu", signed(world, body))) == {"evidence.measurement"}


def test_the_signature_is_over_a_domain_of_its_own(world: World) -> None:
    document = world.document()
    encoded = parse_report(document.items["cpu"].content).encoded
    r, s = decode_dss_signature(world.device._keys.chip_key.sign(encoded, ec.ECDSA(hashes.SHA384())))
    report = report_item(encoded, r.to_bytes(48, "big") + s.to_bytes(48, "big")).content
    assert refused(world, replaced(document, "cpu", report)) == {"evidence.signature"}


@pytest.mark.parametrize("half", [bytes(48), b"\xff" * 48])
def test_signature_values_out_of_range_are_refused(world: World, half: bytes) -> None:
    document = world.document()
    encoded = parse_report(document.items["cpu"].content).encoded
    assert refused(world, replaced(document, "cpu", report_item(encoded, half * 2).content)) == {"evidence.signature"}


def test_the_root_itself_is_no_chip(world: World) -> None:
    root = world.device._keys.root.public_bytes(Encoding.DER)
    document = replaced(world.document(), "endorsements", endorsements_item([root]).content)
    assert refused(world, document) == {"evidence.chip-certificate", "evidence.signature"}


def test_a_chain_that_brings_its_own_root_is_refused(world: World, other_world: World) -> None:
    keys = other_world.device._keys
    chain = [certificate.public_bytes(Encoding.DER) for certificate in (keys.chip, keys.root)]
    with pytest.raises(MalformedEvidence, match="exactly one"):
        world.verify(replaced(other_world.document(), "endorsements", endorsements_item(chain).content))


def test_endorsements_of_another_media_type_are_refused(world: World) -> None:
    document = world.document()
    item = replace(document.items["endorsements"], media_type="application/pkix-cert")
    with pytest.raises(MalformedEvidence, match="missing"):
        world.verify(Document({**document.items, "endorsements": item}))


@pytest.mark.parametrize("pem", [b"", b"not PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_root_that_is_no_certificate_is_a_malformed_policy(world: World, pem: bytes) -> None:
    with pytest.raises(MalformedPolicy):
        replace(world, pins={"simulator_root": pem}).verify()


def test_a_root_of_another_version_is_a_malformed_policy(world: World) -> None:
    der = world.device._keys.root.public_bytes(Encoding.DER)
    other = der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x05", 1)
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(other) + b"-----END CERTIFICATE-----\n"
    with pytest.raises(MalformedPolicy):
        replace(world, pins={"simulator_root": pem}).verify()


def test_one_machine_has_one_id(world: World, other_world: World) -> None:
    def custody(which: World) -> str:
        return next(factor.got for factor in which.verify().factors if factor.step == "custody")

    assert custody(world) == custody(world) != custody(other_world)
