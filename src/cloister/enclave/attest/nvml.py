"""NVIDIA GPUs in confidential computing mode, through the driver's own library (libnvidia-ml.so.1).

Source: NVIDIA's nvml.h: nvmlSystemGetConfComputeState, nvmlDeviceGetConfComputeGpuCertificate,
nvmlDeviceGetConfComputeGpuAttestationReport and their structures (driver 535 and later).
"""

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cloister.errors import ConnectionFailed, MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.document import Item
from cloister.evidence.nvidia import NONCE_SIZE, GpuEvidence, parse_chain, parse_report

__all__ = ["LIBRARY", "AttestationReport", "GpuCertificate", "NvidiaGpus", "SystemState", "load_nvml"]

LIBRARY = "libnvidia-ml.so.1"

MAX_GPUS = 16

_SUCCESS = 0
_ERRORS: Mapping[int, str] = {
    1: "UNINITIALIZED",
    2: "INVALID_ARGUMENT",
    3: "NOT_SUPPORTED",
    4: "NO_PERMISSION",
    6: "NOT_FOUND",
    7: "INSUFFICIENT_SIZE",
    9: "DRIVER_NOT_LOADED",
    10: "TIMEOUT",
    13: "FUNCTION_NOT_FOUND",
    15: "GPU_IS_LOST",
    16: "RESET_REQUIRED",
    18: "LIB_RM_VERSION_MISMATCH",
    27: "NOT_READY",
    999: "UNKNOWN",
}
_HINTS: Mapping[int, str] = {
    3: "This GPU, or its driver, has no confidential computing: Hopper or Blackwell, driver 550 or later.",
    4: "The GPU's device files were not given to this user.",
    9: "Load the NVIDIA kernel modules first.",
    18: "The driver's library and its kernel module are of different versions: restart the guest.",
    27: "The GPU is not ready yet. Try again in a moment.",
}
_FEATURE_ON = 1
_DEVTOOLS_OFF = 0
_PRODUCTION = 2

_LOCK = threading.Lock()
"""One GPU answers one SPDM exchange at a time."""


class SystemState(ctypes.Structure):
    """nvmlConfComputeSystemState_t."""

    _fields_ = (("environment", ctypes.c_uint), ("cc_feature", ctypes.c_uint), ("dev_tools_mode", ctypes.c_uint))


class GpuCertificate(ctypes.Structure):
    """nvmlConfComputeGpuCertificate_t; both chains are PEM."""

    _fields_ = (
        ("chain_size", ctypes.c_uint),
        ("attestation_chain_size", ctypes.c_uint),
        ("chain", ctypes.c_ubyte * 0x1000),
        ("attestation_chain", ctypes.c_ubyte * 0x1400),
    )


class AttestationReport(ctypes.Structure):
    """nvmlConfComputeGpuAttestationReport_t; `nonce` is the question, the rest the answer."""

    _fields_ = (
        ("is_cec_report_present", ctypes.c_uint),
        ("report_size", ctypes.c_uint),
        ("cec_report_size", ctypes.c_uint),
        ("nonce", ctypes.c_ubyte * NONCE_SIZE),
        ("report", ctypes.c_ubyte * 0x2000),
        ("cec_report", ctypes.c_ubyte * 0x1000),
    )


def load_nvml() -> Any:
    """The driver's library. Raises: OSError where there is none."""
    return ctypes.CDLL(LIBRARY)


class NvidiaGpus:
    """All GPUs of this machine. Blocking; safe to call from several threads.

    Their evidence is made first: the CPU's report names it (PROTOCOL, "Attestation document").
    """

    def __init__(self, load: Callable[[], Any] = load_nvml) -> None:
        self._load = load

    def confidential(self) -> int:
        """How many GPUs the driver shows. Raises: ConnectionFailed without driver or library; NotTrusted unless they are
        in confidential computing mode, without developer tools."""
        with self._library() as library:
            _check_state(library)
            return _count(library)

    def collect(self, nonce: bytes) -> Mapping[str, Item]:
        """`gpu-0`, `gpu-1`, … over `nonce` (32 bytes, PROTOCOL's gpu_nonce), in the driver's order.

        (1) confidential computing is on, developer tools are off, the environment is production
        (2) each GPU's chain
        (3) each GPU's report; it names our nonce

        Does not check signatures or measurements: that is for whoever verifies.

        Raises: WrongUse for another size; NotTrusted where the mode is another; ConnectionFailed; MalformedEvidence.
        """
        if len(nonce) != NONCE_SIZE:
            raise WrongUse("A GPU's nonce has 32 bytes.", step="attest.gpu", expected=str(NONCE_SIZE))
        with _LOCK, self._library() as library:
            _check_state(library)  # (1)
            return {f"gpu-{index}": _evidence(library, index, nonce) for index in range(_count(library))}

    @contextmanager
    def _library(self) -> Iterator[Any]:
        try:
            library = self._load()
        except OSError as error:
            hint = "Install NVIDIA's driver in this guest."
            raise ConnectionFailed(f"{LIBRARY} cannot be loaded.", step="attest.gpu", hint=hint) from error
        _call(library, "nvmlInit_v2")
        try:
            yield library
        finally:
            library.nvmlShutdown()


def _call(library: Any, name: str, *arguments: Any) -> None:
    try:
        function = getattr(library, name)
    except AttributeError as error:
        raise ConnectionFailed(
            f"The driver's library lacks {name}.", step="attest.gpu", hint="Driver 550 or later is needed."
        ) from error
    code = function(*arguments)
    if code != _SUCCESS:
        got = _ERRORS.get(code, f"error {code}")
        raise ConnectionFailed(f"{name} failed: {got}.", step="attest.gpu", got=got, hint=_HINTS.get(code, ""))


def _count(library: Any) -> int:
    count = ctypes.c_uint()
    _call(library, "nvmlDeviceGetCount_v2", ctypes.byref(count))
    if count.value > MAX_GPUS:
        raise MalformedEvidence("The driver shows more GPUs than a machine has.", step="attest.gpu")
    return count.value


def _check_state(library: Any) -> None:
    state = SystemState()
    _call(library, "nvmlSystemGetConfComputeState", ctypes.byref(state))
    for what, expected, got, hint in (
        ("confidential computing", _FEATURE_ON, state.cc_feature, "The operator sets the GPU's mode: CC on."),
        ("developer tools", _DEVTOOLS_OFF, state.dev_tools_mode, "In devtools mode the GPU's memory can be read."),
        ("environment", _PRODUCTION, state.environment, "A simulated environment protects nothing."),
    ):
        if got != expected:
            raise NotTrusted(
                f"The GPUs' {what} is set wrongly.", step="attest.gpu", expected=str(expected), got=str(got), hint=hint
            )


def _evidence(library: Any, index: int, nonce: bytes) -> Item:
    handle = ctypes.c_void_p()
    _call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    certificate = GpuCertificate()
    _call(library, "nvmlDeviceGetConfComputeGpuCertificate", handle, ctypes.byref(certificate))  # (2)
    chain = _part(certificate.attestation_chain, certificate.attestation_chain_size).rstrip(b"\0")
    parse_chain(chain)
    answer = AttestationReport()
    answer.nonce[:] = nonce
    _call(library, "nvmlDeviceGetConfComputeGpuAttestationReport", handle, ctypes.byref(answer))  # (3)
    report = _part(answer.report, answer.report_size)
    if parse_report(report).nonce != nonce:
        raise MalformedEvidence("The GPU's report answers another question.", step="attest.gpu")
    return GpuEvidence(report, chain, nonce).item()


def _part(buffer: Any, size: int) -> bytes:
    if not 0 < size <= len(buffer):
        raise MalformedEvidence("The driver says a length that its buffer does not have.", step="attest.gpu")
    return bytes(buffer[:size])
