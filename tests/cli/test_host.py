"""The operator's commands, and those of an app's life against a host whose enclaves are scripted."""

import hashlib
import json
import socket
import stat
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.host.conftest import Served, backend, served, stage
from tests.host.stage import STRANGER, FakeBackend, Stage, asked, bundle_of, eventually, launch_of
from typer.testing import Result

from cloister.cli import output
from cloister.cli.gramine_backend import GramineBackend
from cloister.cli.operator import HostClient, Login, Logins, normal
from cloister.cli.quantities import parse_moment, parse_size, show_size
from cloister.errors import CloisterError, Conflict, ConnectionFailed, HostFull, NotFound, Unauthorized, WrongUse
from cloister.evidence.launch import parse_launch

__all__ = ["backend", "served", "stage"]

Run = Callable[..., Result]


@pytest.fixture
def logged_in(run: Run, served: Served) -> Served:
    done = run("login", served.url, input=f"{served.token}\n")
    assert done.exit_code == 0, done.stderr
    return served


def deployed(served: Served, name: str = "one", **more: Any) -> None:
    served.stage.fleet.deploy(asked(name, **more), "me")
    eventually(lambda: served.stage.fleet.describe(name)["state"] == "ready")


def stored(stage: Stage, content: bytes) -> str:
    name = hashlib.sha256(content).hexdigest()
    stage.bundles.begin(name, len(content))
    with stage.bundles.appending(name, 0) as sink:
        sink.write(content)
    stage.bundles.finish(name)
    return name


# The operator


def test_a_token_is_shown_once_and_rests_as_a_digest(run: Run, tmp_path: Path) -> None:
    token = run("host", "token", "add", "me").stdout.strip()
    assert token.startswith("cloister-host-")
    kept = b"".join(path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file())
    assert kept
    assert token.encode() not in kept
    assert run("host", "token", "add", "me").exit_code == 2
    assert run("host", "token", "list").stdout.startswith("me  since ")
    assert [one["name"] for one in json.loads(run("host", "token", "list", "--json").stdout)] == ["me"]
    made = json.loads(run("host", "token", "add", "you", "--json").stdout)
    assert (made["name"], made["token"].startswith("cloister-host-")) == ("you", True)
    assert json.loads(run("host", "token", "remove", "you", "--json").stdout) == {"removed": "you"}
    assert run("host", "token", "remove", "me").exit_code == 0
    assert run("host", "token", "remove", "me").exit_code == 2
    assert json.loads(run("host", "token", "list", "--json").stdout) == []


@pytest.mark.parametrize(
    "options",
    [
        ["--backend", "magic"],
        ["--backend", "vm"],
        ["--backend", "vm", "--image", "x.efi"],
        ["--backend", "vm", "--listen", "0.0.0.0", "--image", "x.efi", "--firmware", "y.fd"],
        ["--cert", "x.pem"],
        ["--listen", "0.0.0.0"],
        ["--ports", "9-8"],
        ["--ports", "0-8"],
        ["--ports", "x"],
        ["--quota", "many"],
        ["--memory", "-1"],
        ["--address", "https://example.org"],
        ["--address", "ftp://{name}"],
        ["--address", "https://{other}.example.org"],
        ["--address", "https://{name.__class__}"],
        ["--address", "http://[{name}:{port}"],
    ],
    ids=" ".join,
)
def test_what_makes_no_host_is_refused(run: Run, options: list[str]) -> None:
    assert run("host", "--port", "0", *options).exit_code == 2


def test_a_backend_whose_hardware_is_not_there_says_what_it_takes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GramineBackend.__init__, "__kwdefaults__", {"root": Path("/nowhere")})
    done = run("host", "--port", "0", "--backend", "gramine")
    assert done.exit_code == 2
    assert "no SGX" in done.stderr
    assert "--backend process" in done.stderr


def test_tokens_never_travel_in_the_clear(run: Run) -> None:
    done = run("host", "--port", "0", "--backend", "gramine", "--listen", "0.0.0.0")
    assert done.exit_code == 2
    assert "--cert FILE" in done.stderr


# Logging in


def test_a_token_is_kept_for_its_user_alone(run: Run, logged_in: Served, tmp_path: Path) -> None:
    path = tmp_path / "config" / "cloister" / "hosts.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Logins().all() == {logged_in.url: Login(logged_in.token)}
    path.chmod(0o644)
    assert run("list").exit_code == 2
    path.chmod(0o600)
    assert json.loads(run("logout", "--json").stdout) == {"logged_out": [logged_in.url]}
    assert Logins().all() == {}
    assert run("list").exit_code == 2


@pytest.mark.parametrize("given", ["", "\n", "a b\n", "wrong\n", "caf\xe9\n"])
def test_a_token_that_opens_nothing_is_not_kept(run: Run, served: Served, given: str) -> None:
    done = run("login", served.url, input=given)
    assert done.exit_code == 2
    assert Logins().all() == {}


def test_a_token_never_stands_on_the_command_line(run: Run, served: Served) -> None:
    assert run("login", served.url, served.token).exit_code == 2
    assert run("login", served.url, "--token", served.token).exit_code == 2


def test_nobody_there_is_unreachable(run: Run, nowhere: str) -> None:
    assert run("login", nowhere, input="token\n").exit_code == 5


def test_the_last_host_is_meant_unless_another_is_named(run: Run, logged_in: Served, nowhere: str) -> None:
    deployed(logged_in)
    Logins().put(nowhere, Login("x"))
    assert run("list").exit_code == 5
    assert run("list", "--host", logged_in.url + "/").exit_code == 0
    Logins().put(logged_in.url, Login(logged_in.token))
    assert run("list").exit_code == 0
    assert run("list", "--host", "http://127.0.0.1:1").exit_code == 2


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host",
        "ftp://host",
        "http://example.org",
        "http://10.0.0.1:8700",
        "https://h/path",
        "https://h/?a=b",
        "https://u@h",
        "https://h#x",
        "http://127.0.0.1.example.org",
        "https://h:99999",
        "https://[::1",
        "https://h\n",
    ],
)
def test_an_address_that_is_none_or_in_the_clear_is_refused(url: str) -> None:
    with pytest.raises(WrongUse):
        normal(url)


@pytest.mark.parametrize(
    "url", ["https://example.org", "http://127.0.0.1:8700", "http://[::1]:8700", "http://localhost"]
)
def test_an_address_is_kept_as_it_is(url: str) -> None:
    assert normal(url) == normal(url + "/") == url


# An app's life


def test_list_and_status_say_what_there_is(run: Run, logged_in: Served) -> None:
    assert "no apps" in run("list").stderr
    deployed(logged_in, expires_at=2000.0)
    deployed(logged_in, "two")
    listed = run("list").stdout.splitlines()
    assert [line.split()[:2] for line in listed] == [["one", "ready"], ["two", "ready"]]
    assert [app["name"] for app in json.loads(run("list", "--json").stdout)] == ["one", "two"]
    shown = run("status", "one").stdout
    assert "ready" in shown
    assert "the operator's own word" in shown or "not looked at" in shown
    assert json.loads(run("status", "one", "--json").stdout)["expires_at"] == 2000.0
    assert json.loads(run("status", "--json").stdout)["platform"] == "sim"
    assert "platform sim" in run("status").stdout


def test_an_apps_life_by_its_commands(run: Run, logged_in: Served) -> None:
    deployed(logged_in)
    assert run("stop", "one").stdout.split()[:2] == ["one", "stopped"]
    assert run("restart", "one").stdout.split()[:2] == ["one", "ready"]
    assert json.loads(run("expire", "one", "--in", "never", "--json").stdout)["expires_at"] is None
    assert run("expire", "one", "--in", "2031-01-31").stdout.strip() == "one  ready  expires 2031-01-31 00:00 UTC"
    assert run("expire", "one", "--in", "soon").exit_code == 2
    assert run("remove", "one").exit_code == 2  # nobody can be asked
    assert json.loads(run("remove", "one", "--yes", "--json").stdout) == {"removed": "one"}
    for command in (["status"], ["stop"], ["restart"], ["logs"], ["remove", "--yes"], ["expire", "--in", "7d"]):
        assert run(*command, "one").exit_code == 2


def test_a_name_that_looks_like_a_path_is_a_name(run: Run, logged_in: Served) -> None:
    deployed(logged_in)
    for name in ("../one", "one/stop", "one?x", "%2e%2e", "..", "one%00"):
        assert run("stop", name).exit_code == 2
    assert logged_in.stage.fleet.describe("one")["state"] == "ready"


def test_an_app_that_waits_for_its_keys_says_so(run: Run, logged_in: Served, backend: FakeBackend) -> None:
    deployed(logged_in)
    backend.script = lambda _: [{"event": "waiting"}]
    done = run("restart", "one")
    assert done.exit_code == 5
    assert "waits for its owner" in done.stderr


@pytest.mark.parametrize("state", ["ready", "stopped"])
def test_a_sealed_app_whose_keys_are_elsewhere_is_not_stopped(run: Run, logged_in: Served, state: str) -> None:
    """On a second laptop, with a colleague's token, or under another spelling of the host's address."""
    content, app = bundle_of("words")
    deployed(logged_in, launch=launch_of(app=app), bundle=stored(logged_in.stage, content), model=None)
    if state == "stopped":
        run("stop", "one")
    done = run("restart", "one")
    assert (done.exit_code, "the machine that deployed it" in done.stderr) == (2, True)
    assert logged_in.url in done.stderr
    assert logged_in.stage.fleet.describe("one")["state"] == state
    assert len(logged_in.stage.backend.started) == 1


def test_a_sealed_app_that_names_a_broker_is_restarted_from_anywhere_and_waits_for_its_release(
    run: Run, logged_in: Served, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, app = bundle_of("words")
    launch = replace(parse_launch(launch_of(app=app)), broker_key=STRANGER)
    deployed(logged_in, launch=launch.encode(), bundle=stored(logged_in.stage, content), model=None)
    backend.script = lambda _: [{"event": "waiting"}]
    monkeypatch.setattr("cloister.cli.deploy._POLL", 0.0)
    note = output.note

    def noted(text: Any, *more: Any, **words: Any) -> None:
        note(text, *more, **words)
        if "its broker" in str(text):  # by now the command has seen that the app waits
            backend.last.say(event="ready")

    monkeypatch.setattr("cloister.cli.deploy.output.note", noted)
    done = run("restart", "one")
    assert (done.exit_code, done.stdout) == (0, "one  ready\n"), done.stderr
    assert done.stderr.count("its broker") == 1
    assert len(backend.started) == 2


def test_an_app_that_fails_says_why(run: Run, logged_in: Served, backend: FakeBackend) -> None:
    deployed(logged_in)
    backend.script = lambda _: [{"event": "failed", "error": "NotTrusted", "message": "Another \x1b[31mbundle."}]
    done = run("restart", "one")
    assert done.exit_code == 5
    assert "Another [31mbundle." in done.stderr
    assert "\x1b" not in done.stderr


def test_logs_are_shown_without_what_a_terminal_would_obey(run: Run, logged_in: Served) -> None:
    deployed(logged_in)
    logged_in.stage.store.log("one", 5.0, "app", "red\x1b[31m\u202e")
    lines = run("logs", "one").stdout.splitlines()
    assert [line.split()[2] for line in lines] == ["deployed", "starting", "ready", "app"]
    assert lines[-1].endswith("red[31m")
    as_json = [json.loads(line) for line in run("logs", "one", "--json").stdout.splitlines()]
    assert as_json[-1]["text"] == "red\x1b[31m\u202e"


def test_the_console_is_an_address_for_one_browser(run: Run, logged_in: Served) -> None:
    address = run("host", "console").stdout.strip()
    assert address.startswith(f"{logged_in.url}/console#")
    token = {"token": address.partition("#")[2]}
    assert logged_in.stranger.post("/console/session", json=token).status_code == 200
    assert logged_in.stranger.post("/console/session", json=token).status_code == 401


# The host's client


@pytest.fixture
def client(served: Served) -> HostClient:
    return HostClient(served.url, Login(served.token))


def bundle_file(tmp_path: Path, size: int = 3_000_000) -> tuple[Path, str]:
    path = tmp_path / "bundle"
    path.write_bytes(bytes(range(250)) * (size // 250))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_upload_goes_on_where_it_stopped(client: HostClient, served: Served, tmp_path: Path) -> None:
    path, sha256 = bundle_file(tmp_path)
    client.post("/v1/uploads", {"sha256": sha256, "size": path.stat().st_size})
    with served.stage.bundles.appending(sha256, 0) as sink:
        sink.write(path.read_bytes()[:1_000_000])
    seen: list[int] = []
    with client:
        client.upload(path, sha256, lambda done, _total: seen.append(done))
    assert seen[0] == 1_000_000
    assert seen[-1] == path.stat().st_size
    assert served.stage.bundles.path(sha256).read_bytes() == path.read_bytes()


def test_a_disk_that_fills_up_is_told_as_that(
    client: HostClient, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sha256 = bundle_file(tmp_path)
    monkeypatch.setattr(served.stage.bundles, "_free", lambda _: 1000)
    with client, pytest.raises(HostFull, match="disk has no room"):
        client.upload(path, sha256)


def test_an_upload_that_gets_no_further_ends(
    client: HostClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sha256 = bundle_file(tmp_path)
    asked = client._ask
    tries = []

    def cut(method: str, path: str, **sent: Any) -> dict[str, Any]:
        if method == "PATCH":
            tries.append(path)
            raise ConnectionFailed("cut")
        return asked(method, path, **sent)

    monkeypatch.setattr(client, "_ask", cut)
    with client, pytest.raises(ConnectionFailed, match="again and again"):
        client.upload(path, sha256, tries=3)
    assert len(tries) == 3


@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/apps/none", NotFound), ("/v1/uploads/x", WrongUse), ("/nothing", NotFound)]
)
def test_an_error_comes_back_as_what_it_was(client: HostClient, path: str, kind: type[CloisterError]) -> None:
    with client, pytest.raises(kind) as caught:
        client.get(path)
    assert type(caught.value) is kind


def test_a_wrong_token_is_unauthorized(served: Served) -> None:
    with HostClient(served.url, Login("wrong")) as client, pytest.raises(Unauthorized):
        client.get("/v1/apps")


def test_a_conflict_tells_both_sides(client: HostClient, served: Served, tmp_path: Path) -> None:
    client.post("/v1/uploads", {"sha256": "ab" * 32, "size": 5})
    with client, pytest.raises(Conflict) as caught:
        client.post("/v1/uploads", {"sha256": "ab" * 32, "size": 6})
    assert caught.value.expected == "5"


# Quantities


@pytest.mark.parametrize(
    ("text", "count"),
    [("1024", 1024), ("1K", 1024), ("1.5GiB", 3 << 29), ("20 GB", 20 << 30), ("0B", 0), ("2TiB", 2 << 40)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "1 PB", "1GiBs", "0x10", "１"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(WrongUse):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(5, "5 B"), (1536, "1.5 KiB"), (150 << 20, "150 MiB"), (2 << 30, "2.0 GiB"), (3 << 40, "3.0 TiB")],
)
def test_sizes_are_shown(count: int, text: str) -> None:
    assert show_size(count) == text


def test_times_are_read() -> None:
    assert parse_moment("90m", 1000.0) == 1000.0 + 5400
    assert parse_moment("7d", 0.0) == 7 * 86400
    assert parse_moment("never", 0.0) is None
    assert parse_moment("2027-01-31") == 1801353600.0
    assert parse_moment("2027-01-31T01:00+01:00") == 1801353600.0


def breaks_off_first(sock: socket.socket, asked: list[bytes]) -> None:
    """Resets the connection of the first request, and answers the next."""
    for answer in (b"", b'HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n{"it": "is"}'):
        try:
            connection, _ = sock.accept()
        except OSError:  # the test is over, and nobody asked again
            return
        with connection:
            asked.append(connection.recv(1 << 16))
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0) if not answer else bytes(8)
            )
            connection.sendall(answer)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_changes_nothing_is_asked_again_when_the_connection_breaks(method: str) -> None:
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as sock:
        threading.Thread(target=breaks_off_first, args=(sock, asked), daemon=True).start()
        with HostClient(f"http://127.0.0.1:{sock.getsockname()[1]}", Login("token")) as client:
            if method == "GET":
                assert client.get("/v1/host") == {"it": "is"}
            else:
                with pytest.raises(ConnectionFailed):
                    client.post("/v1/apps/one/restart")
    assert [request.split(b" ")[0].decode() for request in asked] == [method] * (2 if method == "GET" else 1)
