import json
from typing import Any

import pytest

from cloister.enclave.llm.envelope import Refused
from cloister.enclave.llm.fields import parse_object

IDS = list(range(200_000))
MANY = 100_001


@pytest.mark.parametrize("body", [{"tokens": IDS}, {"prompt": [IDS, IDS]}, {"input": [1000] * 1_500_000}])
def test_token_ids_may_be_as_many_as_the_body_holds(body: dict[str, Any]) -> None:
    assert parse_object(json.dumps(body).encode()).values == body


@pytest.mark.parametrize(
    "body",
    [
        {"x": [[]] * MANY},
        {"messages": [{"x": [1] * MANY}]},
        {"messages": [dict.fromkeys(map(str, range(MANY)), 1)]},
        {"prompt": [[0.5] * MANY]},
        {"prompt": ["a"] * MANY},
        {"prompt": [True] * MANY},
        {"messages": [{"role": "user"}] * (MANY // 2)},
        dict.fromkeys(map(str, range(MANY)), 1),
    ],
)
def test_a_body_of_very_many_other_values_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(Refused) as caught:
        parse_object(json.dumps(body).encode())
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")


def test_a_long_conversation_with_tools_is_no_such_body() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    turn = [{"role": "assistant", "content": [{"type": "text", "text": "a"}], "tool_calls": [call]}]
    assert parse_object(json.dumps({"messages": turn * 4096}).encode()).has("messages")
