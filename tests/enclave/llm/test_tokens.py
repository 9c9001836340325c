from typing import Any

import httpx2
import pytest
from tests.enclave.llm.conftest import ScriptedEngine

from cloister.enclave.llm.tokens import MAX_TEXT, MAX_WORDS

pytestmark = pytest.mark.anyio


async def test_tokenize_takes_llama_servers_fields(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    assert (await http.post("/tokenize", json={"content": "Hi"})).json() == {"tokens": [72, 105]}
    both = {"text": "Hi", "add_special": True, "parse_special": False}
    assert (await http.post("/tokenize", json=both)).json() == {"tokens": [1, 72, 105]}
    assert engine.tokenized == [("Hi", False, True), ("Hi", True, False)]


async def test_detokenize_never_fails_on_a_split_character(http: httpx2.AsyncClient) -> None:
    assert (await http.post("/detokenize", json={"tokens": [72, 0xC3, 0xA9]})).json() == {"content": "Hé"}
    assert (await http.post("/detokenize", json={"tokens": [72, 0xC3]})).json() == {"content": "H\ufffd"}
    assert (await http.post("/detokenize", json={"tokens": []})).json() == {"content": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"content": "x", "add_special": 1}, "add_special"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [2**31]}, "tokens"),
    ],
)
async def test_wrong_bodies_are_400(http: httpx2.AsyncClient, path: str, body: Any, param: str) -> None:
    response = await http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"content": "é" * (MAX_TEXT // 2) + "x"}),
        ("/detokenize", {"tokens": [7] * (MAX_WORDS + 1)}),
    ],
)
async def test_what_would_hold_up_everybody_is_413(
    http: httpx2.AsyncClient, engine: ScriptedEngine, path: str, body: Any
) -> None:
    response = await http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert not engine.tokenized
