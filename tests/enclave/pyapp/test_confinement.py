"""Confinement where nobody is root: in a user namespace. (As root: `test_app.py`.)"""

import json
import subprocess
import sys

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
print(json.dumps({"alone": alone, "same user": os.getuid() == user, "shm": os.listdir("/dev/shm"),
    "device": [tried(lambda name=name: os.close(os.open(f"/dev/{name}", os.O_RDWR))) for name in ("null", "ptmx")],
    "random": len(os.urandom(4)) + len(open("/dev/urandom", "rb").read(4)), "write": tried(lambda: open("/dev/shm/x", "w").close()), "root": tried(lambda: open("/cloister-canary", "w").close()),
    "reached": reached, "run": os.listdir("/run"), "vsock": tried(lambda: socket.socket(40, socket.SOCK_STREAM)), "caps": open("/proc/self/status").read().split("CapEff:")[1].split()[0]}))
"""
READ_ONLY, UNREACHABLE, NO_ACCESS = 30, 101, 13


def test_a_user_without_privileges_is_confined_too() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found == {
        "alone": -1,  # no mount namespace without a user namespace
        "same user": True,
        "shm": [],
        "device": [0, NO_ACCESS],  # to everybody's device as to a disk
        "random": 8,
        "write": 0,
        "root": READ_ONLY,
        "reached": UNREACHABLE,
        "run": [],
        "vsock": NO_ACCESS,
        "caps": "0" * 16,
    }
