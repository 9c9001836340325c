"""What a user imports: verify first, then transports that seal every request to the verified enclave.

attestor           what a session knows about its enclave (sans-I/O)
exchange           one sealed request and its answer, as a generator of steps (sans-I/O)
hop                carries out those steps over the untrusted network, sync and async
session            Session, AsyncSession
account            what a verification says, in words; explanations: what each of its steps means
certificate        of an enclave's TLS listener, for tools that cannot seal
httpx2_transport   SealedTransport, AsyncSealedTransport; the same for httpx in httpx_transport, if it is installed
"""

from typing import Any

import httpx2

from cloister.client.attestor import Clock
from cloister.client.diagnostic import printable
from cloister.client.exchange import AUTHORITY, InnerRequest
from cloister.client.httpx2_transport import AsyncSealedTransport, SealedTransport
from cloister.client.session import Answer, AsyncAnswer, AsyncSession, Session
from cloister.verify import Policy

__all__ = [
    "AUTHORITY",
    "Answer",
    "AsyncAnswer",
    "AsyncSealedTransport",
    "AsyncSession",
    "Clock",
    "InnerRequest",
    "SealedTransport",
    "Session",
    "async_http_client",
    "http_client",
    "printable",
]

_TIMEOUT = httpx2.Timeout(30.0, read=300.0)


def http_client(url: str, *, policy: Policy, **options: Any) -> httpx2.Client:
    """An httpx2 client whose every request goes, sealed, to the enclave at `url` once that has been verified.

    Ask it for `http://enclave.invalid/…`. `options` are those of `Session`.
    """
    transport = SealedTransport(Session(url, policy=policy, **options))
    return httpx2.Client(transport=transport, base_url=f"http://{AUTHORITY}", timeout=_TIMEOUT)


def async_http_client(url: str, *, policy: Policy, **options: Any) -> httpx2.AsyncClient:
    """As `http_client`, for asyncio."""
    transport = AsyncSealedTransport(AsyncSession(url, policy=policy, **options))
    return httpx2.AsyncClient(transport=transport, base_url=f"http://{AUTHORITY}", timeout=_TIMEOUT)
