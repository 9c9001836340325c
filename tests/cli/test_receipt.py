"""The judgement of `cloister receipt verify`; with real enclaves it is seen in tests/end_to_end/test_receipts.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.verify.world import World, make_device

from cloister.cli.receipt import check, save
from cloister.cli.receipt_file import Kept
from cloister.cli.verify import Saved
from cloister.errors import MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.receipt import COMMENT, Delivered, Receipt, salted
from cloister.evidence.strict_json import b64url
from cloister.verify import Verified

KEY = Ed25519PrivateKey.generate()
SALT = bytes(range(32))
REQUEST, ANSWER = b"question", b"answer"
OTHER = "77" * 32


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Verified:
    world = World(make_device(tmp_path_factory.mktemp("device")))
    return world.with_statement(receipt_key=KEY.public_key().public_bytes_raw()).verify()


@pytest.fixture
def genuine(verified: Verified) -> Receipt:
    return Receipt(
        request_sha256=salted(SALT, REQUEST),
        response_sha256=salted(SALT, ANSWER),
        models=tuple(model.sha256 for model in verified.statement.models),
        statement_sha256=verified.statement_sha256,
        iat=7,
    )


def test_believes_what_the_verified_enclave_signed_about_these_contents(verified: Verified, genuine: Receipt) -> None:
    assert check(Delivered(genuine.sign(KEY.sign), SALT), verified, REQUEST, ANSWER) == genuine


@pytest.mark.parametrize(
    ("change", "step"),
    [
        ({"statement_sha256": OTHER}, "receipt.statement"),
        ({"models": (OTHER,)}, "receipt.models"),
        ({"models": ()}, "receipt.models"),
        ({"request_sha256": OTHER}, "receipt.request"),
        ({"response_sha256": OTHER}, "receipt.response"),
    ],
)
def test_refuses_one_that_says_anything_else(
    verified: Verified, genuine: Receipt, change: dict[str, Any], step: str
) -> None:
    delivered = Delivered(replace(genuine, **change).sign(KEY.sign), SALT)
    with pytest.raises(NotTrusted) as caught:
        check(delivered, verified, REQUEST, ANSWER)
    assert caught.value.step == step


def test_refuses_another_key_and_another_salt(verified: Verified, genuine: Receipt) -> None:
    with pytest.raises(NotTrusted) as caught:
        check(Delivered(genuine.sign(Ed25519PrivateKey.generate().sign), SALT), verified, REQUEST, ANSWER)
    assert caught.value.step == "receipt.signature"
    with pytest.raises(NotTrusted):
        check(Delivered(genuine.sign(KEY.sign), bytes(32)), verified, REQUEST, ANSWER)


def test_only_a_receipt_that_fits_is_saved(verified: Verified, genuine: Receipt, tmp_path: Path) -> None:
    events = ANSWER + b"\n\n"

    def kept(signed_for: bytes) -> Kept:
        jws = replace(genuine, response_sha256=salted(SALT, signed_for)).sign(KEY.sign)
        comment = COMMENT + jws.encode() + b" " + b64url(SALT).encode() + b"\n\n"
        return Kept(REQUEST, events + comment, Saved(b"document", bytes(32), 7.0))

    file = tmp_path / "receipt"
    with pytest.raises(NotTrusted):
        save((kept(b"another answer"), verified), file)
    with pytest.raises(MalformedEvidence):
        save((replace(kept(events), answer=events), verified), file)
    with pytest.raises(WrongUse, match="no answer with a receipt"):
        save(None, file)
    assert not file.exists()
    save((kept(events), verified), file)
    assert file.stat().st_mode & 0o777 == 0o600
