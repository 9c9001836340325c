import pytest

from cloister.enclave.llm.upstream import model_digest, parse_address
from cloister.errors import WrongUse


@pytest.mark.parametrize(
    ("url", "spelled"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://localhost:30000/", "http://127.0.0.1:30000"),
        ("http://127.8.9.1:1", "http://127.8.9.1:1"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_takes_loopback_and_spells_it_in_one_way(url: str, spelled: str) -> None:
    assert parse_address(url).url == spelled
    assert parse_address(spelled).url == spelled


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1:8000",
        "http://0.0.0.0:8000",
        "http://example.org:8000",
        "http://localhost.example.org:8000",
        "http://127.0.0.1.example.org:8000",
        "http://me@127.0.0.1:8000",
        "https://127.0.0.1:8000",
        "http://127.0.0.1",
        "http://127.0.0.1:0",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:8000/v1",
        "http://127.0.0.1:8000?x=1",
        "http://[::ffff:10.0.0.1]:8000",
        "127.0.0.1:8000",
        "unix:///run/vllm.sock",
        "http://[::1:8000",
        "",
    ],
)
def test_refuses_everything_else(url: str) -> None:
    with pytest.raises(WrongUse, match="loopback"):
        parse_address(url)


def test_the_digest_is_of_the_name_and_could_be_no_files() -> None:
    assert model_digest("acme/a") == model_digest("acme/a")
    assert model_digest("acme/a") != model_digest("acme/b")
    assert len(bytes.fromhex(model_digest(""))) == 32
