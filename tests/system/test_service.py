"""`cloister connect --print-service`, as systemd reads it."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from tests.cli import conftest as scripted
from tests.cli.conftest import Enclave
from tests.system.shell import Shell, tool

pytestmark = pytest.mark.system

start_enclave = scripted.start_enclave

MOST_EXPOSED = 65
"""Of 100, by systemd's own count of a system service; one without any of it has 96. A user's has no privileges anyway."""

GIVEN_UP = (
    "NoNewPrivileges",
    "LockPersonality",
    "MemoryDenyWriteExecute",
    "RestrictNamespaces_user",
    "RestrictSUIDSGID",
    "SystemCallArchitectures",
    "SystemCallFilter_privileged",
    "SystemCallFilter_mount",
    "SystemCallFilter_debug",
)


@pytest.fixture
def unit(shell: Shell, tmp_path: Path) -> Path:
    url = "https://chat.example/#owner=ed25519:" + "A" * 43 + "&deployment=100%-acme"
    ran = shell.run(f"cloister connect '{url}' second=https://b.example --port 8501 --print-service")
    assert ran.returncode == 0, ran.stderr
    file = tmp_path / "cloister.service"
    file.write_text(ran.stdout)
    return file


def analyze(*words: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)}
    command = [tool("systemd-analyze"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_systemd_finds_no_fault_in_it(unit: Path) -> None:
    ran = analyze("--user", "verify", str(unit), folder=unit.parent)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("LimitCORE=0", "LimitCORES=0"))
    assert "LimitCORES" in analyze("--user", "verify", str(unit), folder=unit.parent).stderr


def test_it_gives_up_what_it_does_not_need(unit: Path) -> None:
    words = ("security", "--offline=true", f"--threshold={MOST_EXPOSED}")
    ran = analyze(*words, "--json=short", str(unit), folder=unit.parent)
    assert ran.returncode == 0, ran.stderr
    rows = {row["json_field"]: row["set"] for row in json.loads(ran.stdout)}
    assert [name for name in GIVEN_UP if not rows.get(name)] == []
    bare = unit.with_name("bare.service")
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    assert analyze(*words, str(bare), folder=unit.parent).returncode != 0


CONFINE = """
import ctypes, errno, os, sys
libc, seccomp = ctypes.CDLL(None, use_errno=True), ctypes.CDLL("libseccomp.so.2")
NO_NEW_PRIVS, SET_MDWE, ERRNO, ALLOW = 38, 65, 0x00050000, 0x7fff0000
allowed, command = sys.argv[1].split(","), sys.argv[2:]
assert libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0
assert libc.prctl(SET_MDWE, 1, 0, 0, 0) == 0, "a kernel from before 6.3"
seccomp.seccomp_init.restype = ctypes.c_void_p
rules = ctypes.c_void_p(seccomp.seccomp_init(ERRNO | errno.EPERM))
for name in allowed:
    number = seccomp.seccomp_syscall_resolve_name(name.encode())
    if number != -1:
        seccomp.seccomp_rule_add(rules, ALLOW, number, 0)
assert seccomp.seccomp_load(rules) == 0
os.execv(command[0], command)
"""
"""What systemd does for NoNewPrivileges, MemoryDenyWriteExecute and SystemCallFilter, without systemd."""


def calls(group: str) -> set[str]:
    """A set of system calls by systemd's name for it, with the sets in it."""
    ran = subprocess.run([tool("systemd-analyze"), "syscall-filter", group], capture_output=True, text=True, check=True)
    words = {line.strip() for line in ran.stdout.splitlines()[1:] if line.startswith("    ") and "#" not in line}
    inner = {word for word in words if word.startswith("@")}
    return (words - inner).union(*(calls(one) for one in inner))


def test_the_proxy_runs_with_what_is_left(start_enclave: Callable[..., Enclave], unit: Path, tmp_path: Path) -> None:
    filters = re.findall("^SystemCallFilter=(~?)(.*)$", unit.read_text(), re.MULTILINE)
    allowed: set[str] = set()
    for denies, groups in filters:
        named = set().union(*(calls(group) for group in groups.split()))
        allowed = allowed - named if denies else allowed | named
    assert "execve" in allowed
    assert not {"ptrace", "mount", "setuid", "chown", "sched_setaffinity"} & allowed
    enclave = start_enclave()
    program = str(Path(sys.executable).with_name("cloister"))
    command = [sys.executable, "-c", CONFINE, ",".join(sorted(allowed)), program, "connect", enclave.url, "--port", "0"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*command, *enclave.trusted], env=environment, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            ready = running.stdout.readline()
            assert ready.startswith("ready http://127.0.0.1:"), ready
            base = ready.split()[1]
            body = {"model": "default", "messages": [{"role": "user", "content": "hello"}]}
            answer = httpx2.post(f"{base}/chat/completions", json=body, trust_env=False, timeout=60)
            assert answer.json()["choices"][0]["message"]["content"] == "You said hello."
            assert httpx2.get(f"{base.removesuffix('/v1')}/chat", trust_env=False).status_code == 200
            status = Path(f"/proc/{running.pid}/status").read_text()
            assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
        finally:
            running.kill()
