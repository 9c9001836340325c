import io
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.deploy.efi import firmware, uki

from cloister.cli.vm_backend import VmBackend, VmSettings, guest_events, listens
from cloister.deploy.entries import Start, predict_entries
from cloister.enclave.boot import EnclaveConfig
from cloister.enclave.machine import parse_line
from cloister.errors import ConnectionFailed, MalformedImage, WrongUse
from cloister.evidence.launch import App, LaunchConfig
from cloister.host.backend import Spawn

CONFIG = EnclaveConfig(platform="vtpm", api_keys=False)
LAUNCH = LaunchConfig(
    owner_key="ed25519:" + "A" * 43,
    deployment="one",
    release=1,
    app=App("llm", "ab" * 32),
    models=("cd" * 32,),
    config_sha256=CONFIG.digest().hex(),
)

# Programs of the same names, that do as much as the backend sees of them.
QEMU = """#!/bin/bash
echo "$@" > "$(dirname "$0")/qemu.arguments"
for word in "$@"; do
  case "$word" in *id=boot,*) cat "${word##*file=}" > "$(dirname "$0")/qemu.boot";; esac
done
echo '[    0.000000] Linux version 6.12'
echo '{"event": "ready", "model": "tiny"}'
exec tail -f /dev/null
"""
SWTPM = """#!/bin/bash
words="${!#}"
touch "${words##*path=}"
exec tail -f /dev/null
"""
NOTHING = "#!/bin/bash\nexit 0\n"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name: str, text: str) -> None:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    put("qemu-system-x86_64", QEMU)
    put("swtpm", SWTPM)
    put("swtpm_setup", NOTHING)
    put("tpm2_createprimary", NOTHING)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return put


@pytest.fixture
def settings(tmp_path: Path, programs: object) -> VmSettings:
    kernel, ovmf = tmp_path / "cloister.efi", tmp_path / "OVMF.fd"
    kernel.write_bytes(uki())
    ovmf.write_bytes(firmware())
    return VmSettings(kernel=kernel, firmware=ovmf, tee="vtpm", accelerator="tcg", state=tmp_path / "state")


def backend_of(settings: VmSettings) -> VmBackend:
    """Its software TPMs are no TPMs, so their keys are made up."""
    return VmBackend(settings, enrol=lambda state: state.name * 2)


def spawn_of(config: EnclaveConfig = CONFIG, model: str = "tiny") -> Spawn:
    return Spawn(
        name="one",
        launch=LAUNCH.encode(),
        config=config.encode(),
        bundle=None,
        model=model,
        memory_bytes=1 << 30,
        cores=tuple(os.sched_getaffinity(0))[:1],
    )


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_machine_tells_its_events_and_ends_whole(settings: VmSettings, tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    running = backend_of(settings).start(spawn_of())
    (folder,) = tmp_path.glob("cloister-vm-*")
    assert next(iter(running.events())) == {"event": "ready", "model": "tiny"}
    said = (tmp_path / "bin/qemu.arguments").read_text()
    assert f"hostfwd=tcp:127.0.0.1:{running.port}-10.0.2.15:8484" in said
    assert f"-smp 1 -m 1024M -bios {settings.firmware} -kernel {settings.kernel}" in said
    assert f"path={folder}/tpm.sock" in said
    assert os.sched_getaffinity(0) == before
    running.stop()
    running.stop()
    assert running.pid is not None
    assert gone(running.pid)
    assert not folder.exists()


def test_the_guest_is_handed_the_exact_bytes_and_the_model(settings: VmSettings, tmp_path: Path) -> None:
    running = backend_of(settings).start(spawn_of())
    next(iter(running.events()))
    running.stop()
    line = parse_line((tmp_path / "bin/qemu.boot").read_bytes())
    assert (line.launch, line.config, line.data) == (LAUNCH.encode(), CONFIG.encode(), "model")
    said = (tmp_path / "bin/qemu.arguments").read_text()
    model = Path(said.partition("id=data,format=raw,readonly=on,file=")[2].split(" ")[0])
    assert line.data_bytes == model.stat().st_size


def test_a_tls_listener_is_named_and_has_a_port_of_its_own(settings: VmSettings, tmp_path: Path) -> None:
    known = ("https://chat.example.org:8501",)
    running = backend_of(settings).start(replace(spawn_of(replace(CONFIG, tls=True)), tls_origins=known))
    next(iter(running.events()))
    running.stop()
    line = parse_line((tmp_path / "bin/qemu.boot").read_bytes())
    assert (line.tls_port, line.tls_origins) == (8443, known)
    said = (tmp_path / "bin/qemu.arguments").read_text()
    assert f"hostfwd=tcp:127.0.0.1:{running.tls_port}-10.0.2.15:8443" in said
    assert running.tls_port != running.port


def test_a_bundle_is_handed_over_as_it_lies(settings: VmSettings, tmp_path: Path) -> None:
    bundle = tmp_path / "app.bundle"
    bundle.write_bytes(b"cloister-bundle\0" + bytes(500))
    running = backend_of(settings).start(replace(spawn_of(), bundle=bundle, model=None))
    next(iter(running.events()))
    running.stop()
    line = parse_line((tmp_path / "bin/qemu.boot").read_bytes())
    assert (line.data, line.data_bytes) == ("bundle", 516)
    assert f"file={bundle} " in (tmp_path / "bin/qemu.arguments").read_text()


@pytest.mark.parametrize("entry", ["10.0.2.2:6379", "10.0.2.2", "10.0.2.3:53", "10.0.2.255:80"])
def test_the_hosts_own_loopback_is_no_place_to_connect_to(settings: VmSettings, tmp_path: Path, entry: str) -> None:
    """QEMU's user network leads from there to it, whatever listens."""
    launch = replace(LAUNCH, egress=("api.example.org", entry))
    with pytest.raises(WrongUse, match="own") as caught:
        backend_of(settings).start(replace(spawn_of(), launch=launch.encode()))
    assert caught.value.step == "egress"
    assert not (tmp_path / "bin/qemu.arguments").exists()
    assert not (tmp_path / "state").exists()


def test_other_places_may_be_connected_to(settings: VmSettings, tmp_path: Path) -> None:
    launch = replace(LAUNCH, egress=("10.0.2.2.example.org", "10.0.20.2:6379", "10.0.3.2", "api.example.org:443"))
    running = backend_of(settings).start(replace(spawn_of(), launch=launch.encode()))
    next(iter(running.events()))
    running.stop()
    assert "restrict=off" in (tmp_path / "bin/qemu.arguments").read_text()


def test_a_machine_that_does_not_start_says_why(settings: VmSettings, programs: Callable[[str, str], None]) -> None:
    programs("qemu-system-x86_64", "#!/bin/sh\necho 'warning: old' >&2\necho 'qemu: no such\x1b[2J CPU.' >&2\nexit 1\n")
    running = backend_of(settings).start(spawn_of())
    (event,) = running.events()
    running.stop()
    assert (event["event"], event["error"]) == ("failed", "ConnectionFailed")
    assert event["message"] == "The virtual machine ended: qemu: no such [2J CPU."


def test_a_machine_that_was_killed_failed_and_one_that_was_stopped_did_not(
    settings: VmSettings, programs: Callable[[str, str], None]
) -> None:
    programs("qemu-system-x86_64", "#!/bin/sh\nkill -KILL $$\n")
    running = backend_of(settings).start(spawn_of())
    assert [event["event"] for event in running.events()] == ["failed"]
    running.stop()
    programs("qemu-system-x86_64", QEMU)
    running = backend_of(settings).start(spawn_of())
    events = running.events()
    next(events)
    running.stop()
    assert [*events] == []


def test_a_software_tpm_that_does_not_start_leaves_nothing(
    settings: VmSettings, programs: Callable[[str, str], None], tmp_path: Path
) -> None:
    for name in ("swtpm", "swtpm_setup"):
        programs(name, "#!/bin/sh\nexit 1\n")
        with pytest.raises(ConnectionFailed, match=r"TPM|swtpm"):
            backend_of(settings).start(spawn_of())
        assert not [*tmp_path.glob("cloister-vm-*")]
        assert name == "swtpm" or not [*settings.state.iterdir()]
        shutil.rmtree(settings.state)
        programs(name, SWTPM if name == "swtpm" else NOTHING)


def test_a_software_tpm_is_taken_for_whole_only_when_it_is(
    settings: VmSettings, programs: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it was made, the host leaves a half one, which it does not find again."""
    half = '#!/bin/bash\nfor word in "$@"; do [ -d "$word" ] && echo half > "$word/state"; done\nexit 1\n'
    programs("swtpm_setup", half)
    with monkeypatch.context() as patch:
        patch.setattr("cloister.cli.vm_backend.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(ConnectionFailed, match="swtpm_setup"):
            backend_of(settings).start(spawn_of())
    (left,) = settings.state.iterdir()
    assert (left / "state").exists()
    programs("swtpm_setup", half.replace("half >", "whole >").replace("exit 1", "exit 0"))
    backend_of(settings).start(spawn_of()).stop()
    (made,) = {*settings.state.iterdir()} - {left}
    assert (made / "state").read_text() == "whole\n"
    backend_of(settings).start(spawn_of()).stop()
    assert {*settings.state.iterdir()} == {left, made}


def test_of_two_that_make_an_apps_software_tpm_the_first_counts(
    settings: VmSettings, programs: Callable[[str, str], None]
) -> None:
    backend_of(settings).start(spawn_of()).stop()
    (made,) = settings.state.iterdir()
    made.rmdir()
    other = f"#!/bin/bash\nmkdir {made}\necho first > {made}/state\n"
    programs("swtpm_setup", other)
    backend_of(settings).start(spawn_of()).stop()
    assert [*settings.state.iterdir()] == [made]
    assert (made / "state").read_text() == "first\n"


def test_the_hosts_own_servers_and_files_are_not_for_apps(settings: VmSettings) -> None:
    backend = backend_of(settings)
    with pytest.raises(WrongUse, match="own servers"):
        backend.start(spawn_of(replace(CONFIG, upstream="http://127.0.0.1:8000")))
    for name in ("/etc/passwd", "../x.gguf", "~nobody/x"):
        with pytest.raises(WrongUse, match="own files are not for apps"):
            backend.start(spawn_of(model=name))


def test_the_operators_policy_pins_the_image(settings: VmSettings) -> None:
    policy = backend_of(settings).policy(LAUNCH)
    assert (policy.owner_key, policy.deployment, policy.platforms) == (LAUNCH.owner_key, "one", ("vtpm",))
    assert (policy.app, policy.config) == (LAUNCH.app.sha256, LAUNCH.config_sha256)
    expected = predict_entries(uki(), Start(platform="vtpm", started_by="qemu"))
    assert policy.measurements["vtpm"] == expected


def test_an_app_keeps_its_software_tpm_whose_key_the_operators_policy_pins(settings: VmSettings) -> None:
    backend = backend_of(settings)
    assert backend.policy(LAUNCH).limits.platform_ids is None
    for name in ("one", "two", "one"):
        backend.start(replace(spawn_of(), name=name)).stop()
    folders = {path.name for path in settings.state.iterdir()}
    assert len(folders) == 2
    assert backend.policy(LAUNCH).limits.platform_ids == frozenset(folder * 2 for folder in folders)
    backend.forget("one")
    (left,) = (path.name for path in settings.state.iterdir())
    assert backend.policy(LAUNCH).limits.platform_ids == frozenset({left * 2})
    backend.forget("never started")


def test_the_operators_policy_on_hardware(settings: VmSettings) -> None:
    tdx = VmBackend(replace(settings, tee="tdx", accelerator="kvm", mr_td="ab" * 48)).policy(LAUNCH)
    assert set(tdx.measurements["tdx"][0]) == {"mr_td", "rtmr1", "rtmr2"}
    snp = VmBackend(replace(settings, tee="sev-snp", accelerator="kvm")).policy(LAUNCH)
    assert set(snp.measurements["sev-snp"][0]) == {"measurement", "vcpus"}


def test_says_at_once_what_is_missing(settings: VmSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WrongUse, match="Which firmware"):
        VmBackend(replace(settings, tee="tdx", accelerator="kvm"))
    with pytest.raises(WrongUse, match="cannot be read"):
        VmBackend(replace(settings, kernel=tmp_path / "nothing"))
    settings.kernel.write_bytes(b"MZ")
    with pytest.raises(MalformedImage):
        backend_of(settings)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WrongUse, match="is not installed"):
        backend_of(settings)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("swtpm", "swtpm"),
        ("swtpm_setup", "swtpm-tools"),
        ("tpm2_createprimary", "tpm2-tools"),
    ],
)
def test_each_program_that_is_missing_is_named_with_its_package(
    settings: VmSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    (tmp_path / "bin/setpriv").symlink_to("/usr/bin/setpriv")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    settings.kernel.write_bytes(uki())
    backend_of(settings)
    (tmp_path / "bin" / name).unlink()
    with pytest.raises(WrongUse, match=f"{name} is not installed") as caught:
        backend_of(settings)
    assert f" {package}" in caught.value.hint
    if "tpm" in name:
        VmBackend(replace(settings, tee="sev-snp", accelerator="kvm"))


def test_its_memory_is_bounded_by_what_the_guest_was_given(settings: VmSettings, tmp_path: Path) -> None:
    assert backend_of(settings).bounds_memory
    running = backend_of(settings).start(replace(spawn_of(), memory_bytes=3 << 29))
    next(iter(running.events()))
    running.stop()
    assert "-m 1536M " in (tmp_path / "bin/qemu.arguments").read_text()


def test_whatever_else_a_guest_says_is_skipped() -> None:
    lines = b'[ 0.0] Linux\r\n{"event": "loading"}\r\n[]\n{"event"\n' + b"[" * 100_000 + b'\n{"event": "ready"}\n\xff'
    assert [event["event"] for event in guest_events(io.BytesIO(lines))] == ["loading", "ready"]
    assert [*guest_events(None)] == []


def test_a_socket_counts_once_somebody_listens_there(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert not listens(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        assert path.exists()
        assert not listens(path)
        server.listen()
        assert listens(path)
