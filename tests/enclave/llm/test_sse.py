import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.enclave.llm import sse


@given(st.text())
def test_a_quoted_string_is_one_ascii_line_and_reads_back(text: str) -> None:
    quoted = sse.quote(text)
    assert quoted.isascii()
    assert len(quoted.splitlines()) == 1
    assert json.loads(quoted) == text


def test_frames_are_byte_exact() -> None:
    assert sse.data({"a": [1, None]}) == b'data: {"a":[1,null]}\n\n'
    assert sse.named("data", '"x"', 3) == b'id: 3\nevent: data\ndata: "x"\n\n'
    assert sse.named("end", "{}") == b"event: end\ndata: {}\n\n"


def test_a_number_that_json_lacks_is_never_sent() -> None:
    with pytest.raises(ValueError):
        sse.compact({"a": float("nan")})
