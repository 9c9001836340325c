import os
import socket
import sys

import pytest

from cloister.proxy.guard import peer_uid

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_kernel_says_whose_connection_it_is(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError as error:
        pytest.skip(f"no {host} here: {error}")
    with listener, socket.create_connection(listener.getsockname()[:2]) as client:
        near, far = client.getsockname()[:2], listener.getsockname()[:2]
        assert peer_uid(near, far) == os.getuid()
        assert peer_uid((near[0], near[1] ^ 1), far) is None


def test_a_connection_without_addresses_is_nobody_s() -> None:
    assert peer_uid(None, ("127.0.0.1", 1)) is None
