"""Confinement where nobody is root: in a user namespace. (As root: `test_app.py`.)"""

import json
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = """
import ctypes, json, os, socket
from cloister.enclave.pyapp.confinement import confine, drop_privileges
libc = ctypes.CDLL(None, use_errno=True)
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
    libc.prctl(4, 1, 0, 0, 0)  # as after an exec: its own files below /proc are its own
user = os.getuid()
alone = libc.unshare(0x00020000)
confine(memory=8)
drop_privileges()
def tried(what):
    try: what()
    except OSError as error: return error.errno
    return 0
with socket.socket() as sock:
    reached = sock.connect_ex(("192.0.2.1", 9))
print(json.dumps({"alone": alone, "same user": os.getuid() == user, "shm": sorted(os.listdir("/dev/shm")),
    "device": [tried(lambda name=name: os.close(os.open(f"/dev/{name}", os.O_RDWR))) for name in ("null", "ptmx")],
    "random": len(os.urandom(4)) + len(open("/dev/urandom", "rb").read(4)), "write": tried(lambda: open("/dev/shm/x", "w").close()), "root": tried(lambda: open("/cloister-canary", "w").close()),
    "process": os.getpid(), "reached": reached, "run": os.listdir("/run"), "vsock": tried(lambda: socket.socket(40, socket.SOCK_STREAM)), "caps": open("/proc/self/status").read().split("CapEff:")[1].split()[0]}))
"""
READ_ONLY, UNREACHABLE, NO_ACCESS = 30, 101, 13


def test_a_user_without_privileges_is_confined_too() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found == {
        "alone": -1,  # no mount namespace without a user namespace
        "same user": True,
        "shm": ["at-run", "at-tmp", "at-var-tmp"],
        "process": 2,
        "device": [0, NO_ACCESS],  # to everybody's device as to a disk
        "random": 8,
        "write": 0,
        "root": READ_ONLY,
        "reached": UNREACHABLE,
        "run": [],
        "vsock": NO_ACCESS,
        "caps": "0" * 16,
    }


CHILDREN = """
import os, subprocess, sys, time
from cloister.enclave.pyapp.confinement import confine, drop_privileges
confine(memory=8)
drop_privileges()
subprocess.Popen(["/bin/sh", "-c", "exec sleep 600"], start_new_session=True)  # an interpreter may lie below /tmp
print("started", flush=True)
if sys.argv[1] == "ends":
    os._exit(7)
time.sleep(600)
"""


def below(pid: int) -> list[int]:
    """Its children, and theirs."""
    try:
        own = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*own, *(one for child in own for one in below(child))]


def gone(pids: list[int]) -> bool:
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/exe").exists() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_what_the_app_started_ends_with_it_and_its_status_is_passed_on() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILDREN, "ends"], stdout=subprocess.PIPE) as ran:
        assert ran.stdout is not None
        assert ran.stdout.read() == b"started\n"  # nobody holds it open any longer
        assert ran.wait(20) == 7


def test_what_the_app_started_ends_when_its_starter_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILDREN, "stays"], stdout=subprocess.PIPE) as ran:
        assert ran.stdout is not None
        assert ran.stdout.readline() == b"started\n"
        pids = below(ran.pid)
        assert len(pids) == 3  # the first of the view, the app, and what it started
        ran.kill()
        assert gone(pids)


LIMIT = """
from pathlib import Path
from cloister.enclave.pyapp.confinement import confine
confine(memory=8)
for place in ("/dev/shm", "/tmp", "/var/tmp", "/run"):
    try: Path(place, "x").write_bytes(bytes(3 << 20))
    except OSError as error: print(place, error.errno)
"""


def test_all_its_files_in_memory_have_one_limit() -> None:
    ran = subprocess.run([sys.executable, "-c", LIMIT], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["/var/tmp 28", "/run 28"]
