"""The local proxy on a free port, in a thread, as `cloister connect` runs it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from cloister.cli.local import LocalEnclave
from cloister.client import AsyncSession
from cloister.host.process import listen
from cloister.proxy.app import ProxyConfig, create_proxy


@contextmanager
def running_proxy(enclave: LocalEnclave) -> Iterator[int]:
    sock = listen("127.0.0.1", 0)
    port: int = sock.getsockname()[1]
    proxy = create_proxy(AsyncSession(enclave.url, policy=enclave.policy, pin_measurement=True), ProxyConfig(port))
    server = uvicorn.Server(
        uvicorn.Config(proxy, log_level="critical", proxy_headers=False, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def both_ways(enclave: LocalEnclave) -> Iterator[dict[str, str]]:
    """Addresses of one enclave that was started with `--plaintext`: its own, and a proxy's that verified it."""
    with running_proxy(enclave) as port:
        yield {"plaintext": enclave.url, "proxy": f"http://127.0.0.1:{port}"}
