"""A sealed app in a simulated enclave on this machine: what `cloister test` starts, and the policy that pins it."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from cloister.cli.local import owner_key, state_directory
from cloister.enclave.boot import Boot, EnclaveConfig
from cloister.enclave.llm.llama.library import library_dir
from cloister.evidence import simulated
from cloister.evidence.bundle import BundleHead
from cloister.evidence.launch import launch_digest
from cloister.host.process import EnclaveProcess, listen, names_of, origins
from cloister.owner.deployment import launch_bytes, owner_name
from cloister.sim import Device, measure
from cloister.verify import Policy

__all__ = ["LocalApp", "config_for"]


def config_for(head: BundleHead, platform: str = simulated.PLATFORM, **settings: Any) -> EnclaveConfig:
    """API keys are the built-in app's affair: a Python app does as it likes."""
    context = head.manifest.resources.context
    return EnclaveConfig(platform=platform, **{"api_keys": False, "context_length": context, **settings})


class LocalApp:
    """One start. A context manager: leaving it stops the process and the simulated hardware. `start` returns while the enclave
    waits for its owner; `wait_ready` when it was released and answers."""

    def __init__(
        self, bundle: Path, head: BundleHead, config: EnclaveConfig, *, deployment: str, release: int = 1
    ) -> None:
        self.owner = owner_key()
        self.head = head
        self.config = config
        self.deployment = deployment
        self.measurement = measure(library_dir())
        self.launch = launch_bytes(
            head,
            owner_key=owner_name(self.owner),
            deployment=deployment,
            release=release,
            config=config.encode(),
        )
        self._socket: socket.socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.device = Device.open(state_directory() / "sim")
        self._hardware = self.device.launch(self.measurement, launch_digest(self.launch))
        self._tls = listen("127.0.0.1", 0) if config.tls else None
        given = (self._hardware.fd,) if self._tls is None else (self._hardware.fd, self._tls.fileno())
        boot = Boot(
            launch=self.launch,
            config=config.encode(),
            listen_fd=self._socket.fileno(),
            device_fd=self._hardware.fd,
            model_path="",
            model_name="",
            engine_dir=str(library_dir()),
            bundle_path=str(bundle.absolute()),
            tls_fd=self._tls.fileno() if self._tls else None,
            tls_origins=origins(names_of("127.0.0.1"), self._tls.getsockname()[1]) if self._tls else (),
        )
        self.process = EnclaveProcess(boot.encode(), (self._socket.fileno(), *given))

    @property
    def policy(self) -> Policy:
        """Pins all that can be pinned, and tolerates what this machine cannot give."""
        models = frozenset(self.head.manifest.models)
        return Policy(
            deployment=self.deployment,
            owner_key=owner_name(self.owner),
            models=models or None,
            config=self.config.digest().hex(),
            app=self.head.sha256,
            logs=self.head.manifest.logs,
            platforms=(simulated.PLATFORM,),
            measurements={simulated.PLATFORM: (self.measurement.components(),)},
            simulator_root=self.device.root_pem,
            tolerate_insecure=frozenset({*self.config.insecure, "app-unconfined"}),
        )

    def start(self) -> None:
        self.process.start()
        self._hardware.handed_over()
        self._close_sockets()

    def wait_ready(self, on_progress: Callable[[float], None] = lambda _share: None) -> dict[str, Any]:
        return self.process.wait_ready(on_progress)

    def close(self) -> None:
        self.process.stop()
        self._close_sockets()
        self._hardware.close()

    def _close_sockets(self) -> None:
        self._socket.close()
        if self._tls is not None:
            self._tls.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
