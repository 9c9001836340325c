"""The same transports for httpx, where it is installed (the outer hop goes through httpx2 all the same).

They differ from `httpx2_transport` in their bases and nothing else; a type checker cannot follow a base that is a
parameter, so they are written out, and the same tests run over both.
"""

from collections.abc import AsyncIterator, Iterator

import httpx

from cloister.client.exchange import InnerRequest
from cloister.client.session import Answer, AsyncAnswer, AsyncSession, Session

__all__ = ["AsyncSealedTransport", "SealedTransport"]


class SealedTransport(httpx.BaseTransport):
    """`OpenAI(base_url="http://enclave.invalid/v1", http_client=httpx.Client(transport=SealedTransport(session)))`.

    A response's `extensions["trailers"]` holds the fields behind its body, as (name, value), once that was read to its
    end: an answer's receipt, where `Cloister-Receipt` asked for one.

    Closing the client closes the session. Raises what `Session.send` raises: cloister's own errors. Anthropic's SDK takes
    those, as any other, for a connection's and asks again, though the prompt may have run: give an SDK `max_retries=0`.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        inner = InnerRequest(request.method, str(request.url), tuple(request.headers.raw), request.read())
        answer = self._session.send(inner, request.extensions.get("timeout"))
        more = {"trailers": answer.trailers}
        return httpx.Response(answer.status, headers=list(answer.headers), stream=_Stream(answer), extensions=more)

    def close(self) -> None:
        self._session.close()


class AsyncSealedTransport(httpx.AsyncBaseTransport):
    """As `SealedTransport`, for `httpx.AsyncClient` and `AsyncOpenAI`."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        inner = InnerRequest(request.method, str(request.url), tuple(request.headers.raw), await request.aread())
        answer = await self._session.send(inner, request.extensions.get("timeout"))
        more = {"trailers": answer.trailers}
        return httpx.Response(answer.status, headers=list(answer.headers), stream=_AsyncStream(answer), extensions=more)

    async def aclose(self) -> None:
        await self._session.aclose()


class _Stream(httpx.SyncByteStream):
    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._answer)

    def close(self) -> None:
        self._answer.close()


class _AsyncStream(httpx.AsyncByteStream):
    def __init__(self, answer: AsyncAnswer) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._answer:
            yield part

    async def aclose(self) -> None:
        await self._answer.aclose()
