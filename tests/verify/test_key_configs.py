import pytest

from cloister.errors import MalformedEvidence
from cloister.verify.key_configs import config_lengths


def framed(*lengths: int) -> bytes:
    return b"".join(length.to_bytes(2, "big") + bytes(length) for length in lengths)


def test_reads_the_lengths() -> None:
    assert config_lengths(framed(1225, 41)) == (1225, 41)


def test_refuses_truncation_everywhere() -> None:
    data = framed(60, 41)
    for length in range(len(data)):
        if length != 62:  # the first config alone is a whole one
            with pytest.raises(MalformedEvidence):
                config_lengths(data[:length])


def test_refuses_configs_too_short_to_hold_a_key() -> None:
    with pytest.raises(MalformedEvidence):
        config_lengths(framed(40))
