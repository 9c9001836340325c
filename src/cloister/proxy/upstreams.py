"""The enclaves behind one proxy: each verified by itself, under its own policy; and which of them a request is for.

A request goes to the enclave whose model it names, by the statement that was verified last. Where two have a model of one
name, it is written `enclave/model`. What names no model, or `default`, goes to the first. Nothing that is written
`enclave/model` ever goes to another enclave. A bare name may, while the one that was meant was not verified since the start:
its models are not known then.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from urllib.parse import quote

from cloister.client import AsyncSession
from cloister.errors import CloisterError, ConnectionFailed, MalformedMessage
from cloister.proxy.dialect import code_of
from cloister.proxy.forward import inner
from cloister.proxy.guard import Refusal
from cloister.proxy.origin import Identity, identity
from cloister.verify import Verified

__all__ = ["MODELS", "Target", "Upstream", "Upstreams"]

_Told: TypeAlias = tuple[int, dict[str, Any]]

MODELS = "/v1/models"
ALIAS = "default"
_PATIENCE = 10.0  # seconds that a list of models waits for an enclave
_MOST_LIST = 1 << 20  # bytes of one enclave's list
_AT_ONCE = 1 << 16  # bytes of JSON that are read without leaving the event loop


@dataclass(slots=True)
class Upstream:
    """`name` without slashes, as it stands before a model's where names clash. `api_key` goes in the place of the
    caller's own. `models`: the names in the statement that was verified last; `app`: what its launch config says of an
    app that is somebody's own."""

    name: str
    session: AsyncSession
    api_key: str = ""
    models: tuple[str, ...] = field(default=(), init=False)
    app: Identity | None = field(default=None, init=False)

    async def verify(self, *, fresh: bool = False) -> Verified:
        """As `AsyncSession.verify`."""
        verified = await self.session.verify(force=fresh)
        self.look()
        return verified

    def look(self) -> None:
        """Takes over what is verified now, if anything is."""
        if (verified := self.session.verified) is not None:
            self.models = tuple(model.name for model in verified.statement.models)
            self.app = identity(verified)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes, as it shall read there."""

    upstream: Upstream
    content: bytes
    raw_path: bytes = b""


class Upstreams:
    """At least one, of different names."""

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self._all = tuple(upstreams)
        self._named = {one.name: one for one in self._all}
        if not self._all or len(self._named) != len(self._all):
            raise ValueError("upstreams have names of their own")

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._all)

    @property
    def only(self) -> Upstream | None:
        return self._all[0] if len(self._all) == 1 else None

    def get(self, name: str) -> Upstream | None:
        return self._named.get(name)

    async def aclose(self) -> None:
        for one in self._all:
            await one.session.aclose()

    async def target(self, scope: Mapping[str, Any], content: bytes) -> Target | Refusal:
        """Reads the content only where there is more than one to choose from; what is no JSON goes to the first, whose
        API says what is wrong with it."""
        if self.only is not None:
            return Target(self.only, content)
        path = scope["path"]
        if path.startswith(f"{MODELS}/"):
            found = await self._choose(path.removeprefix(f"{MODELS}/"))
            return found if isinstance(found, Refusal) else Target(found[0], content, _path_of(found[1]))
        asked = await _read(content)
        named = asked.get("model")
        if not isinstance(named, str):
            return Target(self._all[0], content)
        found = await self._choose(named)
        if isinstance(found, Refusal):
            return found
        upstream, model = found
        return Target(upstream, content if model == named else json.dumps({**asked, "model": model}).encode())

    async def _choose(self, model: str) -> tuple[Upstream, str] | Refusal:
        """Who is asked, and by which name. Enclaves that are not verified are asked to prove themselves only when none
        of the others has the model: an enclave that is gone must not slow them down."""
        if model in ("", ALIAS):
            return self._all[0], model
        name, _, bare = model.partition("/")
        if bare and (named := self._named.get(name)) is not None:  # whatever others call their models
            if not named.models:
                await _quietly(named)
            return named, model if model in named.models else bare
        if found := self._find(model):
            return found
        await self._verify_others()
        return self._find(model) or _UNKNOWN

    def _find(self, model: str) -> tuple[Upstream, str] | Refusal | None:
        for one in self._all:
            one.look()
        having = [one for one in self._all if model in one.models]
        if len(having) == 1:
            return having[0], model
        if having:
            names = " or ".join(f"{one.name}/{model}" for one in having)
            return Refusal(400, "model_ambiguous", "More than one enclave has a model of this name.", f"Name {names}.")
        return None

    async def _verify_others(self) -> None:
        others = [one for one in self._all if one.session.verified is None]
        if tasks := [asyncio.create_task(_quietly(one)) for one in others]:
            await asyncio.wait(tasks, timeout=_PATIENCE)

    async def models(self, scope: dict[str, Any]) -> _Told | CloisterError:
        """Status and body of GET /v1/models, of all enclaves together, in the caller's dialect; where none has a list, what
        the first of them says. `left_out`: who is missing in it, and why."""
        tasks = [asyncio.create_task(_list(one, scope)) for one in self._all]
        await asyncio.wait(tasks, timeout=_PATIENCE)
        found = {one.name: _result(task) for one, task in zip(self._all, tasks, strict=True)}
        lists = {
            name: told[1] for name, told in found.items() if not isinstance(told, CloisterError) and told[0] == 200
        }
        if not lists:
            return next(iter(found.values()))
        left_out = {name: _reason(told) for name, told in found.items() if name not in lists}
        return 200, _joined(lists) | ({"left_out": left_out} if left_out else {})


async def _list(upstream: Upstream, scope: dict[str, Any]) -> _Told | CloisterError:
    """Status and body of one enclave's list."""
    try:
        answer = await upstream.session.send(inner(scope, b"", api_key=upstream.api_key))
        upstream.look()
        try:
            content = b""
            async for part in answer:
                content += part
                if len(content) > _MOST_LIST:
                    break
        finally:
            await answer.aclose()
    except CloisterError as error:
        return error
    return (answer.status, body) if (body := _object(content)) else MalformedMessage("An enclave lists no models.")


def _result(task: "asyncio.Task[_Told | CloisterError]") -> _Told | CloisterError:
    if task.done():
        return task.result()
    task.cancel()
    return ConnectionFailed("The enclave did not answer in time.", hint="Try again soon.")


def _reason(told: _Told | CloisterError) -> str:
    return code_of(told)[1] if isinstance(told, CloisterError) else f"status {told[0]}"


_UNKNOWN = Refusal(404, "model_not_found", "No verified enclave has this model.", "GET /v1/models lists what there is.")


def _path_of(model: str) -> bytes:
    return f"{MODELS}/{quote(model)}".encode()


async def _quietly(upstream: Upstream) -> None:
    try:
        await upstream.verify()
    except CloisterError:
        return


async def _read(content: bytes) -> dict[str, Any]:
    return _object(content) if len(content) <= _AT_ONCE else await asyncio.to_thread(_object, content)


def _object(content: bytes) -> dict[str, Any]:
    """{} for what is no JSON object."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _joined(lists: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """In the form of the first; a model whose name stands twice is written `enclave/model`."""
    entries = [(name, one) for name, body in lists.items() for one in _entries(body)]
    names = Counter(one["id"] for _, one in entries)
    data = [{**one, "id": f"{name}/{one['id']}"} if names[one["id"]] > 1 else one for name, one in entries]
    joined = {**next(iter(lists.values())), "data": data}
    if "first_id" in joined and data:
        joined |= {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
    return joined


def _entries(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    data = body.get("data")
    found = data if isinstance(data, list) else []
    return [one for one in found if isinstance(one, dict) and isinstance(one.get("id"), str)]
