"""LangChain's standard suite for chat models, over `langchain-openai`, against the API at $CLOISTER_BASE_URL.

tests/system/test_tools.py runs it in the foreign tools' environment and compares what passed with what must.
"""
# mypy: ignore-errors

import os
from functools import cache, reduce
from operator import add
from typing import Any

import httpx
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.integration_tests.chat_models import magic_function

QUESTION = "What is the value of magic_function(3)? Use the tool."
ADDRESS = os.environ["CLOISTER_BASE_URL"]


@cache
def closing_tokens() -> tuple[int, ...]:
    """What ends a string, an object and a list of calls: left to itself, a toy goes on until its tokens are used up.
    That what it says is valid is the grammar's work alone."""
    answer = httpx.post(f"{ADDRESS.removesuffix('/v1')}/tokenize", json={"content": '"}]'}, trust_env=False)
    return tuple(answer.json()["tokens"])


class TestCloister(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        address = {"model": "default", "base_url": ADDRESS, "api_key": "none", "max_retries": 0, "stream_usage": True}
        return {**address, "temperature": 0, "max_tokens": 300, "logit_bias": dict.fromkeys(closing_tokens(), 8)}

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}

    @property
    def supports_json_mode(self) -> bool:
        return True

    def test_a_streamed_call_is_the_whole_ones(self, model: ChatOpenAI) -> None:
        """The suite's own tests of calls end with the first one's arguments, where a toy's are wrong."""
        bound = model.bind_tools([magic_function], tool_choice="any")
        whole = bound.invoke(QUESTION)
        streamed = reduce(add, bound.stream(QUESTION))
        for message in (whole, streamed):
            (call,) = message.tool_calls
            assert message.invalid_tool_calls == []
            assert (call["name"], set(call["args"])) == ("magic_function", {"input"})
            assert isinstance(call["args"]["input"], int)
            assert call["id"]
        assert streamed.tool_calls[0]["args"] == whole.tool_calls[0]["args"]
