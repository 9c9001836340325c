"""Shared by all rooms' tests."""

import signal

import pytest
from hypothesis import HealthCheck, settings

# A shell that starts us in the background has SIGINT ignored, and so would every program that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What generated tests look for has nothing to do with how fast the machine is today.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
