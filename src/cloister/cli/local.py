"""An enclave on this machine: what `serve`, `up`, `demo` and `bench` start, and the policy that pins a simulated one.

Everything here is the untrusted host's work: it makes the launch config, plays simulated hardware, and hands over paths.
"""

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx2
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from cloister.enclave.boot import Boot, EnclaveConfig, KeyHash
from cloister.enclave.llm.llama.library import library_dir
from cloister.enclave.llm.upstream import model_digest
from cloister.errors import NotTrusted, Unreachable, WrongUse
from cloister.evidence import simulated
from cloister.evidence.launch import LaunchConfig, built_in, launch_digest
from cloister.host.process import EnclaveProcess, listen, names_of, origins
from cloister.models.store import LocalModel
from cloister.owner.deployment import owner_name
from cloister.owner.joining import keep_together
from cloister.private_file import refuse_shared, write_once
from cloister.sim import Device, LaunchedEnclave, Measurement, measure
from cloister.verify import Policy

__all__ = [
    "WAIT",
    "LocalEnclave",
    "Plan",
    "file_digest",
    "group_policy_for",
    "policy_for",
    "state_directory",
    "write_root",
]


def state_directory() -> Path:
    """`$XDG_STATE_HOME/cloister`, or `~/.local/state/cloister`: the owner's key and the simulator's keys and root.

    Made where it is missing. Raises: WrongUse when others can reach it, who could put another root in the old one's place.
    """
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    path = (named if named.is_absolute() else Path.home() / ".local" / "state") / "cloister"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_shared(path)
    return path


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def owner_key() -> Ed25519PrivateKey:
    """This machine's owner key, made on the first use, readable by its user alone.

    Two processes that start at once end with the same key. Raises: WrongUse.
    """
    path = state_directory() / "owner.pem"
    if not path.exists():
        pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_once(path, pem)
    refuse_shared(path)
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise WrongUse(f"{path} does not hold an Ed25519 key.", hint="Move it away; a new one is made.")
    return key


@dataclass(frozen=True, slots=True)
class Plan:
    """What shall run. `model_digest` (hex) is what the launch config names; an attacker may hand over another file."""

    model: LocalModel
    config: EnclaveConfig
    owner: str
    measurement: Measurement
    deployment: str = "local"
    model_digest: str = ""
    keys: tuple[KeyHash, ...] = ()

    @classmethod
    def make(
        cls, model: LocalModel, *, keys: Sequence[KeyHash] = (), platform: str = simulated.PLATFORM, **settings: Any
    ) -> Self:
        """Measures the code that would run and hashes the model: about a second. With the setting `upstream` there is no
        engine to measure, and of the model only its name to hash."""
        config = EnclaveConfig(platform=platform, api_keys=bool(keys), **settings)
        ours = config.upstream is None
        return cls(
            model=model,
            config=config,
            owner=owner_name(owner_key()),
            measurement=measure(library_dir() if ours else None),
            model_digest=file_digest(model.path) if ours else model_digest(model.name),
            keys=tuple(keys),
        )

    def launch(self) -> bytes:
        config = self.config.digest().hex()
        return LaunchConfig(
            owner_key=self.owner,
            deployment=self.deployment,
            release=1,
            app=built_in(config),
            models=(self.model_digest,),
            config_sha256=config,
        ).encode()


def group_policy_for(measurement: Measurement, root_pem: bytes) -> str:
    """A key group's policy (TOML), for simulated replicas of exactly this code on this machine."""
    root = "".join(line for line in root_pem.decode().splitlines() if "-----" not in line)
    components = ", ".join(f'{name} = "{value}"' for name, value in measurement.components().items())
    lines = ("version = 1", f'dangerously_trust_simulator = "{root}"', "[measurements]", f"sim = [{{ {components} }}]")
    return "\n".join((*lines, ""))


WAIT = "wait"
"""In the place of a member's address."""

_REFUSALS = 3


class Joining:
    """A thread that has a member of a key group let this machine's replica in, and keeps their keys the same. `give_up` is
    called when it was refused a few times before it ever served; `refusal` says why. Later it goes on with its own keys."""

    def __init__(self, joiner: str, member: str, give_up: Callable[[], None]) -> None:
        self.refusal: NotTrusted | None = None
        self._joiner, self._member = joiner, member
        self._give_up = give_up
        self._refused = 0
        self._serves = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="joining", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def serves(self) -> None:
        """The replica has keys: from here on a refusal ends nothing."""
        self._serves = True

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _keep(self) -> None:
        with httpx2.Client(timeout=10.0, follow_redirects=False, trust_env=False) as client:
            keep_together(
                client, joiner=self._joiner, member=self._member, stopped=self._stop.wait, on_refusal=self._refuse
            )

    def _refuse(self, error: NotTrusted) -> None:
        if self._serves:
            return
        self._refused += 1
        if self._refused == _REFUSALS:
            self.refusal = error
            self._stop.set()
            self._give_up()


def policy_for(plan: Plan, root_pem: bytes) -> Policy:
    """Pins all that can be pinned: owner, deployment, model, config, code, interpreter and engine."""
    return Policy(
        deployment=plan.deployment,
        owner_key=plan.owner,
        models=frozenset({plan.model_digest}),
        config=plan.config.digest().hex(),
        platforms=("sim",),
        measurements={"sim": (plan.measurement.components(),)},
        simulator_root=root_pem,
        tolerate_insecure=frozenset(plan.config.insecure),
    )


class LocalEnclave:
    """One running enclave. A context manager: leaving it stops the process and the simulated hardware, if that is what
    the plan's platform asks for. `endorsements`: a file with the vendor's collateral, for the enclave to hand out;
    `tokenizer`: the folder of an upstream's model. `tls_port` and `tls_names`: of the plan's TLS listener, if it has one.
    `join`: the address of a member of the plan's key group, which shall let this replica in; `WAIT`:
    somebody else has one do it, such as a broker; "": this one begins it."""

    def __init__(
        self,
        plan: Plan,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        device: Device | None = None,
        engine_dir: Path | None = None,
        package_root: Path | None = None,
        endorsements: Path | None = None,
        tokenizer: Path | None = None,
        tls_port: int = 0,
        tls_names: Sequence[str] = (),
        join: str = "",
    ) -> None:
        """`engine_dir` and `package_root`: other libraries and other code than the installed ones, for attackers."""
        self.plan = plan
        self._socket: socket.socket = listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._tls = self._listen_tls(host, tls_port) if plan.config.tls else None
        self.tls_origins = () if self._tls is None else origins(tls_names or names_of(host), self._tls.getsockname()[1])
        launch = plan.launch()
        self._device: Device | None = None
        self._hardware: LaunchedEnclave | None = None
        if plan.config.platform == simulated.PLATFORM:
            self._device = device or Device.open(state_directory() / "sim")
            self._hardware = self._device.launch(plan.measurement, launch_digest(launch))
        given: tuple[int, ...] = () if self._hardware is None else (self._hardware.fd,)
        boot = Boot(
            launch=launch,
            config=plan.config.encode(),
            listen_fd=self._socket.fileno(),
            device_fd=given[0] if given else None,
            model_path=str(plan.model.path) if plan.config.upstream is None else "",
            model_name=plan.model.name,
            engine_dir=str(engine_dir or library_dir()) if plan.config.upstream is None else "",
            api_keys=plan.keys,
            endorsements_path=str(endorsements.absolute()) if endorsements else "",
            tokenizer_path=str(tokenizer.absolute()) if tokenizer else "",
            tls_fd=self._tls.fileno() if self._tls else None,
            tls_origins=self.tls_origins,
            founds_group=not join,
        )
        given += () if self._tls is None else (self._tls.fileno(),)
        self.process = EnclaveProcess(boot.encode(), (self._socket.fileno(), *given), package_root)
        self._joining = Joining(self.url, join, self.process.stop) if join not in ("", WAIT) else None

    @property
    def device(self) -> Device:
        """The simulated hardware. Raises: WrongUse where the hardware is real."""
        if self._device is None:
            raise WrongUse("This enclave's hardware is not simulated.")
        return self._device

    @property
    def policy(self) -> Policy:
        return policy_for(self.plan, self.device.root_pem)

    def __enter__(self) -> Self:
        return self

    def start(self, on_progress: Callable[[float], None] = lambda _share: None) -> dict[str, Any]:
        """Returns the enclave's description of itself once it can answer. Raises what it says went wrong."""
        self.process.start()
        if self._hardware is not None:
            self._hardware.handed_over()
        self._close_sockets()
        if self._joining is not None:
            self._joining.start()
        try:
            ready = self.process.wait_ready(on_progress)
            if self._joining is not None:
                self._joining.serves()
            return ready
        except Unreachable:
            if self._joining is not None and self._joining.refusal is not None:
                raise self._joining.refusal from None
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._joining is not None:
            self._joining.stop()
        self.process.stop()
        self._close_sockets()
        if self._hardware is not None:
            self._hardware.close()

    def _listen_tls(self, host: str, port: int) -> socket.socket:
        """Raises: WrongUse."""
        try:
            return listen(host, port)
        except WrongUse as error:
            self._socket.close()
            raise WrongUse(error.message, hint="Choose another port with --tls-port.") from error

    def _close_sockets(self) -> None:
        self._socket.close()
        if self._tls is not None:
            self._tls.close()


def write_root(device: Device) -> Path:
    """The simulator's root certificate in a file, for `--dangerously-trust-simulator`."""
    path = state_directory() / "sim-root.pem"
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_bytes(device.root_pem)
    draft.replace(path)
    return path
