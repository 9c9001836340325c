"""Shared by all rooms' tests."""

import signal

import pytest

# A shell that starts us in the background has SIGINT ignored, and so would every program that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
