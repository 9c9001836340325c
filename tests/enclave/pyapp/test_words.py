import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.enclave.pyapp.archives import ask, memory, tar

from cloister.enclave.pyapp.app import AppConfig, PythonApp
from cloister.enclave.pyapp.words import BURST, LONGEST, PER_SECOND, Words

pytestmark = pytest.mark.anyio

SPEAKER = """
import os, subprocess, sys
print("imported")
def app(environ, start_response):
    path = environ["PATH_INFO"][1:]
    if path == "flood":
        for number in range(20000): print(number, "x" * 1000)
    elif path == "die":
        print("last words", file=sys.stderr)
        os._exit(1)
    else:
        print("asked", path, "\\udcff", file=sys.stderr)
    start_response("200 OK", [])
    return [b"answered"]
"""


def told(words: Words, data: bytes, now: float = 0.0) -> list[str]:
    return list(words.feed(data, now))


def test_lines_leave_when_they_end() -> None:
    words = Words(0.0)
    assert told(words, b"on") == []
    assert told(words, b"e\ntwo\nthr") == ["one", "two"]
    assert list(words.end(0.0)) == ["thr"]
    assert list(words.end(0.0)) == []


@given(st.binary(max_size=3000), st.integers(1, 400))
def test_how_the_bytes_arrive_makes_no_difference(data: bytes, size: int) -> None:
    whole, parts = Words(0.0), Words(0.0)
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert told(whole, data) == [line for piece in pieces for line in parts.feed(piece, 0.0)]


def test_a_line_is_cut_and_an_empty_one_is_none() -> None:
    words = Words(0.0)
    assert told(words, b"x" * 3 * LONGEST + b"\n\n  \r\nnext\n") == ["x" * LONGEST, "next"]
    assert told(words, b"\xff\n") == ["\ufffd"]


def test_over_the_rate_lines_are_counted_and_the_number_is_said() -> None:
    words = Words(0.0)
    assert told(words, b"a\n" * (BURST + 7)) == ["a"] * BURST
    assert told(words, b"b\nc\nd\n", 2 / PER_SECOND) == [
        f"(7 lines were left out: more than {PER_SECOND:.0f} a second)",
        "b",
        "c",
    ]
    assert list(words.end(9.0)) == [f"(1 lines were left out: more than {PER_SECOND:.0f} a second)"]
    assert told(Words(0.0), b"a\n" * (BURST + 1), 1e9) == ["a"] * BURST  # silence saves up nothing


def speaker(heard: list[str] | None) -> PythonApp:
    config = AppConfig(kind="wsgi", entry="main:app", files={"code": memory(tar({"main.py": SPEAKER}))}, confined=False)
    return PythonApp(config, None if heard is None else heard.append)


async def until(heard: list[str], line: str) -> None:
    async with asyncio.timeout(30):
        while line not in heard:  # noqa: ASYNC110 (another process speaks)
            await asyncio.sleep(0.01)


async def test_what_an_app_writes_is_told_and_its_last_words_too() -> None:
    heard: list[str] = []
    app = speaker(heard)
    await app.start()
    try:
        assert (await ask(app, "/this"))[2] == [b"answered"]
        await until(heard, "asked this \\udcff")
        assert heard == ["imported", "asked this \\udcff"]
        with pytest.raises(Exception, match="broke off"):
            await ask(app, "/die")
        await until(heard, "last words")
        async with asyncio.timeout(30):
            while heard.count("imported") < 2:  # noqa: ASYNC110 (it is started again, and heard again)
                await asyncio.sleep(0.01)
    finally:
        await app.close()


async def test_an_app_that_says_too_much_still_answers() -> None:
    heard: list[str] = []
    app = speaker(heard)
    await app.start()
    try:
        async with asyncio.timeout(60):
            assert (await ask(app, "/flood"))[2] == [b"answered"]
    finally:
        await app.close()
    assert len(heard) < 2000
    assert max(map(len, heard)) == LONGEST
    assert "left out" in heard[-1]


async def test_of_an_app_that_publishes_nothing_nobody_hears_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    app = speaker(None)
    await app.start()
    try:
        await ask(app, "/this")
    finally:
        await app.close()
    assert capfd.readouterr() == ("", "")
