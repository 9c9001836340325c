"""OpenAI's routes: chat/completions and completions."""

import hashlib
import secrets
import time
from collections.abc import Sequence
from contextlib import aclosing

from cloister.enclave.llm import sse
from cloister.enclave.llm.chunks import Answer, ChatForm, Form, Header, TextForm, Usage
from cloister.enclave.llm.connection import WhileConnected
from cloister.enclave.llm.engine import Delta, Done, EngineInfo, GenerateRequest, Started
from cloister.enclave.llm.envelope import Refused
from cloister.enclave.llm.requests import Ask, parse_chat, parse_completion
from cloister.enclave.llm.service import Answers, Call
from cloister.enclave.llm.structured import plan_answer

__all__ = ["chat_completions", "completions"]


async def chat_completions(call: Call) -> None:
    ask = parse_chat(await call.fields())
    info = call.service.serving(ask.model)
    if not info.model.has_chat_template:
        message = "The model has no chat template; /v1/completions takes plain text."
        raise Refused(400, "no_chat_template", message, param="messages")
    plan = plan_answer(info.model, ask.tools, ask.choice, ask.shape)
    logprobs = ask.sampling.logprobs is not None
    form = ChatForm(
        _header("chatcmpl-", info), include_usage=ask.include_usage, logprobs=logprobs, reading=plan.reading
    )
    await _answer(call, ask, ask.requests(call.scope(), plan), form)


async def completions(call: Call) -> None:
    call.prompt_field = "prompt"
    ask = parse_completion(await call.fields())
    header = _header("cmpl-", call.service.serving(ask.model))
    form = TextForm(header, include_usage=ask.include_usage, logprobs=ask.sampling.logprobs is not None)
    await _answer(call, ask, ask.requests(call.scope()), form)


def _header(prefix: str, info: EngineInfo) -> Header:
    digests = f"{info.sha256} {info.variant} {info.model.sha256}".encode()
    fingerprint = "fp_" + hashlib.sha256(digests).hexdigest()[:10]
    return Header(prefix + secrets.token_hex(12), int(time.time()), info.model.name, fingerprint)


async def _answer(call: Call, ask: Ask, requests: Sequence[GenerateRequest], form: Form) -> None:
    usage = Usage(ask.n)
    async with WhileConnected(call.receive):
        if not ask.stream:
            collected = await _collect(call.answers(requests), len(requests), usage)
            await call.reply.json(200, form.whole(collected, usage))
            return
        tail = await _stream(call, call.answers(requests), form, usage)
        extra = form.usage(usage) if ask.include_usage else b""
        await call.reply.end(tail + extra + sse.DONE)


async def _collect(answers: Answers, count: int, usage: Usage) -> list[Answer]:
    collected = [Answer() for _ in range(count)]
    async with aclosing(answers):
        async for index, event in answers:
            if isinstance(event, Delta):
                collected[index].texts.append(event.text)
                collected[index].logprobs.extend(event.logprobs)
            elif isinstance(event, Done):
                collected[index].finish_reason = event.finish_reason
                usage.add(index, event)
    return collected


async def _stream(call: Call, answers: Answers, form: Form, usage: Usage) -> bytes:
    """Sends the events as they come; returns the last ones, which go out together with the end.

    An answer's opening event travels with its first text: alone, it would make that text wait for the next tick of a
    channel that sends on a grid.
    """
    pending = b""
    async with aclosing(answers):
        async for index, event in answers:
            if isinstance(event, Delta) and (chunk := form.delta(index, event)):
                await call.reply.event(pending + chunk)
                pending = b""
            elif isinstance(event, Done):
                usage.add(index, event)
                pending += form.finish(index, event.finish_reason)
            elif isinstance(event, Started):
                pending += form.begin(index)
    return pending
