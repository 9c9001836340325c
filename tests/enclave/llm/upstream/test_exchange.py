import pytest
from tests.enclave.llm.upstream.fake import QUICK, FakeVllm, says, served

from cloister.enclave.llm.upstream import Address
from cloister.enclave.llm.upstream.exchange import Limits, ask
from cloister.errors import EngineDied

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\n"


async def test_sends_a_request_and_nothing_else() -> None:
    fake = FakeVllm()
    async with served(fake) as upstream:
        status, answer = await ask(upstream.address, "POST", "/tokenize", {"prompt": "é"}, limits=QUICK)
    assert (status, answer["tokens"]) == (200, [0xC3, 0xA9])
    (asked,) = fake.asked
    assert (asked.method, asked.path, asked.body) == ("POST", "/tokenize", {"prompt": "é"})
    assert set(asked.headers) == {"host", "accept-encoding", "connection", "content-type", "content-length"}
    assert asked.headers["host"] == upstream.address.authority


async def test_reads_chunks_and_lengths() -> None:
    async with says(OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\n[1,\r\n2\r\n2]\r\n0\r\n\r\n") as address:
        assert await ask(address, "GET", "/", limits=QUICK) == (200, [1, 2])
    async with says(OK + b"Content-Length: 4\r\n\r\n", b"null") as address:
        assert await ask(address, "GET", "/", limits=QUICK) == (200, None)


async def test_another_status_may_have_any_body() -> None:
    async with says(b"HTTP/1.1 502 Bad\r\nContent-Length: 6\r\n\r\n<html>") as address:
        assert await ask(address, "GET", "/", limits=QUICK) == (502, None)


async def test_follows_no_redirect() -> None:
    fake = FakeVllm()
    async with served(fake) as elsewhere:
        moved = f"HTTP/1.1 307 Moved\r\nLocation: {elsewhere.address.url}/v1/models\r\nContent-Length: 0\r\n\r\n"
        async with says(moved.encode()) as address:
            assert await ask(address, "GET", "/v1/models", limits=QUICK) == (307, None)
    assert fake.asked == []


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        OK,
        OK + b"Content-Length: 5\r\n\r\n[1]",
        OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\n[1]\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        OK + b"\r\n[1]",  # its end is the connection's: who could tell it from a cut?
        OK + b"Content-Length: 1\r\n\r\n{",
        OK + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
async def test_what_is_cut_or_no_http_is_an_error(answer: bytes) -> None:
    async with says(answer) as address:
        with pytest.raises(EngineDied):
            await ask(address, "GET", "/", limits=QUICK)


async def test_an_endless_answer_is_given_up() -> None:
    head = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    async with says(head, *[b"1000\r\n" + b"x" * 0x1000 + b"\r\n"] * 100) as address:
        with pytest.raises(EngineDied, match="no such server"):
            await ask(address, "GET", "/", limits=Limits(size=100_000))


@pytest.mark.parametrize("head", [b"", OK, OK + b"Content-Length: 9\r\n\r\n[1"])
async def test_one_that_stays_silent_is_given_up(head: bytes) -> None:
    async with says(head, close=False) as address:
        with pytest.raises(EngineDied, match="does not answer"):
            await ask(address, "GET", "/", limits=Limits(first=0.05, between=0.05))


async def test_nobody_there() -> None:
    async with says() as address:
        gone = Address(address.host, address.port)
    with pytest.raises(EngineDied, match="reached"):
        await ask(gone, "GET", "/", limits=QUICK)
