"""All apps of one host: what the store says shall run, runs; each behind its own stable port.

The store is written first, then the change is made: whoever dies between the two is made whole by the next start.
"""

import contextlib
import fcntl
import hashlib
import json
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cloister.errors import Conflict, HostFull, WrongUse
from cloister.evidence.bundle import MAX_HEAD, NAME, parse_bundle_head
from cloister.evidence.launch import PUBLIC, LaunchConfig, launch_digest, parse_launch
from cloister.host.appraisal import Seen, look
from cloister.host.backend import HostBackend, RunningEnclave, Spawn
from cloister.host.bundles import Bundles
from cloister.host.process import listen, names_of, origins
from cloister.host.relay import Relay
from cloister.host.resources import Capacity, Resources, choose_cores
from cloister.host.store import App, Restart, Sample, Store
from cloister.host.supervisor import Backoff, Status, Supervisor
from cloister.host.usage import Usage, usage_of

__all__ = ["Deployment", "Fleet", "FleetSettings"]

_MAX_CONFIG = 64 << 10
_DESCRIPTORS = 1 << 16
_STALE = 7 * 86400.0  # seconds for which an upload may wait for its rest, or for its app


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """`listen`: the address that apps' ports are on. `ports`: the first and last of them. `address`: how clients reach an
    app, with `{name}` and `{port}`. `tick`: seconds between looks at expiry and memory; `sample`: between samples;
    `evidence`: between looks at evidence that did not change; `sweep`: between looks for uploads that nobody went on with."""

    capacity: Capacity
    listen: str = "127.0.0.1"
    ports: tuple[int, int] = (8500, 8999)
    address: str = "http://127.0.0.1:{port}"
    tick: float = 1.0
    sample: float = 15.0
    evidence: float = 600.0
    sweep: float = 3600.0
    backoff: Backoff = field(default_factory=Backoff)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What is asked for: an `App` without what the host adds."""

    name: str
    launch: bytes
    config: bytes
    bundle: str | None
    model: str | None
    resources: Resources
    expires_at: float | None = None
    restart: Restart = "always"
    replace: bool = False


@dataclass(slots=True)
class _Live:
    """An app's ports (`tls` where it has a TLS listener), and its supervisor while it shall run."""

    relay: Relay
    tls: Relay | None = None
    supervisor: Supervisor | None = None
    cores: tuple[int, ...] = ()
    seen: Seen | None = None
    seen_of: int = 0  # the start that `seen` is about
    trouble: str = ""

    @property
    def relays(self) -> list[Relay]:
        return [self.relay] if self.tls is None else [self.relay, self.tls]

    def lead(self, running: RunningEnclave | None) -> None:
        """The ports to the enclave that runs now, or to none."""
        self.relay.upstream_port = running.port if running else 0
        if self.tls is not None:
            self.tls.upstream_port = running.tls_port if running else 0

    def stop(self) -> None:
        for relay in self.relays:
            relay.stop()


class Fleet:
    """`folder`: the host's state; only one fleet at a time may have it."""

    def __init__(
        self,
        folder: Path,
        store: Store,
        bundles: Bundles,
        backend: HostBackend,
        settings: FleetSettings,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._store = store
        self._bundles = bundles
        self._backend = backend
        self._settings = settings
        self._clock = clock
        self._change = threading.RLock()
        self._live: dict[str, _Live] = {}
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock_file: Any = None

    # Its own life

    def start(self) -> None:
        """Raises: WrongUse when another host has this state folder open."""
        self._lock_file = (self._folder / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            hint = "Stop it, or name another folder with --state."
            raise WrongUse("Another host runs on this state folder.", hint=hint, step="state") from error
        _allow_descriptors()
        self._sweep()
        with self._change:
            for app in self._store.apps():
                self._open(app)
        for seconds, work in (
            (self._settings.tick, self._enforce),
            (self._settings.sample, self._sample),
            (self._settings.tick, self._appraise),
            (self._settings.sweep, self._sweep),
        ):
            thread = threading.Thread(target=self._repeat, args=(seconds, work), name="fleet", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Stops every enclave; what shall run is remembered."""
        self._closing.set()
        with self._change:
            supervisors = [live.supervisor for live in self._live.values() if live.supervisor]
            with ThreadPoolExecutor(max(len(supervisors), 1)) as pool:
                list(pool.map(Supervisor.stop, supervisors))
            for live in self._live.values():
                live.stop()
            self._live.clear()
        for thread in self._threads:
            thread.join()
        if self._lock_file is not None:
            self._lock_file.close()

    def _repeat(self, seconds: float, work: Callable[[], None]) -> None:
        while not self._closing.wait(seconds):
            try:
                work()
            except Exception as error:  # noqa: BLE001 (a thread's edge: the next round may do better)
                *_, (frame, line) = traceback.walk_tb(error.__traceback__)
                place = f"{Path(frame.f_code.co_filename).name}, line {line}"
                print(f"host: {type(error).__name__} at {place}, while looking after apps", file=sys.stderr)  # noqa: T201

    # What people ask for

    def deploy(self, wanted: Deployment, by: str) -> dict[str, Any]:
        """Raises: WrongUse, MalformedEvidence for what cannot be run here; Conflict for a name that is taken; HostFull."""
        with self._change:
            launch = self._judged(wanted)  # and its bundle stays, from here on
            before = self._before(wanted, launch)
            given = self._admit(wanted.name, wanted.resources)
            now = self._clock()
            port = before.port if before else self._free_port()
            app = App(
                name=wanted.name,
                port=port,
                tls_port=self._tls_port(wanted, before, port),
                owner=launch.owner_key,
                launch=wanted.launch,
                config=wanted.config,
                bundle=wanted.bundle,
                model=wanted.model,
                memory_bytes=given.memory_bytes,
                cores=given.cores,
                expires_at=wanted.expires_at,
                restart=wanted.restart,
                wanted="run",
                deployed_by=by,
                created_at=before.created_at if before else now,
                changed_at=now,
            )
            self._store.put(app)
            self._store.log(app.name, now, "deployed", f"release {launch.release}, by {by}")
            self._halt(app.name)
            if before is not None and before.tls_port != app.tls_port:
                self._close_ports(app.name)
            self._open(app)
            if before is not None:
                self._forget(before.bundle)
        return self.describe(app.name)

    def stop(self, name: str) -> dict[str, Any]:
        with self._change:
            self._store.want(name, "stop", self._clock())
            self._halt(name)
        return self.describe(name)

    def restart(self, name: str) -> dict[str, Any]:
        """Stops it if it runs, and starts it. Raises: Conflict when its time is over; HostFull."""
        with self._change:
            app = self._store.app(name)
            if self._over(app):
                hint = f"Give it more: cloister expire {name} --in 7d"
                raise Conflict("This app's time is over.", hint=hint, step="expiry")
            self._admit(name, Resources(app.memory_bytes, app.cores))
            app = self._store.want(name, "run", self._clock())
            self._halt(name)
            self._open(app)
        return self.describe(name)

    def expire(self, name: str, at: float | None) -> dict[str, Any]:
        """`at` in Unix seconds; None: never. One whose time was over starts again when it gets more. Raises: HostFull when
        there is no room for that."""
        with self._change:
            before = self._store.app(name)
            starts = self._over(before) and not self._over(replace(before, expires_at=at)) and before.wanted == "run"
            if starts:
                self._admit(name, Resources(before.memory_bytes, before.cores))
            app = self._store.expire(name, at, self._clock())
            if starts:
                self._open(app)
        self._enforce()
        return self.describe(name)

    def remove(self, name: str) -> None:
        """The app, its log, and its bundle if no other app uses it."""
        with self._change:
            app = self._store.app(name)
            self._halt(name)
            self._store.remove(name)
            self._close_ports(name)
            self._forget(app.bundle)
            self._backend.forget(name)

    # What people see

    def all(self) -> list[dict[str, Any]]:
        return [self._described(app) for app in self._store.apps()]

    def describe(self, name: str) -> dict[str, Any]:
        """Plain data for JSON; times in Unix seconds. Raises: WrongUse."""
        return self._described(self._store.app(name))

    def _described(self, app: App) -> dict[str, Any]:
        launch = parse_launch(app.launch)
        live = self._live.get(app.name)
        status = self._status(app, live)
        samples = self._store.samples(app.name)[-1:]
        seen = live.seen if live and live.supervisor and live.seen_of == status.starts else None
        return {
            "name": app.name,
            "state": status.state,
            "detail": status.detail,
            "since": status.since,
            "starts": status.starts,
            "address": self._settings.address.format(name=app.name, port=app.port),
            "port": app.port,
            "tls": list(self._tls_origins(app)),
            "owner": app.owner,
            "deployment": launch.deployment,
            "release": launch.release,
            "kind": launch.app.kind,
            "platform": self._backend.platform,
            "launch_sha256": launch_digest(app.launch).hex(),
            "models": list(launch.models),
            "egress": list(launch.egress),
            "logs": launch.logs,
            "broker_key": launch.broker_key,
            "bundle": app.bundle,
            "model": app.model,
            "memory_bytes": app.memory_bytes,
            "cores": app.cores,
            "expires_at": app.expires_at,
            "restart": app.restart,
            "wanted": app.wanted,
            "deployed_by": app.deployed_by,
            "created_at": app.created_at,
            "changed_at": app.changed_at,
            "ready": status.ready,
            "usage": asdict(samples[0]) if samples else None,
            "evidence": asdict(seen) if seen else None,
        }

    def _status(self, app: App, live: _Live | None) -> Status:
        if self._over(app):
            return Status("expired", app.expires_at or 0.0, "Its time is over.")
        if live is not None and live.trouble:
            return Status("failed", app.changed_at, live.trouble)
        supervisor = live.supervisor if live is not None else None
        return Status("stopped", app.changed_at) if supervisor is None else supervisor.status

    # Making it so

    def _judged(self, wanted: Deployment) -> LaunchConfig:
        if not NAME.fullmatch(wanted.name):
            raise WrongUse("An app's name has lower-case letters, digits and dashes: 1 to 63 of them.", step="name")
        launch = parse_launch(wanted.launch)
        if (wanted.bundle is None) == (wanted.model is None):
            raise WrongUse("An app has a bundle, or a public model: one of the two.", step="bundle")
        if wanted.bundle is not None:
            _check_bundle(self._bundles.path(wanted.bundle), launch)
        if hashlib.sha256(wanted.config).hexdigest() != launch.config_sha256 or len(wanted.config) > _MAX_CONFIG:
            raise WrongUse("The config is not the one that the launch config names.", step="config")
        platform = str(_parsed(wanted.config).get("platform", ""))
        if platform != self._backend.platform:
            raise WrongUse(
                "This host has another platform than the app was deployed for.",
                hint="Set `platform` in cloister.toml, or deploy to another host.",
                step="platform",
                expected=self._backend.platform,
                got=platform,
            )
        if wanted.expires_at is not None and wanted.expires_at <= self._clock():
            raise WrongUse("The app's time would be over before it began.", step="expiry")
        return launch

    def _tls_port(self, wanted: Deployment, before: App | None, port: int) -> int | None:
        """None where the config asks for no TLS listener. Raises: WrongUse where there can be none, or no client could name it;
        HostFull."""
        if _parsed(wanted.config).get("tls") is not True:
            return None
        if not self._backend.offers_tls:
            raise WrongUse("No enclave of this host has a TLS listener.", hint="Deploy it without --tls.", step="tls")
        if not self._tls_names(wanted.name, port):
            hint = "Its operator gives it one: cloister host --address 'https://{name}.example.org'"
            raise WrongUse("This host has no name that a TLS listener could go by.", hint=hint, step="tls")
        return before.tls_port if before is not None and before.tls_port else self._free_port({port})

    def _tls_names(self, name: str, port: int) -> tuple[str, ...]:
        return names_of(urlsplit(self._settings.address.format(name=name, port=port)).hostname or "::")

    def _tls_origins(self, app: App) -> tuple[str, ...]:
        return () if app.tls_port is None else origins(self._tls_names(app.name, app.port), app.tls_port)

    def _before(self, wanted: Deployment, launch: LaunchConfig) -> App | None:
        before = next((app for app in self._store.apps() if app.name == wanted.name), None)
        if before is not None and not wanted.replace:
            raise Conflict("There is an app of that name.", hint="Choose another, or deploy with replace.", step="name")
        if before is not None and before.owner != launch.owner_key:
            raise Conflict("An app of that name has another owner.", hint="Choose another name.", step="name")
        return before

    def _admit(self, name: str, wanted: Resources) -> Resources:
        """What is given to an app of that name, beside all others that shall run. Raises: WrongUse, HostFull."""
        others = [Resources(app.memory_bytes, app.cores) for app in self._running() if app.name != name]
        return self._settings.capacity.admit(wanted, others)

    def _running(self) -> list[App]:
        return [app for app in self._store.apps() if app.wanted == "run" and not self._over(app)]

    def _over(self, app: App) -> bool:
        return app.expires_at is not None and app.expires_at <= self._clock()

    def _free_port(self, beside: Set[int] = frozenset()) -> int:
        apps = self._store.apps()
        used = {*beside, *(app.port for app in apps), *(app.tls_port for app in apps)}
        first, last = self._settings.ports
        for port in range(first, last + 1):
            if port not in used:
                with contextlib.suppress(WrongUse), listen(self._settings.listen, port):
                    return port
        raise HostFull("Every port for apps is taken.", hint="The operator can give more: cloister host --ports")

    def _open(self, app: App) -> None:
        """Its port, and its enclave if it shall run."""
        live = self._live.get(app.name)
        if live is None or live.trouble:
            live = self._opened(app)
        if live.trouble or live.supervisor is not None or app.wanted != "run" or self._over(app):
            return
        taken = [one.cores for one in self._live.values() if one.supervisor is not None]
        live.cores = choose_cores(self._settings.capacity.cpus, taken, app.cores)
        launch = parse_launch(app.launch)
        live.supervisor = Supervisor(
            self._backend,
            lambda: self._spawn(app, live.cores),
            attach=live.lead,
            log=lambda kind, text: self._store.log(app.name, self._clock(), kind, text),
            words=launch.logs == PUBLIC,
            again=app.restart == "always",
            backoff=self._settings.backoff,
            clock=self._clock,
        )
        live.supervisor.start()

    def _opened(self, app: App) -> _Live:
        """A port that somebody else has taken is that app's trouble alone, and is tried again."""
        before = self._live.get(app.name)
        live = _Live(Relay(0, keep=0), None if app.tls_port is None else Relay(0, keep=0, tls=True))
        with contextlib.ExitStack() as listening:
            try:
                for relay, port in zip(live.relays, (app.port, app.tls_port or 0), strict=False):
                    relay.listener = listening.enter_context(listen(self._settings.listen, port))
            except WrongUse as error:
                live.trouble = error.message
                if before is None or not before.trouble:
                    self._store.log(app.name, self._clock(), "failed", error.message)
            else:
                listening.pop_all()
                for relay in live.relays:
                    relay.start()
        self._live[app.name] = live  # whole: others look at it meanwhile
        return live

    def _close_ports(self, name: str) -> None:
        live = self._live.pop(name, None)
        if live is not None:
            live.stop()

    def _spawn(self, app: App, cores: tuple[int, ...]) -> Spawn:
        return Spawn(
            name=app.name,
            launch=app.launch,
            config=app.config,
            bundle=None if app.bundle is None else self._bundles.path(app.bundle),
            model=app.model,
            memory_bytes=app.memory_bytes,
            cores=cores,
            tls_origins=self._tls_origins(app),
        )

    def _halt(self, name: str) -> None:
        live = self._live.get(name)
        if live is not None and live.supervisor is not None:
            live.supervisor.stop()
            live.supervisor, live.cores, live.seen = None, (), None

    def _forget(self, bundle: str | None) -> None:
        """An app's former bundle, unless another app uses it."""
        if bundle is not None and bundle not in {app.bundle for app in self._store.apps()}:
            self._bundles.drop(bundle)

    # Looking after them

    def _supervised(self) -> Iterator[tuple[str, _Live, Supervisor]]:
        for name, live in list(self._live.items()):
            if live.supervisor is not None:
                yield name, live, live.supervisor

    def _enforce(self) -> None:
        """Time and memory; and ports that were taken."""
        apps = {app.name: app for app in self._store.apps()}
        if any(live.trouble for live in list(self._live.values())):
            with self._change:
                for troubled in self._store.apps():
                    self._open(troubled)
        usage = self._usage()
        for name, live, supervisor in self._supervised():
            app = apps.get(name)
            if app is not None and self._over(app):
                with self._change:  # by now it may have been given more time
                    if live.supervisor is supervisor and self._over(self._store.app(name)):
                        self._halt(name)
                        self._store.log(name, self._clock(), "expired")
            elif app is not None and supervisor in usage and self._is_too_large(usage[supervisor], app):
                limit = f"its limit is {app.memory_bytes >> 20} MiB"
                supervisor.end(f"It took {usage[supervisor].memory_bytes >> 20} MiB of memory; {limit}.")

    def _is_too_large(self, usage: Usage, app: App) -> bool:
        """A virtual machine that uses what it was given takes that, and QEMU's own beside it: never too much."""
        return not self._backend.bounds_memory and usage.memory_bytes > app.memory_bytes

    def _usage(self) -> dict[Supervisor, Usage]:
        """Of the apps that run."""
        leaders: dict[Supervisor, int] = {}
        for _, _, supervisor in self._supervised():
            running = supervisor.running  # which may end at any time
            if running is not None and running.pid is not None:
                leaders[supervisor] = running.pid
        found = usage_of(leaders.values())
        return {supervisor: found[pid] for supervisor, pid in leaders.items() if pid in found}

    def _sample(self) -> None:
        usage = self._usage()
        for name, live, supervisor in self._supervised():
            if supervisor in usage:
                took, relays = usage[supervisor], live.relays
                passed = [sum(getattr(relay, name) for relay in relays) for name in ("connections", "received", "sent")]
                self._store.sample(name, Sample(self._clock(), took.memory_bytes, took.cpu_seconds, *passed))

    def _appraise(self) -> None:
        apps = {app.name: app for app in self._store.apps()}
        for name, live, supervisor in self._supervised():
            status, running = supervisor.status, supervisor.running
            if status.state != "ready" or running is None or name not in apps:
                continue
            fresh = live.seen is not None and live.seen_of == status.starts
            if not fresh or self._clock() - (live.seen.at if live.seen else 0.0) > self._settings.evidence:
                launch = parse_launch(apps[name].launch)
                policy = replace(self._backend.policy(launch), broker_key=launch.broker_key, logs=launch.logs)
                seen = look(running.port, policy, clock=self._clock)
                with self._change:
                    if live.supervisor is supervisor:  # another one counts its starts from the beginning
                        live.seen, live.seen_of = seen, status.starts

    def _sweep(self) -> None:
        """Uploads that nobody went on with, and bundles that no app came for."""
        with self._change:
            used = [app.bundle for app in self._store.apps() if app.bundle]
            self._bundles.drop_stale(self._clock() - _STALE, used)


def _allow_descriptors() -> None:
    """As many as this process may have, up to what all its apps' connections take."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if most == resource.RLIM_INFINITY else min(_DESCRIPTORS, most)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _check_bundle(path: Path, launch: LaunchConfig) -> None:
    """As far as its plaintext tells. Raises: MalformedEvidence, WrongUse."""
    with path.open("rb") as file:
        head = parse_bundle_head(file.read(MAX_HEAD))
    if head.sha256 != launch.app.sha256 or head.total != path.stat().st_size:
        raise WrongUse(
            "The bundle is not the app that the launch config names, or not whole.",
            hint="Package and deploy it again.",
            step="bundle",
            expected=launch.app.sha256,
            got=head.sha256,
        )


def _parsed(config: bytes) -> dict[str, Any]:
    try:
        found = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise WrongUse("The config is not JSON.", step="config") from error
    return found if isinstance(found, dict) else {}
