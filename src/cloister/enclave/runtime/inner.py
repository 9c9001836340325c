"""What serves behind the gateway once the bundle is open: the built-in language model with its weights, or a Python app."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from cloister.channel.release import Release
from cloister.enclave.attestation import Runs
from cloister.enclave.boot import EnclaveConfig
from cloister.enclave.llm.api import ROUTES, Api, ApiConfig, create_api
from cloister.enclave.llm.engine import EngineInfo
from cloister.enclave.llm.llama import LlamaConfig, LlamaEngine, LoopSettings
from cloister.enclave.llm.tenants import ApiKey
from cloister.enclave.pyapp.app import AppConfig, PythonApp
from cloister.enclave.pyapp.words import Tell
from cloister.enclave.runtime.opening import SealedBundle
from cloister.errors import EngineDied, EngineLoading, WrongUse
from cloister.evidence.bundle import Manifest
from cloister.evidence.statement import EngineStatement, ModelStatement

__all__ = ["Inner", "LanguageModel", "Python", "wait_healthy"]

Progress = Callable[[float], None]
_HEALTH_SECONDS = 60.0
_HEALTH_PAUSE = 0.1


class Inner(Protocol):
    """An ASGI app with a life. `runs` is for the statement. `paths`: of which EHBP may take a POST."""

    paths: frozenset[str]

    @property
    def ready(self) -> bool: ...
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...
    async def start(self, release: Release, on_progress: Progress) -> None: ...
    async def close(self) -> None: ...
    def runs(self) -> EngineInfo | Runs: ...
    def describe(self) -> dict[str, Any]:
        """For the host's event `ready`: nothing that is not in the statement too."""


class LanguageModel:
    """The built-in app, its model read from the bundle's memory. Make one before the priority of this thread is lowered."""

    def __init__(self, config: EnclaveConfig, bundle: SealedBundle) -> None:
        manifest = bundle.head.manifest
        section = manifest.section("model")
        if section is None or config.upstream is not None:
            raise WrongUse("A sealed language model needs our own engine and a model.")
        self.paths = frozenset(route.path for route in ROUTES if route.method == "POST")
        self._config = config
        self._api: Api | None = None
        self._engine = LlamaEngine(
            LlamaConfig(
                model=Path(f"/proc/self/fd/{bundle.files['model']}"),
                name=manifest.model,
                sha256=section.sha256,
                loop=LoopSettings(slots=config.slots, context=config.context_length or 0, kv_type=config.kv_type),
                mode=config.engine,
            )
        )

    @property
    def ready(self) -> bool:
        return self._engine.ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._api is None:
            raise EngineLoading("The model is being loaded.")
        await self._api(scope, receive, send)

    async def start(self, release: Release, on_progress: Progress) -> None:
        keys = tuple(ApiKey(key.name, key.sha256) for key in release.api_keys)
        self._api = create_api(
            self._engine,
            ApiConfig(api_keys=keys, require_keys=self._config.api_keys, max_waiting=self._config.max_waiting),
        )
        telling = asyncio.create_task(self._tell(on_progress))
        try:
            await self._engine.start()
        finally:
            telling.cancel()

    async def _tell(self, on_progress: Progress) -> None:
        while True:
            await asyncio.sleep(0.2)
            try:
                self._engine.info  # noqa: B018
            except EngineLoading as loading:
                on_progress(loading.progress)

    async def close(self) -> None:
        await self._engine.close()

    def runs(self) -> EngineInfo:
        return self._engine.info

    def describe(self) -> dict[str, Any]:
        info = self._engine.info
        return {
            "model": info.model.name,
            "model_sha256": info.model.sha256,
            "quantization": info.model.quantization,
            "context_length": info.model.context_length,
            "engine_sha256": info.sha256,
            "variant": info.variant,
            "slots": info.slots,
        }


class Python:
    """An ASGI or WSGI app in its own process. `engine`: what lies here of ours, for the statement; it is not loaded. `tell`:
    where the app's own words go, None for nowhere."""

    paths: frozenset[str] = frozenset()

    def __init__(self, bundle: SealedBundle, engine: EngineStatement, *, confined: bool, tell: Tell | None) -> None:
        self._bundle = bundle
        self._manifest: Manifest = bundle.head.manifest
        self._engine = engine
        self._confined = confined
        self._tell = tell
        self._app: PythonApp | None = None

    @property
    def ready(self) -> bool:
        return self._app is not None and self._app.ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None:
            raise EngineLoading("The app is being started.")
        await self._app(scope, receive, send)

    async def start(self, release: Release, on_progress: Progress) -> None:
        manifest = self._manifest
        if manifest.kind == "llm":
            raise WrongUse("This is no Python app.")
        config = AppConfig(
            kind=manifest.kind,
            entry=manifest.entry,
            files=dict(self._bundle.files),
            confined=self._confined,
            model=manifest.model,
            egress=manifest.egress,
            memory=manifest.resources.memory,
            cores=manifest.resources.cores,
            secrets=release.secrets,
            settings=release.settings,
        )
        self._app = PythonApp(config, self._tell)
        await self._app.start()
        if manifest.health:
            await wait_healthy(self, manifest.health)

    async def close(self) -> None:
        if self._app is not None:
            await self._app.close()

    def runs(self) -> Runs:
        models = tuple(
            ModelStatement(self._manifest.model, section.sha256, "unknown")
            for section in self._manifest.sections
            if section.name == "model"
        )
        return Runs(self._engine, models)

    def describe(self) -> dict[str, Any]:
        return {"app": self._manifest.name, "kind": self._manifest.kind, "confined": self._confined}


async def wait_healthy(app: Inner, path: str, seconds: float = _HEALTH_SECONDS) -> None:
    """Until a GET of `path` is answered with 2xx. Raises: EngineDied when it never is: another start may go better."""
    status = 0
    try:
        async with asyncio.timeout(seconds):
            while not 200 <= (status := await _status(app, path)) < 300:  # noqa: ASYNC110 (somebody else's app)
                await asyncio.sleep(_HEALTH_PAUSE)
    except TimeoutError:
        got = f"status {status}" if status else "no answer"
        hint = "Try it with `cloister test`."
        raise EngineDied(
            "The app does not become healthy.", step="health", expected="2xx", got=got, hint=hint
        ) from None


async def _status(app: Inner, path: str) -> int:
    """0 for an answer that never came."""
    raw_path, _, query = path.partition("?")
    scope: dict[str, Any] = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "https",
        "path": raw_path,
        "raw_path": raw_path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"enclave.invalid")],
        "server": ("enclave.invalid", 443),
    }
    asked = False
    found = 0

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal found
        if message["type"] == "http.response.start":
            found = message["status"]

    try:
        await app(scope, receive, send)
    except Exception:  # noqa: BLE001 (an app that is not healthy yet)
        return 0
    return found
