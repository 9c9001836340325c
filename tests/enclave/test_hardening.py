import logging
import subprocess
import sys

import pytest

from cloister.enclave.hardening import FRONT_NICENESS, quiet_logs

PROBE = """
import ctypes, os, resource, threading
from cloister.enclave.hardening import forbid_dumps, lower_priority
forbid_dumps()
waiting, lowered = threading.Event(), threading.Event()
seen = []
def engine():
    waiting.set(); lowered.wait(); seen.append(os.getpriority(os.PRIO_PROCESS, 0))
thread = threading.Thread(target=engine); thread.start(); waiting.wait()
lower_priority(); lowered.set(); thread.join()
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE), os.getpriority(os.PRIO_PROCESS, 0), *seen)
"""


@pytest.mark.parametrize("niceness", [0, 3, 19])
def test_no_dumps_and_only_the_front_has_lower_priority(niceness: int) -> None:
    command = ["nice", "-n", str(niceness), sys.executable, "-c", PROBE]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    dumpable, soft, hard, front, engine = map(int, ran.stdout.split())
    assert (dumpable, soft, hard) == (0, 0, 0)
    assert front == min(engine + FRONT_NICENESS, 19)


def test_logs_hold_neither_arguments_nor_exception_texts(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        quiet_logs()
        try:
            raise ValueError("canary one")
        except ValueError:
            logging.getLogger("front.server").exception("failed for %s", "canary two")
        logging.getLogger("front.other").warning("asked by %s", "canary three")
        logging.getLogger("front.third").warning(f"result={'canary four'}")  # noqa: G004
    finally:
        root.handlers[:], root.level = handlers, level
    said = capsys.readouterr().err
    assert "ValueError" in said
    assert "front.server" in said
    assert "warning front.third test_hardening.py:" in said
    assert "canary" not in said
