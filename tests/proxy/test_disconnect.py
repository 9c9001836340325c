"""A local client that goes away: through the proxy, the seal and the queue, the model is stopped before its next token."""

import socket
from collections.abc import Callable

import httpx2
import pytest
from tests.cli import conftest as scripted
from tests.cli.conftest import Enclave, wait_for
from tests.client.deployment import HANG, Served

from cloister.client import AsyncSession
from cloister.proxy import ProxyConfig, create_proxy
from cloister.verify import Policy

start_enclave = scripted.start_enclave

BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "go on"}], "stream": True},
    "/v1/messages": {"max_tokens": 99, "messages": [{"role": "user", "content": "go on"}], "stream": True},
    "/v1/responses": {"input": "go on", "stream": True},
}


@pytest.mark.parametrize("path", BODIES)
def test_the_model_is_stopped_between_two_tokens(start_enclave: Callable[..., Enclave], path: str) -> None:
    """After its first token the model waits for ever: only a cancel that needs no further token ends it."""
    enclave = start_enclave()
    enclave.model.answer = lambda asked: ["first", None] if asked == "go on" else ["Yes."]
    policy = Policy(simulator_root=enclave.root.read_bytes(), tolerate_insecure=frozenset({"api-keys-off"}))
    session = AsyncSession(enclave.url, policy=policy)
    with (
        Served(None, port_of=lambda port: create_proxy(session, ProxyConfig(port=port))) as served,
        httpx2.Client(base_url=served.url, trust_env=False, timeout=HANG) as http,
    ):
        with http.stream("POST", path, json={"model": "default", **BODIES[path]}) as answer:
            seen = ""
            for piece in answer.iter_text():
                seen += piece
                if "first" in seen:
                    assert enclave.model.running == 1
                    break  # which lets go of the reader, and closes the connection
            assert "first" in seen
        wait_for(lambda: enclave.model.running == 0)
        whole = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "and now?"}]})
        assert whole.json()["choices"][0]["message"]["content"] == "Yes."


def test_a_client_that_waits_for_a_whole_answer_may_go_too(start_enclave: Callable[..., Enclave]) -> None:
    enclave = start_enclave()
    enclave.model.answer = lambda asked: ["first", None]
    policy = Policy(simulator_root=enclave.root.read_bytes(), tolerate_insecure=frozenset({"api-keys-off"}))
    session = AsyncSession(enclave.url, policy=policy)
    with Served(None, port_of=lambda port: create_proxy(session, ProxyConfig(port=port))) as served:
        body = b'{"messages": [{"role": "user", "content": "x"}]}'
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(head.encode() + body)
            wait_for(lambda: enclave.model.running == 1)
        wait_for(lambda: enclave.model.running == 0)
