"""`web/client` in Node and in a page of Chromium, through the `openai` npm package, against an enclave with the embedded
model."""

import asyncio
import base64
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.client.deployment import Deployment, InnerApp, Served
from tests.end_to_end.proxying import running_proxy
from tests.system.js_stage import CLIENT, Ask, Origin, in_chromium, in_node, receiving_in_node

from cloister.channel.hpke import AEADS, KEM_X25519, KEM_XWING, setup_sender
from cloister.channel.keys import encode_configs, parse_configs
from cloister.cli.local import LocalEnclave, Plan
from cloister.client import AsyncSession
from cloister.host.process import listen
from cloister.models.download import resolve
from cloister.proxy import ProxyConfig, create_proxy
from cloister.sim import Device

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def enclave(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEnclave]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        with LocalEnclave(Plan.make(resolve("default"), slots=4, keys=())) as running:
            running.start()
            yield running


@pytest.fixture(scope="module")
def origin() -> Iterator[Served]:
    assert (CLIENT / "node_modules").is_dir(), "npm ci, in web/client, fetches what the lock names"
    with Served(Origin()) as one:
        yield one


@pytest.fixture(scope="module", params=[in_node, in_chromium])
def ask(request: pytest.FixtureRequest, origin: Served) -> Iterator[Ask]:
    with request.param(origin) as one:
        yield one


@pytest.fixture
def keys(enclave: LocalEnclave, tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_bytes(httpx2.get(f"{enclave.url}/.well-known/ohttp-gateway", trust_env=False).content)
    return path


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_package_talks_to_what_the_proxy_verified(enclave: LocalEnclave, ask: Ask, *, stream: bool) -> None:
    with running_proxy(enclave) as port:
        seen = ask(proxy=f"http://127.0.0.1:{port}", allowSimulated=True, stream=stream, requirePq=True)
    assert seen["error"] is None
    assert len(seen["text"]) > 10
    assert 0 < seen["usage"]["completion_tokens"] <= 24
    assert (seen["chunks"] > 1) == stream


def test_a_simulated_enclave_is_refused_unless_that_is_wanted(enclave: LocalEnclave, ask: Ask) -> None:
    with running_proxy(enclave) as port:
        seen = ask(proxy=f"http://127.0.0.1:{port}")
    assert seen["error"] == 'NotTrusted: The proxy\'s verdict is "simulated".'


@pytest.mark.parametrize("classical", [False, True])
def test_pinned_keys_of_either_kind_do(enclave: LocalEnclave, ask: Ask, keys: Path, *, classical: bool) -> None:
    if classical:
        keys.write_bytes(encode_configs([one for one in parse_configs(keys.read_bytes()) if one.kem_id == KEM_X25519]))
    seen = ask(enclave=enclave.url, keys=keys, stream=True)
    assert (seen["error"], seen["chunks"] > 1) == (None, True)
    strict = ask(enclave=enclave.url, keys=keys, requirePq=True)["error"]
    assert (strict or "").startswith("NotTrusted") == classical


def test_other_addresses_are_refused(enclave: LocalEnclave, ask: Ask, keys: Path) -> None:
    seen = ask(enclave=enclave.url, keys=keys, url="http://example.com/v1/models")
    assert seen["error"].startswith("TypeError: A sealed request goes to http://enclave.invalid")


def test_keys_that_are_not_the_enclaves_are_refused(enclave: LocalEnclave, ask: Ask, keys: Path) -> None:
    configs = parse_configs(keys.read_bytes())
    foreign = [
        type(one)(one.key_id, one.kem_id, one.public[:-1] + bytes([one.public[-1] ^ 1]), one.suites) for one in configs
    ]
    keys.write_bytes(encode_configs(foreign))
    assert ask(enclave=enclave.url, keys=keys)["error"].startswith("NotTrusted: An answer came outside")


class Middle:
    """What stands between: passes bytes on until `change` of everything that came back so far says otherwise."""

    def __init__(self, url: str, change: Callable[[bytes], bytes]) -> None:
        self._url = url
        self._change = change

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        body += message.get("body", b"")
        headers = {name.decode(): value.decode() for name, value in scope["headers"] if name != b"host"}
        async with httpx2.AsyncClient(trust_env=False) as client:
            answer = await client.request(scope["method"], self._url + scope["path"], headers=headers, content=body)
        kept = [(n.lower().encode(), v.encode()) for n, v in answer.headers.items() if n.lower() == "content-type"]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": kept})
        await send({"type": "http.response.body", "body": self._change(answer.content)})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda sealed: sealed[:-1], "TruncatedResponse"),
        (lambda sealed: sealed[: len(sealed) // 2], "TruncatedResponse"),
        (lambda sealed: sealed[:40], "TruncatedResponse"),
        (lambda sealed: b"", "TruncatedResponse"),
        (lambda sealed: sealed[:60] + bytes([sealed[60] ^ 1]) + sealed[61:], "ChannelBroken"),
        (lambda sealed: sealed[:-1] + bytes([sealed[-1] ^ 1]), "TruncatedResponse"),
        (lambda sealed: sealed + b"x", "TruncatedResponse"),
    ],
)
def test_an_answer_that_was_touched_is_never_taken_for_whole(
    enclave: LocalEnclave,
    ask: Ask,
    keys: Path,
    change: Callable[[bytes], bytes],
    error: str,
) -> None:
    import uvicorn

    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(Middle(enclave.url, change), log_level="critical", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    with closing(sock):
        seen = ask(enclave=f"http://127.0.0.1:{sock.getsockname()[1]}", keys=keys, stream=True)
        server.should_exit = True
        thread.join()
    assert (seen["error"] or "").startswith(error)


def test_the_proxys_keys_are_the_attested_ones(enclave: LocalEnclave, keys: Path) -> None:
    with running_proxy(enclave) as port:
        told = httpx2.get(f"http://127.0.0.1:{port}/verification", trust_env=False).json()
    assert base64.b64decode(told["ohttp_keys"]) == keys.read_bytes()


@contextmanager
def proxied(deployment: Deployment, gateway: Any, *, key: str = "") -> Iterator[tuple[str, str]]:
    """The addresses of an enclave and of a proxy that verifies it, and with `key` answers only who shows that."""
    with Served(gateway) as enclave:
        session = AsyncSession(enclave.url, policy=deployment.policy, pin_measurement=True)
        with Served(None, port_of=lambda port: create_proxy(session, ProxyConfig(port=port, key=key))) as proxy:
            yield enclave.url, proxy.url


@pytest.fixture
def renewing(tmp_path: Path) -> Iterator[tuple[Deployment, str, str]]:
    """An enclave whose keys can be renewed, its address, and a proxy that verified it."""
    deployment = Deployment(Device.open(tmp_path / "sim"))
    with proxied(deployment, deployment.gateway) as (enclave, proxy):
        yield deployment, enclave, proxy


MODELS = "http://enclave.invalid/v1/models"


@pytest.mark.parametrize("same_names", [False, True])
def test_keys_that_an_enclave_has_no_more_are_verified_anew(
    renewing: tuple[Deployment, str, str], origin: Served, ask: Ask, *, same_names: bool
) -> None:
    deployment, _, proxy = renewing
    origin.app.change = lambda: deployment.renew_keys(same_names=same_names)
    seen = ask(proxy=proxy, allowSimulated=True, url=MODELS, again=f"{origin.url}/change")
    assert (seen["error"], seen["status"], seen["again"]) == (None, 200, 200)
    assert deployment.attested == 2


def test_keys_that_were_pinned_and_are_gone_are_refused(
    renewing: tuple[Deployment, str, str], origin: Served, ask: Ask, tmp_path: Path
) -> None:
    deployment, enclave, _ = renewing
    origin.app.change = deployment.renew_keys
    (tmp_path / "keys").write_bytes(deployment.ring.ohttp_keys)
    seen = ask(enclave=enclave, keys=tmp_path / "keys", url=MODELS, again=f"{origin.url}/change")
    assert (seen["status"], seen.get("again")) == (200, None)
    assert seen["error"].startswith("NotTrusted: An answer came outside the sealed channel (status 422)")


def test_what_changed_behind_a_running_proxy_is_refused(
    renewing: tuple[Deployment, str, str], origin: Served, ask: Ask
) -> None:
    deployment, _, proxy = renewing

    def restart() -> None:
        deployment.launch = replace(deployment.launch, deployment="another")
        deployment.renew_keys()

    origin.app.change = restart
    seen = ask(proxy=proxy, allowSimulated=True, url=MODELS, again=f"{origin.url}/change")
    assert (seen["status"], seen["error"]) == (200, "NotTrusted: Not trusted: deployment. This is another deployment.")


@pytest.fixture
def node(origin: Served) -> Iterator[Ask]:
    with in_node(origin) as one:
        yield one


async def read_away(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def tells_without_end(scope: Any, receive: Any, send: Any) -> None:
    """A host's own refusal, as long as anybody listens."""
    if scope["type"] == "http":
        head = [(b"content-type", b"application/problem+json")]
        await send({"type": "http.response.start", "status": 422, "headers": head})
        gone = asyncio.create_task(read_away(receive))
        while not gone.done():
            await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
            await asyncio.sleep(0)


async def goes_on_after_what_does_not_open(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        head = [(b"content-type", b"message/ohttp-chunked-res")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": bytes(32) + b"\x20" + bytes(32), "more_body": True})
        await read_away(receive)


@pytest.mark.parametrize(
    ("host", "error"), [(tells_without_end, "NotTrusted"), (goes_on_after_what_does_not_open, "ChannelBroken")]
)
def test_an_answer_that_is_refused_is_let_go_however_long_it_would_be(
    renewing: tuple[Deployment, str, str], node: Ask, tmp_path: Path, host: Any, error: str
) -> None:
    """Or its connection would keep the program from ending."""
    (tmp_path / "keys").write_bytes(renewing[0].ring.ohttp_keys)
    with Served(host) as served:
        seen = node(enclave=served.url, keys=tmp_path / "keys", url=MODELS)
    assert (seen["error"] or "").startswith(error)


@pytest.mark.parametrize("address", ["/some/where", "/some/where/"])
def test_an_enclave_may_stand_below_a_path(
    renewing: tuple[Deployment, str, str], node: Ask, tmp_path: Path, address: str
) -> None:
    deployment = renewing[0]
    (tmp_path / "keys").write_bytes(deployment.ring.ohttp_keys)

    async def below(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix("/some/where") if scope["path"].startswith("/some/where/") else "/none"
            await deployment.gateway({**scope, "path": path, "raw_path": path.encode()}, receive, send)

    with Served(below) as served:
        seen = node(enclave=served.url + address, keys=tmp_path / "keys", url=MODELS)
    assert (seen["error"], seen["status"]) == (None, 200)


KEY = "k" * 43


def test_a_proxys_own_key_is_shown_to_the_proxy_alone(tmp_path: Path, ask: Ask) -> None:
    """As on systems where the proxy cannot tell users apart, and with `cloister connect --require-key`."""
    app = InnerApp()
    deployment = Deployment(Device.open(tmp_path / "sim"), app)
    heard: list[str] = []

    async def gateway(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            heard.append(f"{scope['method']} {scope['headers']}")
        await deployment.gateway(scope, receive, send)

    with proxied(deployment, gateway, key=KEY) as (enclave, proxy):
        trust = {"proxy": proxy, "enclave": enclave, "allowSimulated": True}
        for wrong in ({}, {"proxyKey": "x" * 43}):
            refused = ask(**trust, **wrong)["error"]
            assert refused.startswith("NotTrusted: The proxy answers only who shows its key: give as `proxyKey` what")
        assert heard == []
        seen = ask(**trust, proxyKey=f"{KEY}\n")
    assert (seen["error"], seen["text"]) == (None, "Who are you?")
    (inside,) = app.seen
    assert inside["headers"]["authorization"] == "Bearer none"
    assert [one.split()[0] for one in heard] == ["GET", "POST"]
    assert KEY not in str(heard) + str(app.seen)


def test_a_proxys_key_that_cannot_be_sent_is_refused_without_naming_it(ask: Ask) -> None:
    nowhere = "http://127.0.0.1:9"
    for given in ({"proxy": nowhere, "enclave": nowhere, "proxyKey": "secret\nword"}, {"proxyKey": "secret"}):
        refused = ask(**given, url=MODELS)["error"]
        assert refused.startswith("TypeError: ")
        assert "secret" not in refused


# The other direction: npm's HPKE receives, ours sends


@pytest.mark.parametrize("kem_id", [KEM_X25519, KEM_XWING])
def test_npms_hpke_opens_what_ours_seals_and_nothing_that_was_touched(kem_id: int) -> None:
    info, context = b"message/bhttp chunked request\0", b"message/bhttp chunked response"
    sent = [(b"", b"Who are you?"), (b"final", b"")]
    with receiving_in_node(kem_id) as (public, receive):
        for aead_id in AEADS:
            enc, sender = setup_sender(kem_id, aead_id, public, info, entropy=os.urandom)
            sealed = [(aad, sender.seal(aad, text)) for aad, text in sent]

            def told(enc: bytes = enc, info: bytes = info, sealed: Any = sealed, aead_id: int = aead_id) -> Any:
                messages = [(aad.hex(), text.hex()) for aad, text in sealed]
                return receive(aead=aead_id, enc=enc.hex(), info=info.hex(), messages=messages, context=context.hex())

            exported = sender.export(context, 32).hex()
            assert told() == {"error": None, "opened": [text.hex() for _, text in sent], "exported": exported}
            first, (aad, last) = sealed
            touched = [
                told(enc=flipped(enc, 0)),
                told(enc=flipped(enc, -1)),
                told(info=flipped(info, 0)),
                told(sealed=[(first[0], flipped(first[1], 0)), (aad, last)]),
                told(sealed=[first, (flipped(aad, 0), last)]),
                told(sealed=[first, (aad, flipped(last, -1))]),
            ]
            assert [one["error"] for one in touched] == ["OpenError"] * 6
            assert [len(one["opened"]) for one in touched] == [0, 0, 0, 0, 1, 1]


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)
