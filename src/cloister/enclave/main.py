"""The enclave's front process: one boot line in, then gateway -> API -> engine until it is told to stop.

Order: (1) no dumps; (2) boot line parsed; (3) the launch config compared with the hardware's own report; (4) the
engine's thread made, then this thread's priority lowered; (5) listening, `readyz` 503; (6) the model loaded and its
digest compared with the launch config; (7) ready: attestation documents are given out.

It says what happens in lines of JSON on standard output, without content: `loading`, `ready`, `failed`.
"""

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from cloister.channel.keys import KeyRing
from cloister.enclave.attest import EvidenceSource, GpuSource
from cloister.enclave.attest.detect import Machine, detect, open_source
from cloister.enclave.attest.simulated import SimulatedTee
from cloister.enclave.attestation import Attestation, Witness, check_launch
from cloister.enclave.boot import Boot, EnclaveConfig, parse_boot, parse_config
from cloister.enclave.gateway import Gateway
from cloister.enclave.gateway.plaintext import demand_loopback
from cloister.enclave.hardening import forbid_dumps, lower_priority, quiet_logs
from cloister.enclave.lineage import read_lineage_digest
from cloister.enclave.llm.api import ROUTES, Api, ApiConfig, create_api
from cloister.enclave.llm.engine import Engine, EngineInfo
from cloister.enclave.llm.llama import LlamaConfig, LlamaEngine, LoopSettings
from cloister.enclave.llm.tenants import ApiKey
from cloister.enclave.llm.upstream import UpstreamConfig, UpstreamEngine, parse_address
from cloister.enclave.pages import collapse
from cloister.enclave.runtime.entrance import Entrance
from cloister.enclave.runtime.joining import Group, engine_statement
from cloister.enclave.runtime.life import Life, Surroundings
from cloister.enclave.serving import TlsFront, server
from cloister.errors import CloisterError, EngineLoading, MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.document import MAX_LOG
from cloister.evidence.endorsements import parse_endorsements
from cloister.evidence.launch import LaunchConfig, built_in

__all__ = ["MAX_BOOT", "main"]

MAX_BOOT = 1 << 20
"""Bytes of the boot line."""


def main(read_boot: Callable[[], Boot] | None = None) -> None:
    """Exit status 0 after an orderly stop, 1 when it could not serve. `read_boot`: for an enclave that gets its boot line
    otherwise than on standard input."""
    forbid_dumps()
    quiet_logs()
    try:
        boot = read_boot() if read_boot else parse_boot(sys.stdin.buffer.readline(MAX_BOOT))
        _keep_to_itself(boot)
        uvloop.run(_sealed(boot).serve(_on_stdin_closed) if boot.bundle_path else _Enclave(boot).serve())
    except CloisterError as error:
        _say("failed", error=type(error).__name__, message=error.message, hint=error.hint, step=error.step)
        raise SystemExit(1) from None


def _keep_to_itself(boot: Boot) -> None:
    """Whoever started this process let it inherit these, and uvloop closes nothing for those that it starts in turn."""
    for fd in (boot.listen_fd, boot.device_fd, boot.tls_fd):
        if fd is not None:
            with contextlib.suppress(OSError):  # one that is not open is told where it is used
                os.set_inheritable(fd, False)  # noqa: FBT003


def _say(event: str, **fields: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stdout.flush()


def _sources(config: EnclaveConfig, boot: Boot) -> tuple[EvidenceSource, GpuSource | None]:
    """The platform's driver, and the GPUs' where there are confidential ones. Raises: WrongUse on another platform."""
    if config.platform == "sim" and boot.device_fd is not None:
        return SimulatedTee(boot.device_fd), None
    machine = Machine()
    found = detect(machine)
    if found.platform != config.platform:
        raise WrongUse(
            f"This is not platform {config.platform!r}.",
            got=found.platform or "none that is known",
            hint="`cloister doctor` says what was looked for.",
        )
    return open_source(found, machine), machine.gpus if found.gpus else None


def _read_endorsements(path: str) -> bytes:
    """b"" where the host shipped none, or none that is well formed: clients then fetch their own."""
    if not path:
        return b""
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_LOG + 1)
        parse_endorsements(content)
    except (OSError, MalformedEvidence):
        return b""
    return content


def _sealed(boot: Boot) -> Life:
    """An app that its owner releases, from a bundle."""
    source, gpus = _sources(parse_config(boot.config), boot)
    return Life(boot, Surroundings(source, gpus, lambda: _read_endorsements(boot.endorsements_path), _say))


def _check_app(launch: LaunchConfig) -> None:
    """Without a bundle this is the built-in app, and never one that a policy pins by its bundle. Raises: NotTrusted."""
    own = built_in(launch.config_sha256)
    if launch.app != own:
        raise NotTrusted(
            "The launch config names an app that comes in a bundle, and there is none.",
            step="launch.app",
            expected=f"{own.kind} {own.sha256}",
            got=f"{launch.app.kind} {launch.app.sha256}",
            hint="Start the enclave with the bundle, or deploy the built-in app anew.",
        )


class _Enclave:
    """Joins the rooms; holds nothing that a room could hold itself."""

    def __init__(self, boot: Boot) -> None:
        self.boot = boot
        self.config = parse_config(boot.config)
        self.source, self.gpus = _sources(self.config, boot)
        self.launch: LaunchConfig = check_launch(boot.launch, boot.config, self.source)
        _check_app(self.launch)
        self.ring: KeyRing | None = None
        self.group = self._find_group()
        os.environ["CLOISTER_ENGINE_DIR"] = boot.engine_dir
        self.engine = self._make_engine()
        lower_priority()
        self.api = self._make_api()
        self.tls = TlsFront.open(self.api, self.config, boot, time.time())
        self.attestation: Attestation | None = None

    def _find_group(self) -> Group | None:
        """Of the replicas that share their keys, where the configuration names one."""
        if self.config.group_policy is None:
            return None
        endorsements = lambda: _read_endorsements(self.boot.endorsements_path)  # noqa: E731
        witness = Witness(self.source, self.boot.launch, self.gpus, endorsements)
        engine = engine_statement(self.boot.engine_dir)
        return Group(witness, self.config, engine, founds=self.boot.founds_group)

    def _make_engine(self) -> Engine:
        if self.config.upstream is None:
            return LlamaEngine(self._engine_config())
        folder = self.boot.tokenizer_path
        return UpstreamEngine(
            UpstreamConfig(
                parse_address(self.config.upstream),
                slots=self.config.slots,
                context=self.config.context_length or 0,
                tokenizer=Path(folder) if folder else None,
            )
        )

    def _engine_config(self) -> LlamaConfig:
        return LlamaConfig(
            model=Path(self.boot.model_path),
            name=self.boot.model_name,
            loop=LoopSettings(
                slots=self.config.slots, context=self.config.context_length or 0, kv_type=self.config.kv_type
            ),
            mode=self.config.engine,
            measured_files=self.config.platform == "sgx",
        )

    async def serve(self) -> None:
        front = server(self._front())
        with socket.socket(fileno=self.boot.listen_fd) as sock:
            if self.config.plaintext:
                demand_loopback(sock)
            serving = asyncio.create_task(front.serve(sockets=[sock]))
            _on_stdin_closed(lambda: setattr(front, "should_exit", True))
            loading = asyncio.create_task(self._load())
            try:
                await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
                if loading.done():
                    loading.result()
                await serving
            finally:
                front.should_exit = True
                loading.cancel()
                await asyncio.wait([loading])
                if self.tls is not None:
                    await self.tls.close()
                await self.engine.close()
                await asyncio.wait([serving], timeout=5)

    async def _load(self) -> None:
        telling = asyncio.create_task(self._tell_progress())
        try:
            await self.engine.start()
        finally:
            telling.cancel()
        info = self.engine.info
        if info.model.sha256 not in self.launch.models:
            raise NotTrusted(
                "The model file handed over is not one that the launch config names.",
                hint="Start the enclave again with the model it was launched for.",
                step="launch.models",
            )
        lineage, trouble = self._lineage(info.model.sha256)
        if self.ring is None and self.group is not None:
            self.ring = await self.group.enter(lambda: _say("joining"))
        self.attestation = Attestation(
            self.source,
            self._ring(),
            self.boot.launch,
            lambda: self.engine.info,
            self.config.insecure,
            gpus=self.gpus,
            lineage_sha256=lineage,
            endorsements=lambda: _read_endorsements(self.boot.endorsements_path),
            tls=self.tls.key if self.tls else None,
            group_policy_sha256=self.group.policy_sha256 if self.group else None,
        )
        if self.tls is not None:
            self.tls.start()
        collapse()
        _say("ready", **_describe(info), lineage_sha256=lineage, lineage_warning=trouble)

    def _lineage(self, model: str) -> tuple[str | None, str]:
        """Of a file that was loaded here: an upstream's has none that could be checked."""
        if self.config.upstream is not None:
            return None, ""
        return read_lineage_digest(Path(self.boot.model_path), model)

    async def _tell_progress(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(0.2)
                try:
                    self.engine.info  # noqa: B018
                except EngineLoading as loading:
                    _say("loading", progress=loading.progress)

    def _make_api(self) -> Api:
        keys = tuple(ApiKey(key.name, key.sha256) for key in self.boot.api_keys)
        return create_api(
            self.engine,
            ApiConfig(api_keys=keys, require_keys=self.config.api_keys, max_waiting=self.config.max_waiting),
        )

    def _front(self) -> Gateway | Entrance:
        return self._gateway(self._ring()) if self.group is None else Entrance(self.group, self._gateway)

    def _ring(self) -> KeyRing:
        """The group's, or one of this enclave's own, made when it is first needed."""
        if self.ring is None:
            self.ring = KeyRing(time.time(), ehbp=self.config.ehbp)
        return self.ring

    def _gateway(self, ring: KeyRing) -> Gateway:
        return Gateway(
            self.api,
            ring,
            self._document,
            ready=lambda: self.attestation is not None and self.engine.ready,
            padding=self.config.padding,
            receipt=lambda request: None if self.attestation is None else self.attestation.receipt(request),
            ehbp_paths=frozenset(route.path for route in ROUTES if route.method == "POST"),
            plaintext=self.config.plaintext,
        )

    async def _document(self, nonce: bytes) -> bytes:
        if self.attestation is None:
            raise EngineLoading("The model is being loaded.", hint="Try again in a moment.")
        return await self.attestation.document(nonce)


def _describe(info: EngineInfo) -> dict[str, Any]:
    model = info.model
    return {
        "model": model.name,
        "model_sha256": model.sha256,
        "quantization": model.quantization,
        "parameters": model.parameters,
        "context_length": model.context_length,
        "engine_sha256": info.sha256,
        "variant": info.variant,
        "slots": info.slots,
        "chats": model.has_chat_template,
    }


def _on_stdin_closed(stop: Callable[[], None]) -> None:
    """The host holds our standard input open; when the host is gone, so are we."""
    loop = asyncio.get_running_loop()

    def wait() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stop)

    threading.Thread(target=wait, name="stdin", daemon=True).start()
