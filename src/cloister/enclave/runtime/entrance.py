"""The door of a replica in a key group: the group's messages, and everything else to the gateway once there are keys."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from starlette.types import Receive, Scope, Send

from cloister.channel.group import MAX_MESSAGE
from cloister.channel.keys import KeyRing, replica_of
from cloister.enclave.gateway import problems
from cloister.enclave.gateway.problems import Problem
from cloister.enclave.runtime.bodies import Bodies
from cloister.enclave.runtime.joining import Group
from cloister.enclave.runtime.ration import Ration
from cloister.enclave.runtime.waiting import Door, reply
from cloister.errors import CloisterError, Malformed, NotTrusted

__all__ = ["GROUP_PATH", "Entrance"]

GROUP_PATH = "/.well-known/cloister-group"

_MEDIA_TYPE = b"application/octet-stream"
_AT_ONCE = 4
"""Messages that are judged at the same time."""
_CHALLENGE = "/challenge"
"""The step that needs no message."""

_OURS = "https://cloister.invalid/problems/"
REFUSED = Problem(403, _OURS + "join-refused", "Not let in.")
UNFIT = Problem(400, _OURS + "join-unfit", "This is no message of a key group.")
NOT_NOW = Problem(503, _OURS + "no-member", "This replica can do that later.", headers=((b"retry-after", b"1"),))
MESSAGE_TYPE = Problem(415, _OURS + "media-type", "A key group's messages are application/octet-stream.", close=True)
MESSAGE_SIZE = Problem(413, _OURS + "too-large", "A key group's message has at most 4 MiB.", close=True)

App = Callable[[Any, Any, Any], Awaitable[None]]


class Entrance:
    """An ASGI app. `gateway` makes the app behind it, of the group's keys; until there are any, `Door` stands there."""

    def __init__(self, group: Group, gateway: Callable[[KeyRing], App]) -> None:
        self._group = group
        self._make = gateway
        self._gateway: App | None = None
        self._ration = Ration()
        self._bodies = Bodies(MAX_MESSAGE, MESSAGE_SIZE)
        self._busy = 0
        self._steps: dict[str, Callable[[bytes], Awaitable[bytes]]] = {
            _CHALLENGE: self._challenge,
            "/request": group.request,
            "/admit": group.admit,
            "/accept": self._accept,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and (path == GROUP_PATH or path.startswith(GROUP_PATH + "/")):
            await self._of_the_group(path.removeprefix(GROUP_PATH), scope, receive, send)
        else:
            await self._behind()(scope, receive, send)

    def _behind(self) -> App:
        ring = self._group.ring
        if ring is None:
            return Door(self._group.state)
        if self._gateway is None:
            self._gateway = self._make(ring)
        return self._gateway

    async def _of_the_group(self, step: str, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._steps.get(step)
        if step == "" and scope["method"] in ("GET", "HEAD"):
            await reply(send, self._told())
        elif step == "" or (work is not None and scope["method"] != "POST"):
            await problems.METHOD.answer(send)
        elif work is None:
            await problems.PLAINTEXT.answer(send)
        elif dict(scope["headers"]).get(b"content-type", b"").strip().lower() != _MEDIA_TYPE:
            await MESSAGE_TYPE.answer(send)
        elif not self._ration.take():
            await problems.BUSY.answer(send)
        else:
            message = b"" if step == _CHALLENGE else await self._bodies.read(receive)
            if isinstance(message, Problem):
                await message.answer(send)
            else:
                await self._do(work, message, send)

    async def _do(self, work: Callable[[bytes], Awaitable[bytes]], message: bytes, send: Send) -> None:
        if self._busy >= _AT_ONCE:
            await problems.BUSY.answer(send)
            return
        self._busy += 1
        try:
            answer = await work(message)
        except Malformed as error:
            await replace(UNFIT, title=error.message).answer(send)
        except NotTrusted as error:
            await replace(REFUSED, title=f"Not let in. {error.message}").answer(send)
        except CloisterError as error:
            await replace(NOT_NOW, title=error.message).answer(send)
        else:
            await reply(send, answer, media_type=_MEDIA_TYPE)
        finally:
            self._busy -= 1

    async def _challenge(self, _message: bytes) -> bytes:
        return self._group.challenge()

    async def _accept(self, message: bytes) -> bytes:
        await self._group.accept(message)
        return b""

    def _told(self) -> bytes:
        """Which keys it has, now and next, so that whoever runs several sees whether they are the same."""
        keys = dict(zip(("keys", "next"), map(replica_of, self._group.published()), strict=False))
        return json.dumps({"state": self._group.state, **keys}).encode()
