"""The local verifying proxy, as `cloister connect` runs it, that counts how often it verified evidence.

Run as `python -m cloister.bench.proxied URL ROOT`, ROOT being the file of the simulator's certificate. It tells its port;
then each line of standard input is answered by the number of verifications. It ends with its standard input.
"""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from cloister.bench.child import run_child, tell
from cloister.bench.load import elsewhere
from cloister.client import AsyncSession
from cloister.evidence.document import Document
from cloister.host.process import listen
from cloister.proxy import ProxyConfig, create_proxy
from cloister.proxy.serving import server
from cloister.verify import Policy

__all__ = ["Counter", "main"]


class Counter:
    """A session's `complete`, which is called once for every document that is verified: adds nothing, and counts."""

    def __init__(self) -> None:
        self.verifications = 0

    def __call__(self, document: Document, _now: float) -> Document:
        self.verifications += 1
        return document


def main(arguments: Sequence[str]) -> None:
    url, root = arguments
    elsewhere()
    policy = Policy(
        platforms=("sim",),
        simulator_root=Path(root).read_bytes(),
        tolerate_insecure=frozenset({"api-keys-off"}),
    )
    asyncio.run(_serve(url, policy))


async def _serve(url: str, policy: Policy) -> None:
    """No reuse of cached prefixes: each repeat of a load must cost what the first one did."""
    counter = Counter()
    session = AsyncSession(url, policy=policy, pin_measurement=True, reuse_cache=False, complete=counter)
    with listen("127.0.0.1", 0) as sock:
        async with session:
            await session.verify()
            port = sock.getsockname()[1]
            serving = server(create_proxy(session, ProxyConfig(port=port)))
            running = asyncio.create_task(serving.serve(sockets=[sock]))
            try:
                tell(port=port)
                while await asyncio.to_thread(sys.stdin.readline):
                    tell(verifications=counter.verifications)
            finally:
                serving.should_exit = True
                await running


if __name__ == "__main__":
    run_child(main)
