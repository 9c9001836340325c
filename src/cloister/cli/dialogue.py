"""Questions to an enclave's API and streamed answers, over any `httpx2.Client`; what chat, ask and up share.

An answer counts as whole only when the API said why it ended and closed the stream: what breaks off raises.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from cloister.errors import (
    CloisterError,
    ConnectionFailed,
    EngineDied,
    EngineLoading,
    MalformedMessage,
    QueueFull,
    TruncatedResponse,
    Unauthorized,
    WrongUse,
)

__all__ = ["Asking", "Conversation", "Reply"]

_MOST_LINE_BYTES = 4 << 20
_MOST_ERROR_BYTES = 64 << 10
_NO_STATUS = 599  # an error in the middle of a stream: only its own fields say what it is


@dataclass(frozen=True, slots=True)
class Asking:
    """How to answer; None leaves the choice to the enclave. `raw`: the text as it stands, without chat template."""

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    stop: tuple[str, ...] | None = None
    raw: bool = False
    model: str = "default"

    def chosen(self) -> dict[str, Any]:
        """The parameters that are not left to the enclave, by the API's names."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("raw", "model")}
        return {name: value for name, value in fields.items() if value is not None}

    def body(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.chosen(),
        }


class Reply:
    """One answer as it arrives: iterate once for its pieces. `text` is what came so far; `finish_reason` ("stop",
    "length") and `usage` are set when it came whole.

    Closing the iterator closes the connection, which stops the work in the enclave.
    """

    def __init__(self, client: httpx2.Client, path: str, body: Mapping[str, Any]) -> None:
        self._client = client
        self._path = path
        self._body = body
        self._pieces: list[str] = []
        self.finish_reason = ""
        self.usage: Mapping[str, Any] = {}

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def __iter__(self) -> Iterator[str]:
        """Raises: NotTrusted when the seal broke or the end is missing; Unreachable, WrongUse as the API says, and for
        a question that is no text."""
        try:
            request = self._client.build_request("POST", self._path, json=self._body)
        except ValueError as error:
            raise WrongUse("The question is not UTF-8 text, or a setting is no number.", step="question") from error
        try:
            with contextlib.closing(self._client.send(request, stream=True)) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, _error_body(response))
                yield from self._read(response)
        except httpx2.HTTPError as error:
            raise ConnectionFailed(f"The connection to the enclave failed: {type(error).__name__}.") from error

    def _read(self, response: httpx2.Response) -> Iterator[str]:
        for data in _events(response.iter_bytes()):
            if data == b"[DONE]":
                if self.finish_reason:
                    return
                break
            if piece := self._take(_parse(data)):
                self._pieces.append(piece)
                yield piece
        raise TruncatedResponse(
            "The answer broke off before its end.", hint="What is shown is only a part of it. Ask again.", step="answer"
        )

    def _take(self, event: Mapping[str, Any]) -> str:
        if "error" in event:
            raise _refusal(_NO_STATUS, event)
        if isinstance(usage := event.get("usage"), dict):
            self.usage = usage
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return ""
        self.finish_reason = str(choices[0].get("finish_reason") or "") or self.finish_reason
        delta = choices[0].get("delta")
        piece = delta.get("content") if isinstance(delta, dict) else choices[0].get("text")
        return piece if isinstance(piece, str) else ""


def _events(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The data of server-sent events (comments, which are padding, dropped). Lines end in LF or CRLF alone."""
    buffer = b""
    data: list[bytes] = []
    for chunk in chunks:
        *lines, buffer = (buffer + chunk).split(b"\n")
        if len(buffer) > _MOST_LINE_BYTES:
            raise MalformedMessage("An event of the answer is too large.", step="answer")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []


def _parse(data: bytes) -> Mapping[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage("An event of the answer is not JSON.", step="answer") from error
    if not isinstance(event, dict):
        raise MalformedMessage("An event of the answer is not an object.", step="answer")
    return event


def _error_body(response: httpx2.Response) -> Mapping[str, Any]:
    body = b""
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > _MOST_ERROR_BYTES:
            break
    try:
        return _parse(body)
    except MalformedMessage:
        return {}


def _refusal(status: int, body: Mapping[str, Any]) -> CloisterError:
    """The API's own error, which came sealed, as ours. Its text is the enclave's: output makes it printable."""
    error = body.get("error")
    fields: Mapping[str, Any] = error if isinstance(error, dict) else {}
    message = str(fields.get("message") or f"The enclave answered with status {status}.")
    code = str(fields.get("code") or fields.get("type") or "")
    if status in (401, 403):
        return Unauthorized(message, hint="Give an API key by --api-key or CLOISTER_API_KEY.")
    if status == 429 or "queue" in code:
        return QueueFull(message, hint="Many are asking right now. Try again soon.")
    if "loading" in code:
        return EngineLoading(message, hint="The model is being loaded. Try again soon.")
    if status < 500 or fields.get("type") == "invalid_request_error":
        hint = "/clear forgets the conversation so far." if code == "context_length_exceeded" else ""
        return WrongUse(message, hint=hint, step=code)
    return EngineDied(message, hint="The engine is being restarted. Ask again.", step=code)


@dataclass(slots=True)
class Conversation:
    """The turns so far, resent with every question; only answers that the caller keeps are remembered."""

    client: httpx2.Client
    asking: Asking = Asking()
    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> Reply:
        if self.asking.raw:
            return Reply(self.client, "/v1/completions", {**self.asking.body(), "prompt": text})
        return Reply(self.client, "/v1/chat/completions", {**self.asking.body(), "messages": self._messages(text)})

    def _messages(self, text: str) -> list[dict[str, str]]:
        said = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self.turns:
            said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*said, {"role": "user", "content": text}]

    def keep(self, text: str, reply: Reply) -> None:
        """Remember a turn. Without a template there is no conversation: every text stands alone."""
        if not self.asking.raw and reply.text:
            self.turns.append((text, reply.text))
