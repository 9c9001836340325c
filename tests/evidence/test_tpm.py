import json
from dataclasses import replace
from pathlib import Path

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import given
from hypothesis import strategies as st
from tests.vendors.tpm import ZERO_PCRS, Key, Tpm, quote, selection, sign

from cloister.errors import CloisterError, MalformedEvidence
from cloister.evidence.tpm import (
    ALG_NULL,
    ALG_RSAPSS,
    ALG_RSASSA,
    TpmEvidence,
    encode_rsassa,
    hash_name,
    parse_public,
    parse_quote,
    parse_signature,
    parse_tpm,
    public_area,
    sized,
    tpm_item,
)

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"

RSA = rsa.generate_private_key(65537, 2048)
TPM = Tpm()
EVIDENCE = TPM.evidence(bytes(range(32)))
ITEM = tpm_item(replace(EVIDENCE, certificates=(b"one", b"two"))).content
QUOTE = EVIDENCE.quote
AREA = TPM.area

# An RSA endorsement key, as the TCG's template L-1 has it (EK Credential Profile, annex B.3.3).
EK_HEAD = bytes.fromhex("0001000b000300b20020") + bytes(32) + bytes.fromhex("0006008000430010080000000000")


def rsa_area(*, bits: int = 2048, modulus: bytes | None = None, exponent: int = 0, scheme: bytes = b"\0\x10") -> bytes:
    unique = RSA.public_key().public_numbers().n.to_bytes(256, "big") if modulus is None else modulus
    head = bytes.fromhex("0001000b0005007200000010") + scheme
    return head + bits.to_bytes(2, "big") + exponent.to_bytes(4, "big") + sized(unique)


def container(**changes: object) -> bytes:
    return cbor2.dumps({**cbor2.loads(ITEM), **changes})


def test_the_container_round_trips() -> None:
    expected = replace(EVIDENCE, certificates=(b"one", b"two"))
    assert parse_tpm(ITEM) == replace(expected, pcrs=parse_tpm(ITEM).pcrs)
    assert dict(parse_tpm(ITEM).pcrs) == dict(expected.pcrs)


@pytest.mark.parametrize(
    "changes",
    [
        {"quote": "text"},
        {"signature": None},
        {"ak": 1},
        {"more": b""},
        {"pcrs": []},
        {"pcrs": {"24": bytes(32)}},
        {"pcrs": {"-1": bytes(32)}},
        {"pcrs": {"00": bytes(32)}},
        {"pcrs": {0: bytes(32)}},
        {"pcrs": {b"0": bytes(32)}},
        {"pcrs": {"1": bytes(32), "0": bytes(32)}},
        {"pcrs": {"0": bytes(20)}},
        {"pcrs": {"0": "x" * 32}},
        {"certificates": [b""] * 7},
        {"certificates": ["x"]},
        {"certificates": b"x"},
    ],
)
def test_refuses_containers_of_another_shape(changes: dict[str, object]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_tpm(container(**changes))


def test_refuses_a_container_over_64_kib() -> None:
    with pytest.raises(MalformedEvidence, match="too long"):
        parse_tpm(container(ak=bytes(65536)))


def test_reads_a_quote() -> None:
    parsed = parse_quote(quote(b"nonce", {8: bytes(32), 14: bytes(32)}))
    assert (parsed.magic, parsed.extra_data) == (0xFF544347, b"nonce")
    assert parsed.selections == ((0x000B, (8, 14)),)
    assert (parsed.clock, parsed.reset_count, parsed.restart_count, parsed.safe) == (1000, 1, 0, True)
    assert (parsed.firmware_version, len(parsed.pcr_digest), len(parsed.qualified_signer)) == (7, 32, 34)


@pytest.mark.parametrize(
    "data",
    [
        quote(b"", {}, kind=0x8017),
        quote(bytes(67), {}),
        quote(b"", {}, digest=bytes(65)),
        quote(b"", {}, selections=[selection([])] * 17),
        quote(b"", {}, selections=[selection([24], size=4)]),
        quote(b"", {}, selections=[selection([1], size=5)]),
        QUOTE.replace((1000).to_bytes(8, "big") + b"\0\0\0\1\0\0\0\0\1", (1000).to_bytes(8, "big") + bytes(8) + b"\2"),
        QUOTE + b"\0",
        b"",
    ],
    ids=["certify", "extra data", "digest", "banks", "PCR 24", "select size", "safe", "trailing", "empty"],
)
def test_refuses_quotes_of_another_shape(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_quote(data)


def test_reads_signatures_of_each_scheme() -> None:
    assert parse_signature(sign(b"x", RSA)).scheme == ALG_RSASSA
    assert parse_signature(sign(b"x", RSA, scheme=ALG_RSAPSS)).scheme == ALG_RSAPSS
    parsed = parse_signature(sign(b"x", ec.generate_private_key(ec.SECP384R1()), hash_id=0x000C))
    assert (parsed.hash, len(parsed.r), len(parsed.s)) == (0x000C, 48, 48)
    assert parse_signature(encode_rsassa(b"abc")).value == b"abc"


@pytest.mark.parametrize(
    "data",
    [
        bytes.fromhex("0010000b"),
        bytes.fromhex("001a000b") + sized(b"x") + sized(b"x"),
        bytes.fromhex("00140012") + sized(b"x"),
        bytes.fromhex("0014000b") + sized(bytes(513)),
        bytes.fromhex("0018000b") + sized(bytes(67)) + sized(b"x"),
        encode_rsassa(b"x") + b"\0",
    ],
    ids=["null", "ECDAA", "SM3", "RSA-8192", "r", "trailing"],
)
def test_refuses_signatures_of_another_shape(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_signature(data)


def test_reads_public_areas_with_and_without_their_length() -> None:
    curves = (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1())
    keys: list[Key] = [RSA, *(ec.generate_private_key(curve) for curve in curves)]
    for key in keys:
        area = public_area(key.public_key())
        assert parse_public(area) == parse_public(sized(area))
        assert parse_public(area).key == key.public_key()
        assert parse_public(area).attributes == 0x00050072


def test_an_attestation_key_has_no_symmetric_key_and_an_endorsement_key_has_one() -> None:
    assert parse_public(AREA).symmetric_bits == 0
    endorsement = parse_public(EK_HEAD + sized(RSA.public_key().public_numbers().n.to_bytes(256, "big")))
    assert (endorsement.symmetric_bits, endorsement.scheme, len(endorsement.auth_policy)) == (128, (ALG_NULL, 0), 32)


@pytest.mark.parametrize(
    "data",
    [
        b"\0\x08" + AREA[2:],
        AREA[:2] + b"\0\x12" + AREA[4:],
        AREA + b"\0",
        sized(AREA) + b"\0",
        sized(AREA + b"\0"),
        AREA[:-1] + bytes([AREA[-1] ^ 1]),
        AREA.replace(bytes.fromhex("0018000b0003"), bytes.fromhex("0018000b0010")),
        AREA.replace(bytes.fromhex("0018000b0003"), bytes.fromhex("001a000b0003")),
        AREA.replace(bytes.fromhex("0018000b00030010"), bytes.fromhex("0018000b00030020")),
        public_area(ec.generate_private_key(ec.SECP256R1()).public_key())[:-34] + sized(b"x"),
        rsa_area(bits=3072),
        rsa_area(bits=512, modulus=bytes(64)),
        rsa_area(modulus=bytes(256)),
        rsa_area(modulus=b"\0" + RSA.public_key().public_numbers().n.to_bytes(256, "big")),
        rsa_area(exponent=2),
        EK_HEAD.replace(b"\0\x06\0\x80", b"\0\x26\0\x80") + sized(bytes(256)),
        EK_HEAD.replace(b"\0\x06\0\x80", b"\0\x06\0\x40") + sized(bytes(256)),
    ],
    ids=[
        "keyed hash",
        "SM3 name",
        "trailing",
        "trailing after length",
        "trailing inside length",
        "off the curve",
        "unknown curve",
        "unknown scheme",
        "key derivation",
        "short coordinate",
        "lying about its bits",
        "RSA-512",
        "zero modulus",
        "modulus with a leading zero",
        "even exponent",
        "Camellia",
        "AES-64",
    ],
)
def test_refuses_public_areas_of_another_shape(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_public(data)


def test_refuses_a_point_whose_leading_zeros_are_left_out() -> None:
    """Otherwise one key would have two public areas, and two names."""
    keys = (ec.derive_private_key(value, ec.SECP256R1()).public_key() for value in range(1, 10_000))
    key = next(key for key in keys if key.public_numbers().y >> 248 == 0)
    area = public_area(key)
    assert parse_public(area).key == key
    with pytest.raises(MalformedEvidence):
        parse_public(area[:-34] + sized(area[-31:]))


def test_a_name_depends_on_every_byte_of_the_area() -> None:
    changed = public_area(TPM.key.public_key(), attributes=0x00050073)
    assert parse_public(AREA).name != parse_public(changed).name
    assert parse_public(AREA).name[:2] == b"\0\x0b"
    assert parse_public(AREA).name[2:].hex() == parse_public(AREA).name_digest


def test_unknown_things_have_no_name() -> None:
    with pytest.raises(MalformedEvidence):
        hash_name(0x0012)
    with pytest.raises(MalformedEvidence):
        public_area(ec.generate_private_key(ec.SECP224R1()).public_key())


def test_refuses_truncation_everywhere() -> None:
    signature = sign(b"x", RSA)
    for parse, data in (
        (parse_quote, QUOTE),
        (parse_signature, signature),
        (parse_signature, EVIDENCE.signature),
        (parse_public, AREA),
        (parse_public, sized(AREA)),
        (parse_public, rsa_area()),
        (parse_tpm, ITEM),
    ):
        for length in range(len(data)):
            with pytest.raises(MalformedEvidence):
                parse(data[:length])


@given(st.binary(max_size=200))
def test_is_total_over_bytes(data: bytes) -> None:
    for parse in (parse_quote, parse_signature, parse_public, parse_tpm):
        with pytest.raises(MalformedEvidence):
            parse(data)


@given(data=st.data())
def test_is_total_over_mangled_evidence(data: st.DataObject) -> None:
    parse, whole = data.draw(
        st.sampled_from(
            [(parse_quote, QUOTE), (parse_signature, EVIDENCE.signature), (parse_public, AREA), (parse_tpm, ITEM)]
        )
    )
    at = data.draw(st.integers(0, len(whole)))
    mangled = whole[:at] + data.draw(st.binary(max_size=6)) + whole[at + data.draw(st.integers(0, 6)) :]
    try:
        parse(mangled)
    except CloisterError:
        return


@pytest.mark.skipif(not VECTORS.is_dir(), reason="the real vectors are not beside this tree")
def test_the_name_of_a_real_attestation_key_is_computed_from_its_bare_key() -> None:
    folder = VECTORS / "vtpm" / "self" / "swtpm_rsa"
    key = load_pem_public_key((folder / "ak.pem").read_bytes())
    assert isinstance(key, rsa.RSAPublicKey)
    assert parse_public(public_area(key)).name == (folder / "ak.name").read_bytes()


@pytest.mark.skipif(not VECTORS.is_dir(), reason="the real vectors are not beside this tree")
def test_reads_a_real_quote() -> None:
    folder = VECTORS / "vtpm" / "self" / "swtpm_rsa"
    parsed = parse_quote((folder / "message.bin").read_bytes())
    assert parsed.extra_data.hex() == (folder / "nonce.hex").read_text().strip()
    indices = tuple(int(index) for index in json.loads((folder / "pcrs_sha256.json").read_text()))
    assert parsed.selections == ((0x000B, indices),)


def test_evidence_may_leave_out_the_key() -> None:
    bare = TpmEvidence(QUOTE, EVIDENCE.signature, ZERO_PCRS, b"")
    assert parse_tpm(tpm_item(bare).content).ak == b""
