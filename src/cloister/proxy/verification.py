"""/verification: what is believed of each enclave, what is not proved, and the bytes to check it by."""

import asyncio
import base64
import time
from typing import Any

from cloister.client import AsyncSession
from cloister.client.account import explained, explained_refusal
from cloister.errors import CloisterError
from cloister.proxy.dialect import code_of, envelope
from cloister.proxy.reply import Reply, json_reply
from cloister.proxy.upstreams import Upstream, Upstreams
from cloister.verify import Verified

__all__ = ["status", "verification"]

_WORST_FIRST = ("not-verified", "simulated", "trusted")


def status(upstreams: Upstreams) -> dict[str, Any]:
    """In short, without asking anybody."""
    if (only := upstreams.only) is not None:
        return {"proxy": "cloister", **_state(only), "details": "/verification"}
    states = {one.name: {**_state(one), "models": list(one.models)} for one in upstreams}
    return {"proxy": "cloister", "upstreams": states, "details": "/verification"}


def _state(upstream: Upstream) -> dict[str, Any]:
    verified = upstream.session.verified
    return {
        "enclave": upstream.session.url,
        "verdict": "not verified yet" if verified is None else verified.to_json()["verdict"],
        "first_use": verified is not None and verified.first_use,
    }


async def verification(upstreams: Upstreams, one: Upstream | None, *, fresh: bool, explain: bool) -> Reply:
    """Of `one`, the proof or the refusal; of None, of all by their names: their `verdict` is the worst of them, and the
    status 200 only where every one is verified.

    `explain` adds `explained`, in the words of `cloister verify --explain`; and `saved`, which that command reads from a
    file (null where the enclave showed no document).
    """
    if one is not None:
        return json_reply(*await _told(one, fresh=fresh, explain=explain))
    found = await asyncio.gather(*(_told(each, fresh=fresh, explain=explain) for each in upstreams))
    blocked = {"verdict": "not-verified"}
    told = {
        each.name: {**blocked, "enclave": each.session.url, **body}
        for each, (_, body) in zip(upstreams, found, strict=True)
    }
    worst = min((body["verdict"] for body in told.values()), key=_WORST_FIRST.index)
    return json_reply(502 if worst == "not-verified" else 200, {"v": 1, "verdict": worst, "upstreams": told})


async def _told(upstream: Upstream, *, fresh: bool, explain: bool) -> tuple[int, dict[str, Any]]:
    """Status and body."""
    session, before = upstream.session, upstream.session.nonce
    try:
        verified = await upstream.verify(fresh=fresh)
    except CloisterError as error:
        saved = None if session.nonce == before else _saved(session, time.time())
        more = {"explained": explained_refusal(error), "saved": saved} if explain else {}
        return code_of(error)[0], {**envelope(error), **more}
    more = {"explained": explained(verified), "saved": _saved(session, verified.verified_at)} if explain else {}
    return 200, {**_proof(session, verified), **more}


def _proof(session: AsyncSession, verified: Verified) -> dict[str, Any]:
    """What is believed, what is not proved, and the bytes to check it by (for somebody else's verifier too)."""
    return {
        **verified.to_json(),
        "enclave": session.url,
        "not_proved": [factor.to_json() for factor in verified.factors if factor.verdict == "not-checked"],
        "document": base64.b64encode(session.document).decode(),
        "nonce": base64.b64encode(session.nonce).decode(),
    }


def _saved(session: AsyncSession, at: float) -> dict[str, Any]:
    document = base64.b64encode(session.document).decode()
    return {"cloister": 1, "nonce": session.nonce.hex(), "at": at, "document": document}
