import hashlib

import pytest

from cloister.errors import MalformedEvidence
from cloister.evidence.binding import gpu_nonce, report_data

NONCE = bytes(range(32))
STATEMENT = b'{"v":1}'


def test_report_data_is_the_protocols_formula() -> None:
    statement, nothing = hashlib.sha256(STATEMENT).digest(), hashlib.sha256(b"").digest()
    expected = hashlib.sha512(b"cloister/attest/v1\x00\x20" + NONCE + statement + nothing).digest()
    assert report_data(NONCE, STATEMENT) == expected
    assert len(expected) == 64


def test_report_data_has_a_fixed_value() -> None:
    assert report_data(NONCE, STATEMENT).hex().startswith("29023866e532a2ecb23b61392ba13ed3")


def test_without_nonce_the_length_byte_says_so() -> None:
    statement, nothing = hashlib.sha256(STATEMENT).digest(), hashlib.sha256(b"").digest()
    assert report_data(b"", STATEMENT) == hashlib.sha512(b"cloister/attest/v1\x00\x00" + statement + nothing).digest()


def test_gpu_evidence_is_length_prefixed() -> None:
    gpus = hashlib.sha256(b"\x00\x00\x00\x02ab\x00\x00\x00\x00\x00\x00\x00\x01c").digest()
    statement = hashlib.sha256(STATEMENT).digest()
    expected = hashlib.sha512(b"cloister/attest/v1\x00\x20" + NONCE + statement + gpus).digest()
    assert report_data(NONCE, STATEMENT, [b"ab", b"", b"c"]) == expected


def test_every_input_counts() -> None:
    variants: list[tuple[bytes, bytes, list[bytes]]] = [
        (NONCE, STATEMENT, []),
        (bytes(32), STATEMENT, []),
        (NONCE, b"{}", []),
        (b"", STATEMENT, []),
    ]
    gpus = [[b""], [b"", b""], [b"ab", b"c"], [b"a", b"bc"], [b"c", b"ab"]]
    values = [report_data(*v) for v in variants] + [report_data(NONCE, STATEMENT, g) for g in gpus]
    assert len(set(values)) == len(values)


def test_gpu_nonce_is_the_protocols_formula() -> None:
    expected = hashlib.sha256(b"cloister/gpu/v1\x00\x20" + NONCE + hashlib.sha256(STATEMENT).digest()).digest()
    assert gpu_nonce(NONCE, STATEMENT) == expected


@pytest.mark.parametrize("size", [1, 31, 33, 64, 288])
def test_refuses_nonces_of_another_size(size: int) -> None:
    with pytest.raises(MalformedEvidence):
        report_data(bytes(size), STATEMENT)
    with pytest.raises(MalformedEvidence):
        gpu_nonce(bytes(size), STATEMENT)
