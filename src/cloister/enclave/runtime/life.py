"""An app's life: waiting -> (the owner's release) -> opening -> serving -> expired."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from starlette.types import Receive, Send

from cloister.channel.keys import KeyRing
from cloister.channel.release import Release
from cloister.enclave.attest import EvidenceSource, GpuSource
from cloister.enclave.attestation import Attestation, Witness, check_launch
from cloister.enclave.boot import Boot, parse_config
from cloister.enclave.gateway import Gateway
from cloister.enclave.gateway.plaintext import demand_loopback
from cloister.enclave.hardening import lower_priority
from cloister.enclave.pages import collapse
from cloister.enclave.pyapp.app import can_confine
from cloister.enclave.runtime.clock import Clock
from cloister.enclave.runtime.entrance import Entrance
from cloister.enclave.runtime.inner import Inner, LanguageModel, Python
from cloister.enclave.runtime.joining import Group, engine_statement, group_policy
from cloister.enclave.runtime.opening import SealedBundle, check_bundle
from cloister.enclave.runtime.waiting import Door, Waiting
from cloister.enclave.serving import TlsFront, server
from cloister.errors import CloisterError, EngineLoading, WrongUse
from cloister.evidence.launch import PUBLIC, LaunchConfig

__all__ = ["UNCONFINED", "Life", "Surroundings"]

UNCONFINED = "app-unconfined"
"""The name in the statement where this machine gives the app no view of its own of files and network."""

_LONGEST_SLEEP = 30.0


class Say(Protocol):
    def __call__(self, event: str, **fields: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an enclave finds around it. `endorsements`: what the host shipped for verifiers. `say`: the host's events."""

    source: EvidenceSource
    gpus: GpuSource | None
    endorsements: Callable[[], bytes]
    say: Say
    clock: Clock = field(default_factory=Clock)


class Life:
    """An ASGI app that is another in each state; `serve` lives it. Make one before any thread is started.

    Raises: NotTrusted, WrongUse, MalformedEvidence for a launch config, configuration or bundle that is not the one.
    """

    def __init__(self, boot: Boot, around: Surroundings) -> None:
        self._boot = boot
        self._around = around
        self._config = parse_config(boot.config)
        self._launch = check_launch(boot.launch, boot.config, around.source)
        group_policy(self._config, self._launch)  # before anything is asked of anybody
        self._bundle = _checked(SealedBundle(Path(boot.bundle_path)), self._launch)
        self._witness = Witness(around.source, boot.launch, around.gpus, around.endorsements)
        self._engine_statement = engine_statement(boot.engine_dir)
        self._model: LanguageModel | None = None
        if self._config.engine == "thread" and self._bundle.head.manifest.kind != "llm":
            self._bundle.close()
            raise WrongUse(
                "A Python app runs in a process of its own, which on this platform would be another enclave.",
                step="app",
                hint="Deploy it on TDX, SEV-SNP or Nitro.",
            )
        if self._bundle.head.manifest.kind == "llm":
            os.environ["CLOISTER_ENGINE_DIR"] = boot.engine_dir
            self._model = LanguageModel(self._config, self._bundle)
        lower_priority()
        self._tls = TlsFront.open(self._ask_inner, self._config, boot, around.clock())
        self._door: Callable[[dict[str, Any], Receive, Send], Awaitable[None]] = Door("starting")
        self._insecure: tuple[str, ...] = ()
        self._inner: Inner | None = None
        self._release: asyncio.Future[Release] | None = None

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await self._door(scope, receive, send)

    async def _ask_inner(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """By TLS, once it serves."""
        await self._opened()(scope, receive, send)

    async def serve(self, on_stop: Callable[[Callable[[], None]], None]) -> None:
        """Until it is told to stop, expired or not; `on_stop` gets what stops it. Raises: what the states raise."""
        front = server(self)
        with socket.socket(fileno=self._boot.listen_fd) as sock:
            if self._config.plaintext:
                demand_loopback(sock)
            serving = asyncio.create_task(front.serve(sockets=[sock]))
            living = asyncio.create_task(self._live())
            on_stop(lambda: setattr(front, "should_exit", True))
            try:
                await asyncio.wait({serving, living}, return_when=asyncio.FIRST_COMPLETED)
                if living.done():
                    living.result()
                await serving
            finally:
                front.should_exit = True
                living.cancel()
                await asyncio.wait([living])
                await self._end()
                await asyncio.wait([serving], timeout=5)

    async def _live(self) -> None:
        release = await self._wait()
        self._around.clock.raise_to(release.time_floor)
        await self._open(release)
        await self._serve(release)
        if release.expires is not None:
            await self._expire(release.expires)

    # waiting

    async def _wait(self) -> Release:
        confined = self._model is not None or await can_confine()
        self._insecure = tuple(self._names()) + (() if confined else (UNCONFINED,))
        if self._model is not None:
            self._inner = self._model
        else:
            tell = self._say_words if self._launch.logs == PUBLIC else None
            self._inner = Python(self._bundle, self._engine_statement, confined=confined, tell=tell)
        waiting = Waiting(
            self._witness,
            self._bundle.head.manifest,
            self._engine_statement,
            self._insecure,
            clock=self._around.clock,
        )
        self._release = asyncio.get_running_loop().create_future()
        self._door = Door("waiting", waiting, self._released)
        self._around.say("waiting", app=self._bundle.head.manifest.name, kind=self._bundle.head.manifest.kind)
        return await self._release

    def _say_words(self, text: str) -> None:
        self._around.say("log", text=text)

    def _names(self) -> list[str]:
        """The weakened settings. Whether a Python app asks for keys is its own affair: it has none of ours."""
        is_ours = self._model is not None
        return [name for name in self._config.insecure if is_ours or name != "api-keys-off"]

    def _released(self, release: Release) -> None:
        """No more evidence for owners from here on, and no more releases."""
        self._door = Door("opening")
        if self._release is not None and not self._release.done():
            self._release.set_result(release)

    # opening

    async def _open(self, release: Release) -> None:
        self._around.say("opening", progress=0.0)
        told = 0.0

        def tell(share: float) -> None:
            nonlocal told
            if share >= told + 0.05:
                told = share
                self._around.say("opening", progress=round(share, 2))

        await asyncio.to_thread(self._bundle.open, release.keys, tell)

    # serving

    async def _serve(self, release: Release) -> None:
        inner = self._opened()
        await inner.start(release, lambda share: self._around.say("loading", progress=share))
        if self._config.group_policy is None:
            self._door = self._gateway(inner, KeyRing(self._around.clock(), ehbp=self._config.ehbp), None)
        elif not await self._enter(inner, release.expires):
            return
        if self._tls is not None:
            self._tls.start()
        collapse()
        self._around.say("ready", **inner.describe())

    async def _enter(self, inner: Inner, expires: int | None) -> bool:
        """The key group, in time: whether it did before the app expired."""
        group = Group(
            self._witness,
            self._config,
            self._engine_statement,
            founds=self._boot.founds_group,
            insecure=self._insecure,
            code="sealed",
            clock=self._around.clock,
        )
        self._door = Entrance(group, lambda ring: self._gateway(inner, ring, group.policy_sha256))
        entering = asyncio.create_task(group.enter(lambda: self._around.say("joining")))
        try:
            while not entering.done() and (expires is None or self._around.clock() < expires):
                await asyncio.wait({entering}, timeout=_LONGEST_SLEEP)
            if entering.done():
                entering.result()
            return entering.done()
        finally:
            entering.cancel()

    def _gateway(self, inner: Inner, ring: KeyRing, group_policy_sha256: str | None) -> Gateway:
        attestation = Attestation(
            self._around.source,
            ring,
            self._boot.launch,
            inner.runs,
            self._insecure,
            gpus=self._around.gpus,
            endorsements=self._around.endorsements,
            aud=self._bundle.head.manifest.origins,
            egress=self._launch.egress,
            code="sealed",
            tls=self._tls.key if self._tls else None,
            group_policy_sha256=group_policy_sha256,
            clock=self._around.clock,
        )
        return Gateway(
            inner,
            ring,
            attestation.document,
            ready=lambda: inner.ready,
            padding=self._config.padding,
            receipt=attestation.receipt,
            ehbp_paths=inner.paths,
            plaintext=self._config.plaintext,
            clock=self._around.clock,
        )

    def _opened(self) -> Inner:
        if self._inner is None:
            raise EngineLoading("The app is not opened yet.")
        return self._inner

    # expired

    async def _expire(self, expires: float) -> None:
        """The keys go with the gateway that held them, the app and its memory with its process."""
        while (left := expires - self._around.clock()) > 0:  # noqa: ASYNC110 (a clock that may jump)
            await asyncio.sleep(min(left, _LONGEST_SLEEP))
        self._door = Door("expired")
        self._around.say("expired")
        await self._end()

    async def _end(self) -> None:
        if self._tls is not None:
            await self._tls.close()
        inner, self._inner, self._model = self._inner or self._model, None, None
        if inner is not None:
            with contextlib.suppress(CloisterError):
                await inner.close()
        self._bundle.close()


def _checked(bundle: SealedBundle, launch: LaunchConfig) -> SealedBundle:
    try:
        check_bundle(bundle.head, launch)
    except CloisterError:
        bundle.close()
        raise
    return bundle
