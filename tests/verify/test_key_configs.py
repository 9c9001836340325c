import pytest

from cloister.errors import MalformedEvidence
from cloister.verify.key_configs import X_WING, config_kems


def framed(*lengths: int) -> bytes:
    return b"".join(length.to_bytes(2, "big") + bytes(length) for length in lengths)


def test_reads_the_kem_of_each_config() -> None:
    first, second = b"\x00\x64\x7a" + bytes(1222), b"\x01\x00\x20" + bytes(38)
    data = (1225).to_bytes(2, "big") + first + (41).to_bytes(2, "big") + second
    assert config_kems(data) == (X_WING, 0x20)


def test_refuses_truncation_everywhere() -> None:
    data = framed(60, 41)
    for length in range(len(data)):
        if length != 62:  # the first config alone is a whole one
            with pytest.raises(MalformedEvidence):
                config_kems(data[:length])


def test_refuses_configs_too_short_to_hold_a_key() -> None:
    with pytest.raises(MalformedEvidence):
        config_kems(framed(40))
