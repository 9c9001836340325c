import json
import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.errors import MalformedEvidence, NotTrusted
from cloister.evidence.receipt import Receipt, find_comment, open_receipt, parse_delivered, salted
from cloister.evidence.strict_json import b64url, from_b64url

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
RECEIPT = Receipt("aa" * 32, "bb" * 32, ("cc" * 32,), "dd" * 32, 1_800_000_000)
JWS = RECEIPT.sign(KEY.sign)


def test_what_is_signed_is_what_is_read() -> None:
    assert open_receipt(JWS, PUBLIC) == RECEIPT


def test_every_part_is_under_the_signature() -> None:
    for at in range(len(JWS)):
        changed = JWS[:at] + ("A" if JWS[at] != "A" else "B") + JWS[at + 1 :]
        with pytest.raises((MalformedEvidence, NotTrusted)):
            open_receipt(changed, PUBLIC)


def test_another_key_is_not_believed() -> None:
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    with pytest.raises(NotTrusted) as caught:
        open_receipt(JWS, other)
    assert caught.value.step == "receipt.signature"


def signed(header: object, payload: object) -> str:
    text = ".".join(b64url(json.dumps(part).encode()) for part in (header, payload))
    return f"{text}.{b64url(KEY.sign(text.encode()))}"


HEADER, PAYLOAD, _ = (part for part in JWS.split("."))
HEADER_MEMBERS = json.loads(from_b64url(HEADER, what="header"))
MEMBERS = json.loads(from_b64url(PAYLOAD, what="payload"))


def test_the_test_signs_as_the_code_does() -> None:
    assert open_receipt(signed(HEADER_MEMBERS, MEMBERS), PUBLIC) == RECEIPT


@pytest.mark.parametrize("header", [{"alg": "none"}, {"alg": "EdDSA"}, {**HEADER_MEMBERS, "jwk": {}}, {}])
def test_refuses_another_kind_of_signature(header: object) -> None:
    with pytest.raises(MalformedEvidence):
        open_receipt(signed(header, MEMBERS), PUBLIC)


@pytest.mark.parametrize(
    "change",
    [
        {"statement_sha256": "dd" * 9000},
        {"v": 2},
        {"more": 1},
        {"iat": -1},
        {"iat": "1"},
        {"models": "cc"},
        {"models": ["cc"]},
        {"request_sha256": "AA" * 32},
    ],
)
def test_refuses_other_members(change: dict[str, object]) -> None:
    with pytest.raises(MalformedEvidence):
        open_receipt(signed(HEADER_MEMBERS, {**MEMBERS, **change}), PUBLIC)


@pytest.mark.parametrize("jws", ["", "a.b", "a.b.c.d", "....", JWS + "=", "é" + JWS, "x" * 9000])
def test_refuses_what_is_no_jws(jws: str) -> None:
    with pytest.raises(MalformedEvidence):
        open_receipt(jws, PUBLIC)


def test_finds_the_last_receipt_of_a_stream_and_what_stands_before_it() -> None:
    salt = os.urandom(32)
    events = b"data: 1\n\n: cloister-receipt x y\n\ndata: 2\n\n:      \n\n"
    comment = f": cloister-receipt {JWS} {b64url(salt)}\n\n:   \n\n".encode()
    content, delivered = find_comment(events + comment)
    assert (content, delivered.jws, delivered.salt) == (events, JWS, salt)


@pytest.mark.parametrize("content", [b"", b"data: : cloister-receipt a b\n\n", b"data: 1\n\n"])
def test_a_stream_without_a_receipt_is_told(content: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        find_comment(content)


@pytest.mark.parametrize("text", ["", JWS, f"{JWS} AAAA", f"{JWS} {b64url(bytes(33))}", f"{JWS}  {b64url(bytes(32))}"])
def test_refuses_what_has_no_salt(text: str) -> None:
    with pytest.raises(MalformedEvidence):
        parse_delivered(text)


def test_the_same_content_has_another_digest_under_another_salt() -> None:
    assert salted(bytes(32), b"x") != salted(bytes(31) + b"\1", b"x")
