import json
from dataclasses import replace
from typing import get_args

import pytest

from cloister.enclave.boot import Boot, EnclaveConfig, KeyHash, KvType, parse_boot, parse_config
from cloister.enclave.llm.llama.config import KV_TYPES
from cloister.errors import WrongUse

CONFIG = EnclaveConfig(platform="sim", context_length=512)
BOOT = Boot(
    launch=b"{launch}",
    config=CONFIG.encode(),
    listen_fd=3,
    model_path="/m.gguf",
    model_name="m",
    engine_dir="/lib",
    device_fd=4,
    api_keys=(KeyHash("me", "ab" * 32),),
)


@pytest.mark.parametrize(
    "boot",
    [
        BOOT,
        replace(BOOT, device_fd=None, api_keys=()),
        replace(BOOT, model_path="", tokenizer_path="/models/toy"),
        replace(BOOT, model_path="", bundle_path="/bundles/app"),
        replace(BOOT, founds_group=True),
        replace(BOOT, tls_fd=5, tls_origins=("https://localhost:8443", "https://127.0.0.1:8443")),
    ],
)
def test_what_the_host_writes_is_what_the_enclave_reads(boot: Boot) -> None:
    assert boot.encode().count(b"\n") == 1
    assert parse_boot(boot.encode()) == boot


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"launch": "%"},
        {"listen_fd": float("inf")},
        {"listen_fd": None},
        {"device_fd": "x"},
        {"tls_fd": "x"},
        {"tls_origins": 5},
        {"api_keys": 5},
        {"api_keys": [{"name": "me"}]},
        {"api_keys": ["me"]},
    ],
)
def test_refuses_another_boot_message(change: dict[str, object]) -> None:
    raw = {**json.loads(BOOT.encode()), **change}
    with pytest.raises(WrongUse):
        parse_boot(json.dumps(raw).encode())


@pytest.mark.parametrize("line", [b"", b"null", b"{}", b"[" * 100_000, b"\xff"])
def test_refuses_what_is_no_boot_message(line: bytes) -> None:
    with pytest.raises(WrongUse):
        parse_boot(line)


def test_a_config_is_read_as_it_was_hashed() -> None:
    assert parse_config(CONFIG.encode()) == CONFIG
    assert CONFIG.insecure == ()
    assert EnclaveConfig(platform="sim", api_keys=False, padding=False).insecure == ("api-keys-off", "padding-off")
    assert EnclaveConfig(platform="sim", ehbp=True).insecure == ("ehbp",)
    assert EnclaveConfig(platform="sim", plaintext=True).insecure == ("plaintext",)
    assert EnclaveConfig(platform="sim", tls=True).insecure == ("tls",)
    assert EnclaveConfig(platform="sim", upstream="http://127.0.0.1:8000").insecure == ("upstream",)


@pytest.mark.parametrize(
    "change",
    [
        {"platform": 1},
        {"api_keys": 0},
        {"padding": None},
        {"ehbp": 0},
        {"ehbp": None},
        {"plaintext": 1},
        {"tls": 1},
        {"tls": None},
        {"plaintext": None},
        {"upstream": 8000},
        {"upstream": False},
        {"group_policy": 1},
        {"group_policy": False},
        {"context_length": 63},
        {"context_length": True},
        {"slots": 0},
        {"slots": 65},
        {"max_waiting": -1},
        {"engine": "remote"},
        {"kv_type": "q4_0"},
        {"kv_type": None},
        {"v": 2},
        {"v": True},
        {"surprise": 1},
    ],
)
def test_refuses_another_config(change: dict[str, object]) -> None:
    raw = {**json.loads(CONFIG.encode()), **change}
    with pytest.raises(WrongUse):
        parse_config(json.dumps(raw, sort_keys=True, separators=(",", ":")).encode())


def test_takes_every_type_of_cache_that_the_engine_has() -> None:
    assert get_args(KvType) == tuple(KV_TYPES)
    for kind in get_args(KvType):
        config = replace(CONFIG, kv_type=kind)
        assert parse_config(config.encode()) == config


def test_refuses_a_config_that_could_be_read_two_ways() -> None:
    twice = CONFIG.encode()[:-1] + b',"api_keys":true}'
    with pytest.raises(WrongUse):
        parse_config(b'{"api_keys":false,' + twice[1:])
    with pytest.raises(WrongUse):
        parse_config(CONFIG.encode() + b" ")
