import json
from typing import Any

import pytest

from cloister.enclave.llm.chunks import Answer, ChatForm, Form, Header, TextForm, Usage
from cloister.enclave.llm.engine import Delta, Done

HEADER = Header("chatcmpl-" + "0" * 24, 1_700_000_000, "acme/toy", "fp_0123456789")
FORMS: list[Any] = [ChatForm, TextForm]


def usage_of(*dones: Done, n: int = 1) -> dict[str, Any]:
    usage = Usage(n)
    for index, done in enumerate(dones):
        usage.add(index, done)
    return usage.fields()


def test_a_prompt_answered_n_times_counts_once() -> None:
    done = Done("stop", 10, 3, 4)
    found = usage_of(done, done, done, done, n=2)
    assert (found["prompt_tokens"], found["completion_tokens"], found["total_tokens"]) == (20, 12, 32)
    assert found["prompt_tokens_details"] == {"cached_tokens": 8}


@pytest.mark.parametrize("make", FORMS)
@pytest.mark.parametrize("include_usage", [False, True])
def test_every_event_is_one_compact_json_line(make: Any, include_usage: bool) -> None:
    form: Form = make(HEADER, include_usage=include_usage, logprobs=False)
    events = [form.begin(3), form.delta(3, Delta('a"\n\u2028é', 1)), form.finish(3, "length"), form.usage(Usage(1))]
    for event in filter(None, events):
        payload = json.loads(event.removeprefix(b"data: "))
        assert event == b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"
        assert payload["id"] == HEADER.id
        assert ("usage" in payload) == (include_usage or event is events[-1])


@pytest.mark.parametrize("make", FORMS)
def test_a_delta_that_says_nothing_is_no_event(make: Any) -> None:
    form: Form = make(HEADER, include_usage=False, logprobs=False)
    form.begin(0)
    assert form.delta(0, Delta("", 2)) == b""


@pytest.mark.parametrize("make", FORMS)
def test_an_ordinary_token_fits_one_block_of_padding(make: Any) -> None:
    header = Header(
        HEADER.id, HEADER.created, "organisation/a-model-with-a-longer-name-8B-instruct", HEADER.fingerprint
    )
    form: Form = make(header, include_usage=True, logprobs=False)
    form.begin(0)
    assert len(form.delta(0, Delta(" extraordinarily", 1))) < 512 - len(b":\n\n")


@pytest.mark.parametrize("make", FORMS)
def test_a_whole_answer_is_compact_json(make: Any) -> None:
    form: Form = make(HEADER, include_usage=False, logprobs=False)
    body = form.whole([Answer(["a", "b"], [], "stop")], Usage(1))
    payload = json.loads(body)
    assert body == json.dumps(payload, separators=(",", ":")).encode()
    assert payload["choices"][0]["finish_reason"] == "stop"
    assert payload["choices"][0]["logprobs"] is None
