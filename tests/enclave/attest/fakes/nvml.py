"""NVIDIA's management library over GPUs of our own. Its functions take pointers to C structures, and give codes."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.vendors import nvidia

SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED = 0, 1, 2, 3


def _structure(pointer: Any) -> Any:
    return pointer._obj


@dataclass
class FakeNvml:
    """`report`: (GPU, nonce) -> report. `code`: function -> what it returns instead of working."""

    gpus: int = 1
    environment: int = 2
    cc_feature: int = 1
    dev_tools_mode: int = 0
    report: Callable[[int, bytes], bytes] = lambda index, nonce: nvidia.report(nonce=nonce)
    chain: bytes = b""
    claimed_size: int | None = None
    code: dict[str, int] = field(default_factory=dict)
    open: int = 0
    closed: int = 0

    def __getattribute__(self, name: str) -> Any:
        codes = object.__getattribute__(self, "code")
        if name in codes and codes[name] < 0:
            raise AttributeError(name)
        if name in codes:
            return lambda *_: codes[name]
        return object.__getattribute__(self, name)

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return SUCCESS

    def nvmlShutdown(self) -> int:
        self.closed += 1
        return SUCCESS

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        _structure(count).value = self.gpus
        return SUCCESS if self.open > self.closed else UNINITIALIZED

    def nvmlSystemGetConfComputeState(self, state: Any) -> int:
        found = _structure(state)
        assert ctypes.sizeof(found) == 12
        ctypes.memmove(
            ctypes.addressof(found),
            bytes((ctypes.c_uint * 3)(self.environment, self.cc_feature, self.dev_tools_mode)),
            12,
        )
        return SUCCESS

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        if index.value >= self.gpus:
            return INVALID_ARGUMENT
        _structure(handle).value = 0x1000 + index.value
        return SUCCESS

    def nvmlDeviceGetConfComputeGpuCertificate(self, handle: Any, certificate: Any) -> int:
        """attestationCertChain lies behind two sizes and certChain's 4,096 bytes."""
        found, chain = _structure(certificate), self.chain or nvidia.chain()
        assert ctypes.sizeof(found) == 8 + 0x1000 + 0x1400
        address = ctypes.addressof(found)
        ctypes.memmove(address, bytes((ctypes.c_uint * 2)(0, len(chain) + 1)), 8)
        ctypes.memmove(address + 8 + 0x1000, chain + b"\0", len(chain) + 1)
        return SUCCESS

    def nvmlDeviceGetConfComputeGpuAttestationReport(self, handle: Any, report: Any) -> int:
        """The nonce lies behind three sizes, the report behind it."""
        found = _structure(report)
        assert ctypes.sizeof(found) == 12 + 32 + 0x2000 + 0x1000
        address = ctypes.addressof(found)
        answer = self.report(handle.value - 0x1000, ctypes.string_at(address + 12, 32))
        size = len(answer) if self.claimed_size is None else self.claimed_size
        ctypes.memmove(address, bytes((ctypes.c_uint * 3)(0, size, 0)), 12)
        ctypes.memmove(address + 44, answer, len(answer))
        return SUCCESS
