import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hpke as oracle
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from tests.channel.vectors import HPKE, HPKE_INFO, HPKE_PLAINTEXT

from cloister.channel.hpke import (
    AEADS,
    KEM_X25519,
    KEM_XWING,
    KEMS,
    PrivateKey,
    X25519Key,
    XWingKey,
    generate,
    setup_receiver,
    setup_sender,
)
from cloister.errors import ChannelBroken, MalformedMessage

KEY_BYTES = [b"\x11" * 32, b"\x22" * 32]

XWING = json.loads((Path(__file__).parent / "xwing_vectors.json").read_text())["vectors"]


def fixed(value: bytes) -> Any:
    return lambda length: value[:length]


@pytest.mark.parametrize("vector", HPKE, ids=["A.1.1", "A.2.1"])
def test_rfc9180_vectors(vector: Any) -> None:
    key = X25519Key(bytes.fromhex(vector["sk_r"]))
    info, plaintext = bytes.fromhex(HPKE_INFO), bytes.fromhex(HPKE_PLAINTEXT)
    assert key.public.hex() == vector["pk_r"]
    enc, sender = setup_sender(
        KEM_X25519, vector["aead_id"], key.public, info, entropy=fixed(bytes.fromhex(vector["sk_e"]))
    )
    assert enc.hex() == vector["enc"]
    assert key.decapsulate(enc).hex() == vector["shared_secret"]
    receiver = setup_receiver(key, vector["aead_id"], enc, info)
    for number in range(max(vector["encryptions"]) + 1):
        aad = b"Count-%d" % number
        sealed = sender.seal(aad, plaintext)
        if number in vector["encryptions"]:
            assert sealed.hex() == vector["encryptions"][number]
        assert receiver.open(aad, sealed) == plaintext
    for exporter_context, value in vector["exports"].items():
        assert sender.export(bytes.fromhex(exporter_context), 32).hex() == value
        assert receiver.export(bytes.fromhex(exporter_context), 32).hex() == value


@pytest.mark.parametrize("vector", XWING, ids=lambda vector: vector["seed"][:8])
def test_xwing_receiver_vector(vector: dict[str, str]) -> None:
    key = XWingKey(bytes.fromhex(vector["seed"]))
    assert key.public.hex() == vector["public"]
    assert key.decapsulate(bytes.fromhex(vector["enc"])).hex() == vector["shared_secret"]


def oracle_suite(kem_id: int, aead_id: int) -> oracle.Suite:
    kem = oracle.KEM.X25519 if kem_id == KEM_X25519 else oracle.KEM.MLKEM768_X25519
    aead = {1: oracle.AEAD.AES_128_GCM, 2: oracle.AEAD.AES_256_GCM, 3: oracle.AEAD.CHACHA20_POLY1305}[aead_id]
    return oracle.Suite(kem, oracle.KDF.HKDF_SHA256, aead)


def oracle_private(kem_id: int, seed: bytes) -> Any:
    if kem_id == KEM_X25519:
        return X25519PrivateKey.from_private_bytes(seed)
    expanded = hashlib.shake_256(seed).digest(96)
    return oracle.MLKEM768X25519PrivateKey(
        MLKEM768PrivateKey.from_seed_bytes(expanded[:64]), X25519PrivateKey.from_private_bytes(expanded[64:])
    )


def oracle_public(key: PrivateKey) -> Any:
    x25519 = X25519PublicKey.from_public_bytes(key.public[-32:])
    if key.kem_id == KEM_X25519:
        return x25519
    return oracle.MLKEM768X25519PublicKey(MLKEM768PublicKey.from_public_bytes(key.public[:-32]), x25519)


@pytest.mark.parametrize("kem_id", KEMS)
@pytest.mark.parametrize("aead_id", AEADS)
def test_agrees_with_the_librarys_single_shot_in_both_directions(kem_id: int, aead_id: int) -> None:
    seed, info, plaintext = os.urandom(32), b"some info", b"some text"
    key, suite = generate(kem_id, fixed(seed)), oracle_suite(kem_id, aead_id)
    enc, sender = setup_sender(kem_id, aead_id, key.public, info, entropy=os.urandom)
    assert len(enc) == KEMS[kem_id].enc_length
    assert suite.decrypt(enc + sender.seal(b"", plaintext), oracle_private(kem_id, seed), info) == plaintext
    theirs = suite.encrypt(plaintext, oracle_public(key), info)
    enc, sealed = theirs[: len(enc)], theirs[len(enc) :]
    assert setup_receiver(key, aead_id, enc, info).open(b"", sealed) == plaintext


@pytest.mark.parametrize("kem_id", KEMS)
def test_what_fails_to_open_says_the_same_whatever_failed(kem_id: int) -> None:
    key = generate(kem_id, os.urandom)
    enc, sender = setup_sender(kem_id, 2, key.public, b"info", entropy=os.urandom)
    sealed = sender.seal(b"aad", b"text")
    flipped = bytes([enc[0] ^ 1]) + enc[1:]
    said = set()
    attempts = [
        (enc, b"other", b"aad", sealed),
        (enc, b"info", b"other", sealed),
        (enc, b"info", b"aad", sealed[:-1]),
        (enc, b"info", b"aad", b""),
        (flipped, b"info", b"aad", sealed),
        (enc[:-1], b"info", b"aad", sealed),
        (enc[:-32] + bytes(32), b"info", b"aad", sealed),
    ]
    for their_enc, info, aad, ciphertext in attempts:
        with pytest.raises(ChannelBroken) as caught:
            setup_receiver(key, 2, their_enc, info).open(aad, ciphertext)
        said.add((str(caught.value), type(caught.value), caught.value.step, caught.value.__cause__))
    assert len(said) == 1


def test_a_failed_opening_does_not_move_the_sequence() -> None:
    key = X25519Key(KEY_BYTES[0])
    enc, sender = setup_sender(KEM_X25519, 2, key.public, b"", entropy=fixed(KEY_BYTES[1]))
    receiver = setup_receiver(key, 2, enc, b"")
    first, second = sender.seal(b"", b"1"), sender.seal(b"", b"2")
    with pytest.raises(ChannelBroken):
        receiver.open(b"", second)
    assert (receiver.open(b"", first), receiver.open(b"", second)) == (b"1", b"2")


@pytest.mark.parametrize(
    ("kem_id", "public"), [(KEM_X25519, bytes(32)), (KEM_X25519, b"1"), (KEM_XWING, b"\xff" * 1216)]
)
def test_rejects_a_public_key_that_is_none(kem_id: int, public: bytes) -> None:
    with pytest.raises(MalformedMessage):
        setup_sender(kem_id, 2, public, b"", entropy=os.urandom)
