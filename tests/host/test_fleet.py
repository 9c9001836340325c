import contextlib
import hashlib
import os
import resource
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.host.stage import (
    CONFIG,
    GIB,
    STRANGER,
    WITH_TLS,
    FakeBackend,
    Stage,
    asked,
    bundle_of,
    close_stage,
    eventually,
    launch_of,
    open_stage,
)

from cloister.errors import CloisterError, Conflict, HostFull, MalformedEvidence, NotFound, WrongUse
from cloister.evidence.launch import parse_launch
from cloister.host.appraisal import Seen
from cloister.host.fleet import Deployment, Fleet
from cloister.host.resources import Resources
from cloister.host.supervisor import Supervisor
from cloister.host.usage import Usage
from cloister.verify import Policy


def state_of(stage: Stage, name: str = "one") -> str:
    return str(stage.fleet.describe(name)["state"])


def ready(stage: Stage, name: str = "one") -> None:
    eventually(lambda: state_of(stage, name) == "ready")


def reopen(stage: Stage) -> Stage:
    """As after the daemon's end."""
    close_stage(stage)
    return open_stage(stage.folder, stage.backend, stage.time, stage.fleet._settings.ports)


def stored(stage: Stage, content: bytes) -> str:
    name = hashlib.sha256(content).hexdigest()
    if not stage.bundles.begin(name, len(content)).complete:
        with stage.bundles.appending(name, 0) as sink:
            sink.write(content)
        stage.bundles.finish(name)
    return name


def sealed(stage: Stage, name: str = "one", *, words: str = "words", release: int = 1, **more: object) -> Deployment:
    """An app whose bundle is on the host."""
    content, app = bundle_of(words)
    launch = launch_of(app=app, release=release)
    return asked(name, launch=launch, bundle=stored(stage, content), model=None, **more)


def ask(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        answer = b""
        while more := client.recv(4096):
            answer += more
        return answer


def test_what_is_deployed_runs_with_exactly_what_was_given(stage: Stage) -> None:
    wanted = sealed(stage)
    stage.fleet.deploy(wanted, "me")
    ready(stage)
    spawn = stage.backend.last.spawn
    assert (spawn.launch, spawn.config, spawn.model) == (wanted.launch, CONFIG, None)
    assert spawn.bundle is not None
    assert spawn.bundle.read_bytes() == bundle_of("words")[0]
    assert spawn.memory_bytes == GIB
    assert len(spawn.cores) == 1
    assert stage.fleet.describe("one")["deployed_by"] == "me"


def test_a_bundle_that_the_launch_config_does_not_name_is_refused_before_anything_starts(stage: Stage) -> None:
    content, app = bundle_of("words")
    good = launch_of(app=app)
    for launch, held, error in (
        (launch_of(), content, WrongUse),
        (good, content[:-1], WrongUse),
        (good, content + b"x", WrongUse),
        (good, bundle_of("other")[0], WrongUse),
        (good, b"no bundle", MalformedEvidence),
    ):
        with pytest.raises(error):
            stage.fleet.deploy(asked(launch=launch, bundle=stored(stage, held), model=None), "me")
    assert stage.store.apps() == []
    assert stage.backend.started == []


def test_its_port_leads_to_the_enclave_that_runs_and_answers_503_while_none_does(
    stage: Stage, backend: FakeBackend
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=echo, args=(server,), daemon=True).start()
        backend.port = server.getsockname()[1]
        app = stage.fleet.deploy(asked(), "me")
        ready(stage)
        assert ask(app["port"]) == b"GET / HTTP/1.1\r\n\r\n"
        stage.fleet.stop("one")
        assert ask(app["port"]).startswith(b"HTTP/1.1 503 ")


def test_a_tls_listener_has_a_stable_port_of_its_own(stage: Stage, backend: FakeBackend) -> None:
    wanted = replace(asked(launch=launch_of(config=WITH_TLS), config=WITH_TLS), replace=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=echo, args=(server,), daemon=True).start()
        backend.tls_port = server.getsockname()[1]
        app = stage.fleet.deploy(wanted, "me")
        ready(stage)
        port = stage.store.app("one").tls_port
        assert app["tls"] == [f"https://localhost:{port}", f"https://127.0.0.1:{port}"]
        assert backend.last.spawn.tls_origins == tuple(app["tls"])
        assert port is not None
        assert port != app["port"]
        assert ask(port) == b"GET / HTTP/1.1\r\n\r\n"
        assert stage.fleet.deploy(asked("two"), "me")["port"] not in (port, app["port"])
        assert stage.fleet.deploy(wanted, "me")["tls"] == app["tls"]
        stage.fleet.stop("one")
        with contextlib.suppress(ConnectionResetError):
            assert ask(port) == b""
    stage = reopen(stage)
    try:
        assert stage.fleet.describe("one")["tls"] == app["tls"]
        assert stage.fleet.deploy(asked(replace=True), "me")["tls"] == []
        with pytest.raises(ConnectionRefusedError):
            ask(port)
    finally:
        close_stage(stage)


def test_a_tls_port_that_somebody_took_is_that_apps_trouble(stage: Stage) -> None:
    stage.fleet.deploy(asked(launch=launch_of(config=WITH_TLS), config=WITH_TLS), "me")
    port = stage.store.app("one").tls_port
    close_stage(stage)
    with socket.create_server(("127.0.0.1", port or 0)):
        stage = open_stage(stage.folder, stage.backend, stage.time, stage.fleet._settings.ports)
        assert state_of(stage) == "failed"
    try:
        ready(stage)  # once it is free again
    finally:
        close_stage(stage)


def test_a_platform_without_tls_listeners_refuses_one_and_leaves_what_runs(stage: Stage, backend: FakeBackend) -> None:
    stage.fleet.deploy(asked(), "me")
    ready(stage)
    backend.offers_tls = False
    wanted = replace(asked(launch=launch_of(config=WITH_TLS), config=WITH_TLS), replace=True)
    with pytest.raises(WrongUse, match="TLS listener"):
        stage.fleet.deploy(wanted, "me")
    assert stage.store.app("one").config == CONFIG
    assert not backend.last.stopped.is_set()


def test_a_tls_listener_wants_a_name(tmp_path: Path, stage: Stage) -> None:
    nameless = open_stage(
        tmp_path / "nameless", FakeBackend(), [0.0], stage.fleet._settings.ports, "http://0.0.0.0:{port}"
    )
    try:
        with pytest.raises(WrongUse, match="no name") as caught:
            nameless.fleet.deploy(asked(launch=launch_of(config=WITH_TLS), config=WITH_TLS), "me")
        assert "--address" in str(caught.value.hint)
        assert nameless.store.apps() == []
    finally:
        close_stage(nameless)


def echo(server: socket.socket) -> None:
    """To everybody: the host itself asks for evidence, too."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(connection.recv(100))


def test_a_restarted_host_starts_what_shall_run_at_the_same_ports(stage: Stage) -> None:
    ports = {name: stage.fleet.deploy(asked(name), "me")["port"] for name in ("one", "two", "three")}
    stage.fleet.stop("two")
    stage = reopen(stage)
    try:
        ready(stage, "one")
        ready(stage, "three")
        assert state_of(stage, "two") == "stopped"
        assert {app["name"]: app["port"] for app in stage.fleet.all()} == ports
        assert len({*ports.values()}) == 3
    finally:
        close_stage(stage)


def test_one_whose_keys_were_released_waits_after_a_restart(stage: Stage, backend: FakeBackend) -> None:
    backend.script = lambda _: [{"event": "waiting"}]
    stage.fleet.deploy(asked(), "me")
    eventually(lambda: state_of(stage) == "waiting")
    backend.last.say(event="ready")
    ready(stage)
    backend.last.die()
    eventually(lambda: len(backend.started) == 2 and state_of(stage) == "waiting")
    assert "release" in stage.fleet.describe("one")["detail"]


def test_a_new_release_takes_the_old_ones_place_and_address(stage: Stage) -> None:
    old = sealed(stage, words="old")
    new = sealed(stage, words="new", release=2, replace=True)
    first = stage.fleet.deploy(old, "me")
    ready(stage)
    second = stage.fleet.deploy(new, "you")
    ready(stage)
    assert (second["port"], second["release"], second["deployed_by"]) == (first["port"], 2, "you")
    assert stage.backend.started[0].stopped.is_set()
    with pytest.raises(NotFound):
        stage.bundles.path(str(old.bundle))
    assert stage.bundles.path(str(new.bundle))


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        (asked(), Conflict),
        (asked(launch=launch_of(owner=STRANGER), replace=True), Conflict),
        (asked("../one"), WrongUse),
        (asked(".."), WrongUse),
        (asked("One"), WrongUse),
        (asked("one\n"), WrongUse),
        (asked("-one"), WrongUse),
        (asked("x" * 64), WrongUse),
        (asked(""), WrongUse),
        (asked("two", launch=b"{}"), MalformedEvidence),
        (asked("two", config=b'{"platform": "sim" }'), WrongUse),
        (asked("two", bundle="ab" * 32), WrongUse),
        (asked("two", bundle="ab" * 32, model=None), NotFound),
        (asked("two", bundle="../host.db", model=None), WrongUse),
        (asked("two", model=None), WrongUse),
        (asked("two", expires_at=1000.0), WrongUse),
        (asked("two", resources=Resources(4 * GIB, 1)), HostFull),
        (asked("two", resources=Resources(0, 1)), WrongUse),
        (asked("two", resources=Resources(GIB, 0)), WrongUse),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    stage: Stage, wanted: Deployment, error: type[CloisterError]
) -> None:
    stage.fleet.deploy(asked(), "me")
    ready(stage)
    before = stage.store.apps()
    with pytest.raises(error):
        stage.fleet.deploy(wanted, "you")
    assert stage.store.apps() == before
    assert len(stage.backend.started) == 1
    assert state_of(stage) == "ready"


def test_another_platform_is_refused(stage: Stage) -> None:
    stage.backend.platform = "tdx"
    with pytest.raises(WrongUse, match="another platform"):
        stage.fleet.deploy(asked(), "me")


def test_memory_of_a_stopped_app_is_free_until_it_shall_run_again(stage: Stage) -> None:
    stage.fleet.deploy(asked("one", resources=Resources(3 * GIB, 1)), "me")
    with pytest.raises(HostFull):
        stage.fleet.deploy(asked("two", resources=Resources(2 * GIB, 1)), "me")
    stage.fleet.stop("one")
    stage.fleet.deploy(asked("two", resources=Resources(2 * GIB, 1)), "me")
    with pytest.raises(HostFull):
        stage.fleet.restart("one")
    assert state_of(stage, "one") == "stopped"


def test_one_whose_time_was_over_starts_again_only_where_there_is_room(stage: Stage) -> None:
    stage.fleet.deploy(asked("one", resources=Resources(3 * GIB, 1), expires_at=2000.0), "me")
    ready(stage)
    stage.time[0] = 2000.0
    stage.fleet.deploy(asked("two", resources=Resources(2 * GIB, 1)), "me")
    with pytest.raises(HostFull):
        stage.fleet.expire("one", 3000.0)
    assert stage.fleet.describe("one")["expires_at"] == 2000.0
    assert state_of(stage) == "expired"
    assert stage.fleet.expire("one", 1.0)["expires_at"] == 1.0  # which starts nothing
    stage.fleet.stop("one")
    stage.fleet.expire("one", 3000.0)  # nor does this
    stage.fleet.expire("one", 1.0)
    stage.fleet.remove("two")
    with pytest.raises(Conflict):
        stage.fleet.restart("one")
    stage.fleet.expire("one", 3000.0)
    stage.fleet.restart("one")
    ready(stage)


def test_cores_are_spread(stage: Stage) -> None:
    for name in ("one", "two"):
        stage.fleet.deploy(asked(name), "me")
        ready(stage, name)
    assert {enclave.spawn.cores for enclave in stage.backend.started} == {(0,), (1,)}
    stage.fleet.deploy(asked("three", resources=Resources(GIB, 99)), "me")
    ready(stage, "three")
    assert stage.backend.last.spawn.cores == (0, 1)


def test_an_app_ends_when_its_time_is_over_and_starts_when_it_gets_more(stage: Stage) -> None:
    stage.fleet.deploy(asked(expires_at=2000.0), "me")
    ready(stage)
    stage.time[0] = 2000.0
    eventually(lambda: stage.backend.last.stopped.is_set())
    assert state_of(stage) == "expired"
    eventually(lambda: "expired" in [line.kind for line in stage.store.lines("one")])
    with pytest.raises(Conflict):
        stage.fleet.restart("one")
    stage.fleet.expire("one", 3000.0)
    ready(stage)
    stage.fleet.expire("one", 1.0)
    assert state_of(stage) == "expired"
    stage.fleet.expire("one", None)
    ready(stage)


def test_one_that_gets_more_time_while_it_is_about_to_be_stopped_goes_on(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.fleet.deploy(asked(expires_at=2000.0), "me")
    ready(stage)
    read = threading.Event()
    enforcing = threading.Thread(target=stage.fleet._enforce)

    def usage() -> dict[Supervisor, Usage]:
        """After what the store says was read, and before anything is done about it."""
        if threading.current_thread() is enforcing:
            read.set()
        return {}

    monkeypatch.setattr(stage.fleet, "_usage", usage)
    with stage.fleet._change:
        stage.time[0] = 2000.0
        enforcing.start()
        assert read.wait(60)
        stage.fleet.expire("one", 3000.0)
    enforcing.join()
    assert state_of(stage) == "ready"
    assert not stage.backend.last.stopped.is_set()


def test_a_time_that_ended_while_the_host_was_off_starts_nothing(stage: Stage) -> None:
    stage.fleet.deploy(asked(expires_at=2000.0), "me")
    ready(stage)
    stage.time[0] = 3000.0
    stage = reopen(stage)
    try:
        assert state_of(stage) == "expired"
        assert len(stage.backend.started) == 1
    finally:
        close_stage(stage)


def test_a_removed_app_leaves_nothing(stage: Stage) -> None:
    bundle = str(sealed(stage).bundle)
    stage.fleet.deploy(sealed(stage, "one"), "me")
    stage.fleet.deploy(sealed(stage, "two"), "me")
    port = stage.fleet.describe("one")["port"]
    stage.fleet.remove("one")
    assert stage.bundles.path(bundle)  # the other one's, too
    stage.fleet.remove("two")
    assert stage.backend.forgotten == ["one", "two"]
    for ask_for in (lambda: stage.fleet.describe("one"), lambda: stage.bundles.path(bundle)):
        with pytest.raises(NotFound):
            ask_for()
    assert all(enclave.stopped.is_set() for enclave in stage.backend.started)
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize("action", ["stop", "restart", "remove", "describe"])
def test_an_unknown_app_is_not_found(stage: Stage, action: str) -> None:
    do: Callable[[str], object] = getattr(stage.fleet, action)
    with pytest.raises(NotFound):
        do("nothing")


def test_a_port_that_somebody_took_is_one_apps_trouble_alone(stage: Stage, tmp_path: Path) -> None:
    ports = [stage.fleet.deploy(asked(name), "me")["port"] for name in ("one", "two")]
    close_stage(stage)
    with socket.create_server(("127.0.0.1", ports[0])):
        stage = open_stage(stage.folder, stage.backend, stage.time, stage.fleet._settings.ports)
        ready(stage, "two")
        assert state_of(stage, "one") == "failed"
        assert [enclave.spawn.name for enclave in stage.backend.started[2:]] == ["two"]
    ready(stage, "one")
    assert [line.kind for line in stage.store.lines("one")].count("failed") == 1
    close_stage(stage)


def test_it_takes_as_many_descriptors_as_its_apps_connections_need(stage: Stage) -> None:
    """What a shell or systemd gives at first is 1024: two apps' connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    try:
        close_stage(reopen(stage))
        wanted = 1 << 16 if before[1] == resource.RLIM_INFINITY else min(1 << 16, before[1])
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_two_hosts_do_not_share_a_state(stage: Stage) -> None:
    other = Fleet(stage.folder, stage.store, stage.bundles, stage.backend, stage.fleet._settings)
    with pytest.raises(WrongUse, match="Another host"):
        other.start()


def test_who_takes_more_memory_than_it_may_is_ended(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"bytes": GIB}
    monkeypatch.setattr(
        "cloister.host.fleet.usage_of", lambda groups: {group: Usage(taken["bytes"], 1.0) for group in groups}
    )
    stage.fleet.deploy(asked(), "me")
    ready(stage)
    stage.backend.last.pid = 1
    eventually(lambda: stage.store.samples("one"))
    assert not stage.backend.last.stopped.is_set()
    taken["bytes"] = GIB + 1
    eventually(lambda: len(stage.backend.started) == 2)
    assert any("memory" in line.text for line in stage.store.lines("one") if line.kind == "restarting")


def test_a_machine_that_uses_all_that_it_was_given_is_not_ended(
    stage: Stage, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no more than that; what QEMU takes beside it is shown."""
    monkeypatch.setattr("cloister.host.fleet.usage_of", lambda groups: {group: Usage(2 * GIB, 1.0) for group in groups})
    backend.bounds_memory = True
    stage.fleet.deploy(asked(), "me")
    ready(stage)
    backend.last.pid = 1
    eventually(lambda: stage.store.samples("one"))
    stage.fleet._enforce()
    assert stage.store.samples("one")[-1].memory_bytes == 2 * GIB
    assert not backend.last.stopped.is_set()
    backend.bounds_memory = False
    stage.fleet._enforce()
    eventually(lambda: len(backend.started) == 2)


def test_the_operators_own_look_takes_what_the_app_was_launched_with(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker and published words are the owner's affair: the host knows that it started them."""
    asked_with: list[Policy] = []

    def looked(_port: int, policy: Policy, **_: object) -> Seen:
        asked_with.append(policy)
        return Seen("trusted", 1.0)

    monkeypatch.setattr("cloister.host.fleet.look", looked)
    launch = replace(parse_launch(launch_of(logs="public")), broker_key=STRANGER)
    stage.fleet.deploy(asked(launch=launch.encode()), "me")
    eventually(lambda: asked_with)
    assert (asked_with[0].broker_key, asked_with[0].logs) == (STRANGER, "public")
    described = stage.fleet.describe("one")
    assert (described["logs"], described["broker_key"]) == ("public", STRANGER)


def test_what_was_seen_of_an_enclave_is_not_said_of_the_next_one(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is at its first start."""
    seen = iter(("refused", "trusted"))

    def looked(_port: int, _policy: Policy, **_: object) -> Seen:
        verdict: Any = next(seen)
        if verdict == "refused":
            stage.fleet.deploy(asked(launch=launch_of(release=2), replace=True), "me")
            ready(stage)
        return Seen(verdict, stage.time[0])

    monkeypatch.setattr("cloister.host.fleet.look", looked)
    stage.fleet.deploy(asked(), "me")
    eventually(lambda: stage.fleet.describe("one")["evidence"])
    described = stage.fleet.describe("one")
    assert (described["release"], described["starts"], described["evidence"]["verdict"]) == (2, 1, "trusted")


def test_an_enclave_that_ends_while_it_is_looked_at_is_no_error(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.fleet.deploy(asked(), "me")
    ready(stage)
    app, enclave = stage.store.app("one"), stage.backend.last
    enclave.pid = os.getpgrp()
    running: list[Any] = [enclave]

    class Vanishing:
        """An app whose supervisor is there once."""

        trouble = ""
        reads = 0

        @property
        def supervisor(self) -> Any:
            self.reads += 1
            return supervisor if self.reads == 1 else None

    supervisor = stage.fleet._live["one"].supervisor
    assert stage.fleet._status(app, Vanishing()).state == "ready"  # type: ignore[arg-type]
    only = threading.current_thread()

    def vanishing(_supervisor: Supervisor) -> Any:
        if threading.current_thread() is not only:
            return enclave
        return running.pop() if running else None

    monkeypatch.setattr(Supervisor, "running", property(vanishing))
    assert list(stage.fleet._usage()) == [supervisor]


def test_what_nobody_came_for_goes_while_the_host_runs(stage: Stage) -> None:
    used, unused = str(sealed(stage, words="used").bundle), str(sealed(stage, words="unused").bundle)
    stage.fleet.deploy(sealed(stage, words="used"), "me")
    other = hashlib.sha256(b"whole").hexdigest()
    stage.bundles.begin(other, 5)
    for path in (stage.folder / "bundles").iterdir():
        os.utime(path, (0, 0))
    with stage.bundles.appending(other, 0) as sink:
        stage.time[0] = 8 * 86400.0
        eventually(lambda: not (stage.folder / "bundles" / unused).exists())
        sink.write(b"whole")
    assert stage.bundles.finish(other).complete
    assert stage.bundles.path(used)
