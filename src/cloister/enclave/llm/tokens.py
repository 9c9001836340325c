"""/tokenize and /detokenize, with llama-server's fields."""

from dataclasses import dataclass

from cloister.enclave.llm import sse
from cloister.enclave.llm.connection import WhileConnected
from cloister.enclave.llm.envelope import Refused
from cloister.enclave.llm.fields import Fields, refuse
from cloister.enclave.llm.service import Call

__all__ = ["MAX_TEXT", "MAX_WORDS", "detokenize", "parse_detokenize", "parse_tokenize", "tokenize"]

MAX_TEXT = 1 << 20
"""Bytes of UTF-8 that /tokenize takes: many contexts' worth, and well under a second of work."""
MAX_WORDS = 1 << 17
"""Tokens that /detokenize takes."""


@dataclass(frozen=True, slots=True)
class TokenizeAsk:
    """`add_special`: with the tokens that begin a prompt. `parse_special`: markers in the text count as tokens."""

    text: str
    add_special: bool
    parse_special: bool


def parse_tokenize(fields: Fields) -> TokenizeAsk:
    """`{content, add_special?, parse_special?}`; `text` is another name for `content`. Raises `Refused` (400, 413)."""
    text = fields.text("content") if fields.has("content") else fields.text("text")
    if text is None:
        refuse("content", "'content' is missing.", "missing_required_parameter")
    if len(text.encode()) > MAX_TEXT:
        raise Refused(413, "request_too_large", f"'content' may hold {MAX_TEXT} bytes at most.", param="content")
    return TokenizeAsk(text, fields.flag("add_special"), fields.flag("parse_special", default=True))


async def tokenize(call: Call) -> None:
    """`{content, add_special?, parse_special?}` -> `{tokens}`."""
    ask = parse_tokenize(await call.fields())
    call.service.serving()
    async with WhileConnected(call.receive):
        async with call.service.tokenizing(call.principal):
            found = await call.service.engine.tokenize(
                ask.text, add_special=ask.add_special, parse_special=ask.parse_special
            )
        await call.reply.json(200, sse.compact({"tokens": found}).encode("ascii"))


def parse_detokenize(fields: Fields) -> tuple[int, ...]:
    """`{tokens}`. Raises `Refused` (400, 413)."""
    if not fields.has("tokens"):
        refuse("tokens", "'tokens' is missing.", "missing_required_parameter")
    tokens = fields.tokens("tokens", fields.array("tokens"))
    if len(tokens) > MAX_WORDS:
        raise Refused(413, "request_too_large", f"'tokens' may hold {MAX_WORDS} tokens at most.", param="tokens")
    return tokens


async def detokenize(call: Call) -> None:
    """`{tokens}` -> `{content}`; bytes that are not UTF-8 by themselves become U+FFFD."""
    tokens = parse_detokenize(await call.fields())
    call.service.serving()
    async with WhileConnected(call.receive):
        async with call.service.tokenizing(call.principal):
            raw = await call.service.engine.detokenize(tokens)
        await call.reply.json(200, sse.compact({"content": raw.decode("utf-8", "replace")}).encode("ascii"))
