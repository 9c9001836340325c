import anthropic
import httpx2
import openai
import pytest
from tests.enclave.llm.conftest import ScriptedEngine, client_of

from cloister.enclave.llm.api import Api

pytestmark = pytest.mark.anyio

OURS = {"sha256": "ab" * 32, "quantization": "q8_0", "context_length": 4096}


@pytest.fixture
def claude(api: Api) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        base_url="http://enclave.invalid", api_key="none", http_client=client_of(api), max_retries=0
    )


async def test_models_are_listed_by_name_and_found_by_alias(sdk: openai.AsyncOpenAI, http: httpx2.AsyncClient) -> None:
    assert [model.id for model in (await sdk.models.list()).data] == ["acme/toy"]
    assert (await sdk.models.retrieve("default")).id == "acme/toy"
    described = {"id": "acme/toy", "object": "model", "created": 1_700_000_000, "owned_by": "cloister"}
    assert (await http.get("/v1/models/acme/toy")).json() == {**described, **OURS}
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("other")


async def test_anthropics_sdk_lists_and_finds_them_too(claude: anthropic.AsyncAnthropic) -> None:
    page = await claude.models.list()
    assert [model.id for model in page.data] == ["acme/toy"]
    assert (page.first_id, page.last_id, page.has_next_page()) == ("acme/toy", "acme/toy", False)
    for name in ("acme/toy", "default"):
        found = await claude.models.retrieve(name)
        assert (found.id, found.type, found.lifecycle, found.max_input_tokens) == ("acme/toy", "model", "active", 4096)
        assert found.created_at.timestamp() == 1_700_000_000
    with pytest.raises(anthropic.NotFoundError):
        await claude.models.retrieve("other")


async def test_the_model_of_an_engine_that_is_gone_is_told_in_each_dialect(
    http: httpx2.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.ready = False
    spoken = {"anthropic-version": "2023-06-01"}
    assert (await http.get("/v1/models")).json()["error"]["code"] == "engine_died"
    refused = await http.get("/v1/models", headers=spoken)
    assert (refused.status_code, refused.json()["error"]["type"]) == (529, "overloaded_error")
