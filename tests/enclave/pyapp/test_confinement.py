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
confine(network=False, memory=8)
drop_privileges()
def tried(what):
    try: what()
    except OSError as error: return error.errno
    return 0
with socket.socket() as sock:
    reached = sock.connect_ex(("192.0.2.1", 9))
print(json.dumps({"alone": alone, "same user": os.getuid() == user, "shm": os.listdir("/dev/shm"),
    "write": tried(lambda: open("/dev/shm/x", "w").close()), "root": tried(lambda: open("/cloister-canary", "w").close()),
    "reached": reached, "caps": open("/proc/self/status").read().split("CapEff:")[1].split()[0]}))
"""
READ_ONLY, UNREACHABLE = 30, 101


def test_a_user_without_privileges_is_confined_too() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found == {
        "alone": -1,  # no mount namespace without a user namespace
        "same user": True,
        "shm": [],
        "write": 0,
        "root": READ_ONLY,
        "reached": UNREACHABLE,
        "caps": "0" * 16,
    }
