"""The routes of the 2023 system this grew from: /health and /generate, with their frames, and their faults mended."""

import binascii
from base64 import b64decode
from collections.abc import AsyncGenerator
from contextlib import aclosing
from urllib.parse import parse_qs

from cloister.enclave.llm import sse
from cloister.enclave.llm.connection import WhileConnected
from cloister.enclave.llm.engine import Delta, Event, GenerateRequest, Prompt, Sampling, Started
from cloister.enclave.llm.envelope import Refused
from cloister.enclave.llm.requests import GenerateAsk, parse_generate
from cloister.enclave.llm.service import Call

__all__ = ["generate", "generate_from_query", "health"]

ERROR_EVENT = b"event: error\n"


async def health(call: Call) -> None:
    """200 only when a model can answer."""
    call.service.serving()
    await call.reply.json(200, b'{"status":"ok"}')


async def generate(call: Call) -> None:
    """`{"query": …}` -> `{"response": …}`, or the frames of the stream with `Accept: text/event-stream`."""
    call.prompt_field = "query"
    ask = parse_generate(await call.fields(), _default_tokens(call))
    if "text/event-stream" in call.headers.get("accept", ""):
        await _stream(call, ask)
    else:
        await _whole(call, ask)


async def generate_from_query(call: Call) -> None:
    """`?prompt=<base64 of UTF-8>`: kept for old clients, and only inside the sealed channel, where no log sees it."""
    call.prompt_field = "prompt"
    sampling = Sampling(max_tokens=_default_tokens(call))
    await _stream(call, GenerateAsk(_decode_prompt(call.query), sampling))


def _default_tokens(call: Call) -> int:
    """Where the context is small, a quarter of it: these routes leave out of a prompt what does not fit beside them."""
    return min(call.service.config.generate_tokens, call.service.serving().model.context_length // 4)


def _decode_prompt(query: bytes) -> str:
    try:
        values = parse_qs(query.decode("ascii"), max_num_fields=16).get("prompt", [])
    except ValueError:
        values = []
    if len(values) != 1:
        raise Refused(400, "missing_required_parameter", "'prompt' is missing, or there twice.", param="prompt")
    # A "+" that was not escaped arrives as a blank; the URL-safe alphabet and absent padding are taken too.
    encoded = values[0].translate(str.maketrans(" -_", "++/")).rstrip("=")
    try:
        return b64decode(encoded + "=" * (-len(encoded) % 4), validate=True).decode()
    except (binascii.Error, ValueError):  # covers UnicodeError
        raise Refused(400, "invalid_value", "'prompt' must be base64 of UTF-8 text.", param="prompt") from None


def _events(call: Call, ask: GenerateAsk) -> AsyncGenerator[tuple[int, Event], None]:
    info = call.service.serving()
    if ask.template and info.model.has_chat_template:
        prompt = Prompt(messages=({"role": "user", "content": ask.text},))
    else:
        prompt = Prompt(text=ask.text)
    return call.answers([GenerateRequest(prompt, ask.sampling, call.scope(), truncate_prompt=True)])


async def _whole(call: Call, ask: GenerateAsk) -> None:
    texts: list[str] = []
    dropped = 0
    async with WhileConnected(call.receive):
        async with aclosing(_events(call, ask)) as events:
            async for _, event in events:
                if isinstance(event, Delta):
                    texts.append(event.text)
                elif isinstance(event, Started):
                    dropped = event.truncated
        answer = {"response": "".join(texts), **({"dropped_tokens": dropped} if dropped else {})}
        await call.reply.json(200, sse.compact(answer).encode("ascii"))


async def _stream(call: Call, ask: GenerateAsk) -> None:
    """Numbers count from 1 over the data frames and the end; `truncated` has none, so that they stay the original's."""
    call.reply.error_event = ERROR_EVENT
    number = 0
    pending = b""
    async with WhileConnected(call.receive):
        async with aclosing(_events(call, ask)) as events:
            async for _, event in events:
                if isinstance(event, Started) and event.truncated:
                    pending = sse.named("truncated", sse.compact({"dropped_tokens": event.truncated}))
                elif isinstance(event, Delta) and event.text:
                    number += 1
                    await call.reply.event(pending + sse.named("data", sse.quote(event.text), number))
                    pending = b""
        await call.reply.end(pending + sse.named("end", "{}", number + 1))
