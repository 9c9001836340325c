"""The filter in a process of its own: once it is there, it stays."""

import json
import subprocess
import sys

SCRIPT = """
import ctypes, json, os, socket
from cloister.enclave.pyapp.filter import forbid_other_sockets
libc = ctypes.CDLL(None, use_errno=True)
def opened(family, kind=socket.SOCK_STREAM):
    try: socket.socket(family, kind).close()
    except OSError as error: return error.errno
    return 0
def ring():
    ctypes.set_errno(0)
    return 0 if libc.syscall(425, 1, ctypes.create_string_buffer(248)) >= 0 else ctypes.get_errno()
def all_of():
    return {"unix": opened(socket.AF_UNIX), "inet": opened(socket.AF_INET), "inet6": opened(socket.AF_INET6),
            "netlink": opened(socket.AF_NETLINK, socket.SOCK_RAW), "vsock": opened(40), "alg": opened(38, socket.SOCK_SEQPACKET),
            "any beyond": opened(1000), "ring": ring()}
libc.prctl(38, 1, 0, 0, 0)
before = all_of()
forbid_other_sockets()
child = os.fork()
if child == 0:
    os._exit(opened(40))
print(json.dumps([before, all_of(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]))
"""
EACCES = 13


def test_families_that_no_namespace_holds_and_what_makes_sockets_unseen_are_forbidden() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    before, after, in_a_child = json.loads(ran.stdout)
    assert EACCES not in before.values()
    assert after == {
        **dict.fromkeys(("unix", "inet", "inet6", "netlink"), 0),
        **dict.fromkeys(("vsock", "alg", "any beyond", "ring"), EACCES),
    }
    assert in_a_child == EACCES


def test_it_is_refused_where_it_cannot_be_had() -> None:
    script = "import platform; platform.machine = lambda: 'sparc'\n"
    script += "from cloister.enclave.pyapp.filter import forbid_other_sockets as f\nf()"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "OSError" in ran.stderr
