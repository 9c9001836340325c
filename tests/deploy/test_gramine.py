"""The manifest: what stands in it, what Gramine would take, what would be weak."""

import hashlib
import tomllib
from dataclasses import replace
from typing import Any

import pytest

from cloister.deploy import gramine
from cloister.deploy.gramine import Enclave, Gramine, Memory, most_threads, power_of_two, refuse_weak, render
from cloister.deploy.gramine_syntax import check_manifest, parse_manifest
from cloister.enclave.attest.gramine import LAUNCH_PATH
from cloister.errors import NotTrusted, WrongUse
from cloister.evidence.launch import App, LaunchConfig

LAUNCH = LaunchConfig(
    owner_key="ed25519:" + "A" * 43,
    deployment="one",
    release=1,
    app=App("llm", "ab" * 32),
    models=("cd" * 32,),
    config_sha256="ef" * 32,
)
GRAMINE = Gramine("/usr/lib/gramine/libsysdb.so", "/usr/lib/gramine/runtime/glibc")
ENCLAVE = Enclave(
    launch=LAUNCH.encode(),
    files={"/python/bin/python3": "11" * 32, "/app/cloister/__init__.py": "22" * 32, "/model.gguf": "cd" * 32},
    gramine=GRAMINE,
    memory=Memory(size=2 << 30),
    threads=most_threads(3),
)

GOLDEN = f"""\
loader.entrypoint.uri = "file:/usr/lib/gramine/libsysdb.so"
loader.argv = ["/python/bin/python3", "-I", "-S", "-B", "-c", "import sys; sys.path += ['/app', '/app/packages']; \
sys.pycache_prefix = '/dev/null'; import runpy; runpy.run_module('cloister.enclave.sgx', run_name='__main__')"]
loader.log_level = "error"
loader.env.LC_ALL = "C.UTF-8"
loader.env.LD_LIBRARY_PATH = "/lib:/app/lib"
loader.env.MALLOC_ARENA_MAX = "1"
libos.entrypoint = "/python/bin/python3"
fs.root = {{ type = "chroot", uri = "file:root" }}
fs.mounts = [
  {{ type = "chroot", path = "/lib", uri = "file:/usr/lib/gramine/runtime/glibc" }},
  {{ type = "tmpfs", path = "/tmp" }},
]
sys.stack.size = "2M"
sys.disallow_subprocesses = true
sgx.debug = false
sgx.remote_attestation = "dcap"
sgx.edmm_enable = false
sgx.enclave_size = "2048M"
sgx.preheat_enclave = false
sgx.max_threads = 109
sgx.cpu_features.avx = "required"
sgx.cpu_features.avx512 = "unspecified"
sgx.cpu_features.amx = "unspecified"
sgx.file_check_policy = "strict"
sgx.trusted_files = [
  "file:/usr/lib/gramine/runtime/glibc/",
  {{ uri = "file:root/app/cloister/__init__.py", sha256 = "{"22" * 32}" }},
  {{ uri = "file:root/launch.json", sha256 = "{hashlib.sha256(LAUNCH.encode()).hexdigest()}" }},
  {{ uri = "file:root/model.gguf", sha256 = "{"cd" * 32}" }},
  {{ uri = "file:root/python/bin/python3", sha256 = "{"11" * 32}" }},
]
"""


def test_the_manifest_is_this_to_the_byte() -> None:
    assert render(ENCLAVE) == GOLDEN


def test_the_same_files_in_another_order_are_the_same_enclave() -> None:
    turned = dict(reversed(list(ENCLAVE.files.items())))
    assert render(replace(ENCLAVE, files=turned)) == GOLDEN


def test_another_owner_app_or_model_is_another_enclave() -> None:
    changes: list[dict[str, Any]] = [
        {"owner_key": "ed25519:" + "B" * 42 + "A"},
        {"app": App("llm", "ac" * 32)},
        {"deployment": "two"},
        {"release": 2},
    ]
    manifests = {render(replace(ENCLAVE, launch=replace(LAUNCH, **change).encode())) for change in changes}
    assert len({GOLDEN, *manifests}) == len(changes) + 1
    files = {**ENCLAVE.files, "/model.gguf": "ce" * 32}
    assert render(replace(ENCLAVE, files=files)) not in {GOLDEN, *manifests}


def test_the_launch_config_lies_where_the_enclave_reads_it() -> None:
    assert gramine.LAUNCH == LAUNCH_PATH


def test_edmm_says_how_much_at_most() -> None:
    manifest = tomllib.loads(render(replace(ENCLAVE, memory=Memory(size=4 << 30, edmm=True))))
    assert (manifest["sgx"]["edmm_enable"], manifest["sgx"]["enclave_size"]) == (True, "4096M")


@pytest.mark.parametrize(
    "enclave",
    [
        replace(ENCLAVE, memory=Memory(size=3 << 30)),
        replace(ENCLAVE, memory=Memory(size=1 << 20)),
        replace(ENCLAVE, memory=Memory(size=2 << 30, edmm=True, preheat=True)),
        replace(ENCLAVE, files={"/a": "AB" * 32}),
        replace(ENCLAVE, files={"/a": "ab"}),
        replace(ENCLAVE, files={"/a\0": "ab" * 32}),
        replace(ENCLAVE, cpu=gramine.CpuFeatures(avx="maybe")),  # type: ignore[arg-type]
        replace(ENCLAVE, threads=-1),
    ],
)
def test_an_enclave_that_no_manifest_can_say_is_refused(enclave: Enclave) -> None:
    with pytest.raises(WrongUse):
        render(enclave)


@pytest.mark.parametrize(
    ("size", "most"), [(1, 1 << 30), (1 << 30, 1 << 30), ((1 << 30) + 1, 2 << 30), (5 << 30, 8 << 30)]
)
def test_an_enclaves_size_is_a_power_of_two(size: int, most: int) -> None:
    assert power_of_two(size) == most


def test_a_model_of_many_tensors_needs_more_threads_while_it_is_loaded() -> None:
    assert most_threads(0) == most_threads(67) == 109
    assert most_threads(1000) > 1000


# Weak enclaves


def changed(path: str, value: Any) -> dict[str, Any]:
    """The manifest with one setting otherwise."""
    manifest = table = tomllib.loads(GOLDEN)
    *folders, name = path.split(".")
    for folder in folders:
        table = table.setdefault(folder, {})
    table[name] = value
    return manifest


WEAK: list[tuple[str, str, Any]] = [
    ("insecure__use_cmdline_argv", "loader.insecure__use_cmdline_argv", False),
    ("insecure__use_host_env", "loader.insecure__use_host_env", True),
    ("insecure__keys", "fs.insecure__keys", {"default": "00" * 16}),
    ("insecure__rpc_thread_num", "sgx.insecure__rpc_thread_num", 2),
    ("debug__mock_syscalls", "sys.debug__mock_syscalls", [{"name": "getpid"}]),
    ("sgx.debug", "sgx.debug", True),
    ("remote_attestation", "sgx.remote_attestation", "none"),
    ("remote_attestation", "sgx.remote_attestation", "epid"),
    ("file_check_policy", "sgx.file_check_policy", "allow_all_but_log"),
    ("allowed_files", "sgx.allowed_files", ["file:root/tmp/"]),
    ("enable_stats", "sgx.enable_stats", True),
    ("profile", "sgx.profile", {"enable": "main"}),
    ("argv is not fixed", "loader.argv", []),
    ("isolated", "loader.argv", [one for one in gramine.ARGV if one != "-I"]),
    ("isolated", "loader.argv", [*gramine.ARGV[:1], *gramine.ARGV[2:], "-I"]),
    ("isolated", "loader.argv", [*gramine.ARGV[:-1], "import this"]),
    ("argv_src_file", "loader.argv_src_file", "file:argv"),
    ("env_src_file", "loader.env_src_file", "file:env"),
    ("log", "loader.log_level", "trace"),
    ("log", "loader.log_file", "/tmp/log"),
    ("loader.env.LD_PRELOAD", "loader.env.LD_PRELOAD", {"passthrough": True}),
    ("encrypted", "fs.mounts", [{"type": "encrypted", "path": "/x", "uri": "file:x"}]),
    ("untrusted_shm", "fs.root", {"type": "untrusted_shm", "uri": "dev:/dev/shm"}),
    ("device", "fs.root", {"uri": "dev:/dev/shm"}),
    ("device", "fs.mounts", [{"path": "/tmp", "uri": "dev:/dev/nvme0"}]),
    ("lies over /app", "fs.mounts", [{"type": "tmpfs", "path": "/app"}]),
    ("lies over /", "fs.mounts", [{"type": "tmpfs", "path": "/"}]),
    ("lies over /tmp/../app", "fs.mounts", [{"path": "/tmp/../app", "uri": "file:x"}]),
    ("sys.enable_extra_runtime_domain_names_conf", "sys.enable_extra_runtime_domain_names_conf", True),
    ("sys.enable_sigterm_injection", "sys.enable_sigterm_injection", True),
    ("check_invalid_pointers", "libos.check_invalid_pointers", False),
    ("devices", "sys.allowed_ioctls", [{"request_code": 1}]),
    ("processes", "sys.disallow_subprocesses", False),
    ("launch config", "sgx.trusted_files", []),
    ("launch config", "sgx.trusted_files", ["file:root/launch.json"]),
]


def toml(manifest: dict[str, Any]) -> str:
    """Enough of a writer for these tests: inline tables all the way down."""

    def text(value: Any) -> str:
        match value:
            case dict():
                return "{" + ", ".join(f'"{name}" = {text(one)}' for name, one in value.items()) + "}"
            case list():
                return "[" + ", ".join(map(text, value)) + "]"
            case bool():
                return "true" if value else "false"
            case int():
                return str(value)
        return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'

    return "".join(f"{name} = {text(table)}\n" for name, table in manifest.items())


def test_what_is_not_weak_passes() -> None:
    refuse_weak(toml(tomllib.loads(GOLDEN)), LAUNCH.encode())


@pytest.mark.parametrize(("word", "path", "value"), WEAK, ids=[f"{at}-{one[0]}" for at, one in enumerate(WEAK)])
def test_each_weakness_has_its_name(word: str, path: str, value: Any) -> None:
    manifest = changed(path, value)
    if path in ("loader.argv_src_file", "loader.insecure__use_cmdline_argv"):  # one of the three, says Gramine
        del manifest["loader"]["argv"]
    with pytest.raises(NotTrusted) as caught:
        refuse_weak(toml(manifest), LAUNCH.encode())
    assert word in caught.value.message


@pytest.mark.parametrize("text", ["", "loader = 1", 'fs.mounts = "x"', "sgx = []", GOLDEN + 'sgx.new = "thing"\n'])
def test_what_is_no_manifest_is_not_judged(text: str) -> None:
    with pytest.raises(WrongUse):
        refuse_weak(text, LAUNCH.encode())


def test_another_launch_config_is_not_this_deployments() -> None:
    with pytest.raises(NotTrusted, match="launch config"):
        refuse_weak(GOLDEN, replace(LAUNCH, release=2).encode())


# Gramine's syntax


MISFORMED: list[tuple[str, str, Any]] = [
    ("loader.entrypoint", "loader.entrypoint", "file:/libsysdb.so"),  # as before 1.8
    ("loader.entrypoint.uri is missing", "loader.entrypoint", {}),
    ("loader.argv", "loader.argv", "python3"),
    ("loader.argv[1]", "loader.argv", ["python3", 1]),
    ("argv_src_file", "loader.argv_src_file", "file:argv"),
    ("loader.env.A", "loader.env.A", {"passthrough": False}),
    ("loader.log_level", "loader.log_level", "info"),
    ("loader.uid", "loader.uid", True),
    ("loader.uid", "loader.uid", -1),
    ("libos.entrypoint is missing", "libos", {}),
    ("fs.mounts is missing", "fs", {"root": {"uri": "file:root"}}),
    ("fs.mounts[0]", "fs.mounts", [{"path": "/lib"}]),
    ("fs.mounts[0]", "fs.mounts", [{"type": "tmpfs", "path": "tmp"}]),
    ("fs.mounts[0]", "fs.mounts", [{"type": "nfs", "path": "/x", "uri": "file:x"}]),
    ("sgx.enclave_size", "sgx.enclave_size", "2T"),
    ("sgx.enclave_size", "sgx.enclave_size", 1 << 30),
    ("sgx.max_threads", "sgx.max_threads", "4"),
    ("sgx.require_avx is unknown", "sgx.require_avx", True),  # as before 1.6
    ("sgx.cpu_features.mpx", "sgx.cpu_features.mpx", "unspecified"),
    ("sgx.cpu_features.avx", "sgx.cpu_features.avx", True),
    ("sgx.trusted_files[0]", "sgx.trusted_files", [{"uri": "file:x", "sha256": "AB" * 32}]),
    ("sgx.trusted_files[0]", "sgx.trusted_files", ["/etc/passwd"]),
    ("sgx.preheat_enclave", "sgx", {"edmm_enable": True, "preheat_enclave": True}),
    ("sgx is no table", "sgx", 1),
    ("sys.stack.size", "sys.stack.size", "-1"),
    ("nonsense is unknown", "nonsense", 1),
]


@pytest.mark.parametrize(("word", "path", "value"), MISFORMED, ids=[f"{at}-{m[0]}" for at, m in enumerate(MISFORMED)])
def test_what_gramine_would_not_take_is_named(word: str, path: str, value: Any) -> None:
    check_manifest(tomllib.loads(GOLDEN))
    with pytest.raises(WrongUse) as caught:
        check_manifest(changed(path, value))
    assert word in caught.value.message


def test_everything_that_is_wrong_is_told_together() -> None:
    manifest = tomllib.loads(GOLDEN)
    manifest["sgx"].update(debug="no", max_threads="many")
    with pytest.raises(WrongUse) as caught:
        check_manifest(manifest)
    assert "sgx.debug" in caught.value.message
    assert "sgx.max_threads" in caught.value.message


@pytest.mark.parametrize("text", ["x", "a = 1\na = 2", "= 1", "a = [" * 2000])
def test_what_is_no_toml_is_refused(text: str) -> None:
    with pytest.raises(WrongUse, match="not TOML"):
        parse_manifest(text)
