"""Sessions: a verified, sealed way to one enclave; sync and async over the same generators (`exchange`)."""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpcore2
import httpx2

from cloister.client.attestor import Attestor, Clock, Completer
from cloister.client.exchange import InnerRequest, Opened, Sealer, attest
from cloister.client.hop import AsyncHop, Hop, Timeouts, proxy, proxy_for
from cloister.client.memory import Memory
from cloister.client.network import Network
from cloister.errors import WrongUse
from cloister.verify import Policy, Verified

__all__ = ["Answer", "AsyncAnswer", "AsyncSession", "Session"]

_KEEPALIVE = 4.0  # seconds; a little less than uvicorn's 5, so that nothing is sent into a connection being closed


class _Core(ABC):
    """What both kinds of session share: who is trusted, and how requests are sealed."""

    def __init__(
        self,
        url: str,
        *,
        policy: Policy,
        require_pq: bool = False,
        pin_measurement: bool = False,
        reuse_cache: bool = True,
        memory: Memory | None = None,
        complete: Completer | None = None,
        clock: Clock = Clock(),  # noqa: B008 (frozen)
    ) -> None:
        self._attestor = Attestor(url, policy, clock=clock, pin=pin_measurement, memory=memory, complete=complete)
        self._closed = False
        self._sealer = Sealer(self._attestor, clock, require_pq=require_pq, reuse_cache=reuse_cache)
        # A proxy named by the environment is one more untrusted hop; but none leads back to this machine.
        local = self._attestor.loopback
        named = None if local else proxy_for(self._attestor.base)
        try:
            self._connect(
                ssl_context=httpx2.create_ssl_context(trust_env=not local),
                proxy=proxy(named) if named else None,
                max_connections=None,
                max_keepalive_connections=32,
                keepalive_expiry=_KEEPALIVE,
            )
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            hint = "Correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or name this address in NO_PROXY."
            raise WrongUse("The proxy that the environment names cannot be used.", step="proxy", hint=hint) from error

    @abstractmethod
    def _connect(self, **http: Any) -> None: ...

    @property
    def url(self) -> str:
        return self._attestor.base

    @property
    def document(self) -> bytes:
        """The attestation document fetched last, refused or not, as transported; b"" before the first."""
        return self._attestor.document

    @property
    def nonce(self) -> bytes:
        """The nonce that `document` was asked for with."""
        return self._attestor.nonce

    @property
    def verified(self) -> Verified | None:
        """The verification in use, if one still holds. Fetches nothing."""
        return self._attestor.current()

    def _current(self, stale: Verified | None) -> Verified | None:
        """The verification in use unless it is `stale`."""
        current = self._attestor.current()
        return None if current is stale else current

    def _check_open(self) -> None:
        """Before anything is sent: a transport that was closed would open a connection that nobody closes."""
        if self._closed:
            raise WrongUse("This session was closed.", step="session", hint="Open another.")


class Session(_Core):
    """A verified, sealed way to one enclave. May be shared between threads.

    `require_pq` refuses key configs without ML-KEM. `pin_measurement` refuses, for this session's life, any change of
    what was verified first, even one that the policy accepts. `reuse_cache=False` sends no secret for the enclave's
    prompt cache, so that nothing is reused. `memory` holds the highest numbers of releases and collateral that were
    accepted, which may not fall: `FileMemory()` remembers across processes; without one the session does for its life.
    `complete` may add vendors' collateral to a document that came without (`cloister.collateral.complete`).

    Does not check that answers are true: only that they come, whole, from the enclave that was verified.
    """

    def _connect(self, **http: Any) -> None:
        self._pool = httpcore2.ConnectionPool(**http)
        self._lock = threading.Lock()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        self._pool.close()

    def verify(self, *, force: bool = False) -> Verified:
        """What was verified within the last hour and still holds; otherwise, or with `force`, verified anew.

        Raises: ConnectionFailed, PlaintextRefused, MalformedEvidence, VerificationFailed (with every factor).
        """
        return self._renew(self._attestor.current() if force else None)

    def send(self, request: InnerRequest, timeouts: Timeouts | None = None) -> "Answer":
        """Seals and sends; returns when the answer's head has opened. Close the answer.

        Raises: WrongUse before anything was sent; NotTrusted, Malformed, Unreachable.
        """
        self._check_open()
        hop = Hop(self._pool, self._renew, timeouts)
        try:
            return Answer(hop.drive(self._sealer.exchange(request)), hop)
        except BaseException:
            hop.close()
            raise

    def _renew(self, stale: Verified | None) -> Verified:
        """The current verification unless it is `stale`: of many threads that find out, one fetches anew."""
        with self._lock:
            if (current := self._current(stale)) is not None:
                return current
            self._check_open()
            hop = Hop(self._pool, self._renew, None)
            try:
                return hop.drive(attest(self._attestor))
            finally:
                hop.close()


class Answer:
    """An authentic answer: `status`, `headers`, and a body that either ends well or raises TruncatedResponse.

    `trailers`: the fields behind the body (a receipt, where one was asked for), as (name, value); empty until its end.
    """

    def __init__(self, opened: Opened, hop: Hop) -> None:
        self.status = opened.head.status
        self.headers = opened.head.headers
        self.trailers = hop.trailers
        self._body = hop.body(opened)
        self._hop = hop

    def __iter__(self) -> Iterator[bytes]:
        return self._body

    def close(self) -> None:
        self._hop.close()


class AsyncSession(_Core):
    """`Session` for asyncio: one event loop, any number of tasks."""

    def _connect(self, **http: Any) -> None:
        self._pool = httpcore2.AsyncConnectionPool(**http, network_backend=Network())
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> "AsyncSession":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        self._closed = True
        await self._pool.aclose()

    async def verify(self, *, force: bool = False) -> Verified:
        """As `Session.verify`."""
        return await self._renew(self._attestor.current() if force else None)

    async def send(self, request: InnerRequest, timeouts: Timeouts | None = None) -> "AsyncAnswer":
        """As `Session.send`."""
        self._check_open()
        hop = AsyncHop(self._pool, self._renew, timeouts)
        try:
            return AsyncAnswer(await hop.drive(self._sealer.exchange(request)), hop)
        except BaseException:
            await hop.close()
            raise

    async def _renew(self, stale: Verified | None) -> Verified:
        if (current := self._current(stale)) is not None:
            return current
        renewing = asyncio.create_task(self._renewed(stale))
        try:
            return await asyncio.shield(renewing)
        finally:
            renewing.cancel()  # given up, it keeps the lock until its thread has ended; nobody waits for that but the next

    async def _renewed(self, stale: Verified | None) -> Verified:
        async with self._lock:
            if (current := self._current(stale)) is not None:
                return current
            self._check_open()
            hop = AsyncHop(self._pool, self._renew, None)
            try:
                return await hop.drive(attest(self._attestor))
            finally:
                await hop.close()


class AsyncAnswer:
    """As `Answer`."""

    def __init__(self, opened: Opened, hop: AsyncHop) -> None:
        self.status = opened.head.status
        self.headers = opened.head.headers
        self.trailers = hop.trailers
        self._body = hop.body(opened)
        self._hop = hop

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._body

    async def aclose(self) -> None:
        await self._hop.close()
