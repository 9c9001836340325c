"""The host's backend `process`: an enclave as a child process, on simulated hardware that lives in the host's process.

For laptops and tests: whoever runs the machine can read everything. It has no isolation to offer but a process's own.
"""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from cloister.cli.local import write_root
from cloister.enclave.boot import Boot, parse_config
from cloister.enclave.llm.llama.library import library_dir
from cloister.errors import WrongUse
from cloister.evidence import simulated
from cloister.evidence.launch import LaunchConfig, launch_digest
from cloister.evidence.statement import INSECURE_NAMES
from cloister.host.backend import Event, RunningEnclave, Spawn
from cloister.host.process import EnclaveProcess, listen
from cloister.models.download import resolve
from cloister.models.reference import EmbeddedModel, HubModel, parse_reference
from cloister.models.store import LocalModel
from cloister.sim import Device, LaunchedEnclave, Measurement, measure
from cloister.verify import Policy

__all__ = ["ProcessBackend", "public_model", "start_on"]


class ProcessBackend:
    name = "process"
    platform = simulated.PLATFORM
    bounds_memory = False
    offers_tls = True

    def __init__(self, device: Device) -> None:
        self._device = device
        self._measurement: Measurement | None = None
        self._measuring = threading.Lock()

    @property
    def root(self) -> Path:
        """The simulator's root certificate in a file, for `--dangerously-trust-simulator`."""
        return write_root(self._device)

    def start(self, spawn: Spawn) -> RunningEnclave:
        """Raises: WrongUse for an upstream, and for a model that is a file of this machine; what `resolve` raises."""
        config = parse_config(spawn.config)
        if config.upstream is not None:
            hint = "A model belongs into the bundle."
            raise WrongUse("The host's own servers are not for apps.", hint=hint, step="config")
        model = None if spawn.model is None else public_model(spawn.model)
        measurement = self._measure()
        with contextlib.ExitStack() as ours:  # the enclave has them once it runs
            sockets = [ours.enter_context(listen("127.0.0.1", 0)) for _ in range(2 if config.tls else 1)]
            hardware = self._device.launch(measurement, launch_digest(spawn.launch))
            boot = Boot(
                launch=spawn.launch,
                config=spawn.config,
                listen_fd=sockets[0].fileno(),
                device_fd=hardware.fd,
                model_path=str(model.path) if model else "",
                model_name=model.name if model else "",
                engine_dir=str(library_dir()),
                bundle_path=str(spawn.bundle) if spawn.bundle else "",
                tls_fd=sockets[1].fileno() if config.tls else None,
                tls_origins=spawn.tls_origins if config.tls else (),
            )
            given = (*(one.fileno() for one in sockets), hardware.fd)
            ports = [int(one.getsockname()[1]) for one in sockets]
            return _Running(EnclaveProcess(boot.encode(), given, silent=True), hardware, ports, spawn.cores)

    def forget(self, name: str) -> None:
        """Nothing is kept for one app."""

    def policy(self, launch: LaunchConfig) -> Policy:
        measured = self._measurement or self._measure()
        return Policy(
            deployment=launch.deployment,
            owner_key=launch.owner_key,
            models=frozenset(launch.models) or None,
            config=launch.config_sha256,
            platforms=(self.platform,),
            measurements={self.platform: (measured.components(),)},
            simulator_root=self._device.root_pem,
            tolerate_insecure=frozenset(INSECURE_NAMES),
        )

    def _measure(self) -> Measurement:
        """One at a time: CPython 3.11 cannot parse in two threads at once (SystemError in `ast.parse`)."""
        with self._measuring:
            self._measurement = measure(library_dir())
            return self._measurement


class _Running:
    """Its simulated hardware ends with it. `ports`: where it listens, and its TLS listener's if there is one."""

    def __init__(
        self, process: EnclaveProcess, hardware: LaunchedEnclave, ports: Sequence[int], cores: Sequence[int]
    ) -> None:
        self.port, self.tls_port = ports[0], ports[1] if len(ports) > 1 else 0
        self._process = process
        self._hardware = hardware
        self._lock = threading.Lock()
        try:
            self.pid = start_on(cores, process)
        finally:
            hardware.handed_over()

    def events(self) -> Iterator[Event]:
        yield from self._process.events()

    def stop(self) -> None:
        with self._lock:
            self._process.stop()
            self._hardware.close()


def start_on(cores: Sequence[int], process: EnclaveProcess) -> int | None:
    """Starts it on these CPUs alone; its process id."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)  # of this thread: the child inherits it
        process.start()
    finally:
        os.sched_setaffinity(0, before)
    return process.process.pid if process.process else None


def public_model(reference: str) -> LocalModel:
    """An embedded model, or a hub's. Raises: WrongUse for all else, in one word: what files there are is not told."""
    found: object = None
    with contextlib.suppress(WrongUse, OSError, RuntimeError):  # RuntimeError: `~nobody`
        found = parse_reference(reference)
    if not isinstance(found, EmbeddedModel | HubModel):
        hint = "Name an embedded model, or hf.co/org/repo:quant; a model of your own belongs into the bundle."
        raise WrongUse("The host's own files are not for apps.", hint=hint, step="model")
    return resolve(found)
