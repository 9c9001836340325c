"""The untrusted hop, sync and async: carries out the steps of an `exchange` and translates what goes wrong on the way.

Plain HTTP by httpcore2 alone, the layer under httpx2, which knows no cookies and no redirects: no compression, nothing of the
inner request. TLS, if there is any, is the hop's own affair: what protects the words is the seal.
"""

import asyncio
import functools
import importlib
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import closing
from typing import TypeAlias, TypeVar
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies

import httpcore2
import httpx2

from cloister.client.exchange import Arrived, Fetch, Opened, Reply, Step, Verify, Work, content, trailers
from cloister.errors import CloisterError, ConnectionFailed, TruncatedResponse
from cloister.verify import Verified

__all__ = ["AsyncHop", "Hop", "Timeouts", "proxy", "proxy_for"]

T = TypeVar("T")
# httpcore2 translates a record that does not open (`ssl.SSLError`, an OSError) on the sync way alone.
_FAULTS = (
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.ProxyError,
    httpcore2.TimeoutException,
    httpcore2.UnsupportedProtocol,
    OSError,
)
Timeouts: TypeAlias = Mapping[str, float | None]  # connect, read, write, pool; seconds
_SECONDS = 30.0
_READ_SECONDS = 300.0  # of silence: a model may think long before its first token
_TIMEOUTS: Timeouts = {"connect": _SECONDS, "write": _SECONDS, "pool": _SECONDS, "read": _READ_SECONDS}
_HEADERS = {"user-agent": "cloister", "accept-encoding": "identity"}


def proxy_for(url: str) -> str | None:
    """The address of the proxy that the environment names for this URL (`HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`, …)."""
    parts, named = urlsplit(url), getproxies()
    found = named.get(parts.scheme) or named.get("all")
    if not found or any(_is_excepted(parts, entry.strip().lower()) for entry in named.get("no", "").split(",")):
        return None
    return found if "://" in found else f"http://{found}"


def _is_excepted(parts: SplitResult, entry: str) -> bool:
    """By one entry of `NO_PROXY`: `*`, a name and all below it (`.name` and `*.name` too), an address, a network; with a
    scheme or a port, for that alone."""
    scheme, _, rest = entry.rpartition("://")
    host = parts.hostname or ""
    if not rest or scheme not in ("", "all", parts.scheme):
        return False
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(rest.strip("[]"), strict=False)
    except ValueError:
        name = rest.lstrip("*").lstrip(".")
        ends = (host, f"{host}:{parts.port}", parts.netloc)
        return not name or any(end == name or end.endswith(f".{name}") for end in ends)


def proxy(address: str) -> httpcore2.Proxy:
    """Raises: ValueError, httpx2.InvalidURL for what is no address of one; ImportError for SOCKS without its library."""
    named = httpx2.Proxy(address)
    if named.url.scheme.startswith("socks"):
        importlib.import_module("socksio")
    return httpcore2.Proxy(_core(named.url), auth=named.raw_auth)


def _core(url: httpx2.URL) -> httpcore2.URL:
    return httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


@functools.lru_cache(maxsize=32)
def _address(url: str) -> tuple[httpcore2.URL, str]:
    """With what `Host` says. A session asks for few addresses again and again."""
    parsed = httpx2.URL(url)
    return _core(parsed), parsed.netloc.decode("ascii")


class _Base:
    """One exchange's use of the hop; `answered` once something of an answer has arrived. `trailers`: filled when an answer's
    authentic end has opened."""

    def __init__(self, timeouts: Timeouts | None) -> None:
        self.trailers: list[tuple[bytes, bytes]] = []
        self._timeouts = dict(_TIMEOUTS if timeouts is None else timeouts)
        self._answered = False

    def _request(self, step: Fetch) -> httpcore2.Request:
        url, host = _address(step.url)
        headers = {"host": host, **_HEADERS, **step.headers}
        if step.content:
            headers["content-length"] = str(len(step.content))
        extensions = {"timeout": self._timeouts}
        return httpcore2.Request(
            step.method, url, headers=list(headers.items()), content=step.content, extensions=extensions
        )

    def _opened(self, opened: Opened, data: bytes) -> Iterator[bytes]:
        """The content in what arrived. Raises: TruncatedResponse, ChannelBroken."""
        items = opened.opener.feed(data)
        self.trailers += trailers(items)
        return content(items)

    def _broken(self, error: Exception) -> CloisterError:
        if self._answered:
            return TruncatedResponse(
                "The answer broke off before its end.",
                hint="What came is not the whole answer. Ask again.",
                step="response",
                got=type(error).__name__,
            )
        return ConnectionFailed(
            "The enclave could not be reached, or did not answer.",
            hint="Is it running, and is the address right?",
            step="connection",
            got=type(error).__name__,
        )


class Hop(_Base):
    def __init__(
        self, pool: httpcore2.ConnectionPool, verify: Callable[[Verified | None], Verified], timeouts: Timeouts | None
    ) -> None:
        super().__init__(timeouts)
        self._pool = pool
        self._verify = verify
        self._response: httpcore2.Response | None = None
        self._chunks: Iterator[bytes] = iter(())

    def drive(self, flow: Generator[Step, Reply, T]) -> T:
        with closing(flow):
            try:
                step = next(flow)
                while True:
                    step = flow.send(self._do(step))
            except StopIteration as done:
                result: T = done.value
                return result

    def body(self, opened: Opened) -> Iterator[bytes]:
        """The content as it opens; ends well only if the answer did. Raises: TruncatedResponse, ChannelBroken."""
        self._answered = True
        self.trailers += opened.trailers
        yield from opened.body
        while data := self._read():
            yield from self._opened(opened, data)
        opened.opener.finish()

    def close(self) -> None:
        if self._response is not None:
            self._response.close()

    def _do(self, step: Step) -> Reply:
        if isinstance(step, Verify):
            return self._verify(step.stale)
        if isinstance(step, Work):
            return step.do()
        return self._fetch(step) if isinstance(step, Fetch) else self._read()

    def _fetch(self, step: Fetch) -> Arrived:
        self.close()
        self._answered = False
        try:
            response = self._pool.handle_request(self._request(step))
        except _FAULTS as error:
            raise self._broken(error) from error
        self._answered = not step.opaque
        self._response, self._chunks = response, response.iter_stream()
        return _arrived(response)

    def _read(self) -> bytes:
        try:
            if not (data := next(self._chunks, b"")):
                self.close()  # so that the connection is free, whoever forgets to close
            return data
        except _FAULTS as error:
            raise self._broken(error) from error


class AsyncHop(_Base):
    def __init__(
        self,
        pool: httpcore2.AsyncConnectionPool,
        verify: Callable[[Verified | None], Awaitable[Verified]],
        timeouts: Timeouts | None,
    ) -> None:
        super().__init__(timeouts)
        self._pool = pool
        self._verify = verify
        self._response: httpcore2.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None

    async def drive(self, flow: Generator[Step, Reply, T]) -> T:
        with closing(flow):
            try:
                step = next(flow)
                while True:
                    step = flow.send(await self._do(step))
            except StopIteration as done:
                result: T = done.value
                return result

    async def body(self, opened: Opened) -> AsyncIterator[bytes]:
        """The content as it opens; ends well only if the answer did. Raises: TruncatedResponse, ChannelBroken."""
        self._answered = True
        self.trailers += opened.trailers
        for part in opened.body:
            yield part
        while data := await self._read():
            for part in self._opened(opened, data):
                yield part
        opened.opener.finish()

    async def close(self) -> None:
        if self._response is not None:
            await self._response.aclose()

    async def _do(self, step: Step) -> Reply:
        if isinstance(step, Verify):
            return await self._verify(step.stale)
        if isinstance(step, Work):
            working = asyncio.create_task(asyncio.to_thread(step.do))
            try:
                return await asyncio.shield(working)
            finally:
                await asyncio.wait([working])  # no thread can be stopped: what it writes is written before this ends
        return await self._fetch(step) if isinstance(step, Fetch) else await self._read()

    async def _fetch(self, step: Fetch) -> Arrived:
        await self.close()
        self._answered = False
        try:
            response = await self._pool.handle_async_request(self._request(step))
        except _FAULTS as error:
            raise self._broken(error) from error
        self._answered = not step.opaque
        self._response, self._chunks = response, response.aiter_stream()
        return _arrived(response)

    async def _read(self) -> bytes:
        if self._chunks is None:
            return b""
        try:
            if not (data := await anext(self._chunks, b"")):
                await self.close()
            return data
        except _FAULTS as error:
            raise self._broken(error) from error


def _arrived(response: httpcore2.Response) -> Arrived:
    fields: dict[str, str] = {}
    for name, value in response.headers:
        low, text = name.decode("ascii").lower(), value.decode("latin-1")
        fields[low] = f"{fields[low]}, {text}" if low in fields else text
    return Arrived(response.status, fields)
