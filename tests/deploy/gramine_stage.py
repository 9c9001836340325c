"""A machine with Gramine and SGX, as its programs and its owner see it; the vendor behind it is thrown away afterwards."""

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.enclave.attest.fakes.gramine import FakeGramine, machine
from tests.enclave.attest.fakes.kernel import FakeKernel
from tests.system.shell import tool
from tests.vendors import intel

from cloister.evidence.document import Document
from cloister.evidence.endorsements import Endorsements

PROGRAMS = Path(__file__).with_name("gramine_programs.py")
_C_LIBRARY = [f"lib{name}" for name in ("c.so.6", "m.so.6", "mvec.so.1", "pthread.so.0", "dl.so.2", "rt.so.1")]
_C_LIBRARY += ["ld-linux-x86-64.so.2", "libutil.so.1", "libresolv.so.2", "libanl.so.1"]
_FOLDERS = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64")


@dataclass
class Sgx:
    """What the processor and Intel say of the enclave: set `mr_enclave` before it is asked."""

    mr_enclave: bytes = bytes(32)
    questions: list[bytes] = field(default_factory=list)

    def _settings(self, report: Mapping[str, Any]) -> intel.Settings:
        """Valid today, whenever that is."""
        now = time.time()
        dates = {"issueDate": intel.iso(now - intel.DAY), "nextUpdate": intel.iso(now + 29 * intel.DAY)}
        return intel.Settings(
            validity={name: (_day(now) - 30 * intel.DAY, _day(now) + 300 * intel.DAY) for name in intel.CERTIFICATES},
            crl_dates=dict.fromkeys(("pck_crl", "root_crl"), (now - intel.DAY, now + 29 * intel.DAY)),
            tcb_info=dates,
            qe_identity=dates,
            report=report,
        )

    def quote(self, question: bytes) -> bytes:
        self.questions.append(question)
        return self._evidence({"report_data": question, "mr_enclave": self.mr_enclave}).quote

    def _evidence(self, report: Mapping[str, Any]) -> intel.Evidence:
        return intel.intel().make(self._settings(report))

    @property
    def root(self) -> bytes:
        return self._evidence({}).root

    def complete(self, document: Document, _now: float) -> Document:
        """As a client does that asks Intel for the collateral."""
        collateral = self._evidence({}).collateral
        return Document({**document.items, "endorsements": Endorsements(intel=collateral).item()})


def _day(now: float) -> float:
    return now - now % intel.DAY


@dataclass
class GramineMachine:
    """`bin`: where its programs lie, for PATH. `trace`: what the enclave did, by strace, where `traced`."""

    bin: Path
    runtime: Path
    trace: Path
    sgx: Sgx

    @property
    def traced(self) -> list[str]:
        """From the enclave's first moment on."""
        lines = self.trace.read_text(errors="replace").splitlines()
        first = next(
            at for at, line in enumerate(lines) if 'execve("/python/bin/python3"' in line and line.endswith("= 0")
        )
        return lines[first:]

    def opened(self) -> set[str]:
        """Files, by the path inside; without folders, and without what Gramine makes itself."""
        found = re.compile(
            r'openat\(AT_FDCWD, "([^"]+)", ([A-Z_|0-9]+)(?:, 0[0-7]*)?\) = [0-9]+|open\("([^"]+)", ([A-Z_|]+)'
        )
        paths = set()
        for line in self.traced:
            if (match := found.search(line)) and "O_DIRECTORY" not in (match[2] or match[4]):
                paths.add(os.path.normpath(match[1] or match[3]))
        return {path for path in paths if not path.startswith(("/proc/", "/sys/", "/dev/", "/lib/", "/tmp/"))}

    def most_threads(self) -> int:
        """At a time."""
        now = most = 1
        for line in self.traced:
            if re.search(r"\bclone\(.*\) = [0-9]+$|<\.\.\. clone resumed>.*= [0-9]+$", line):
                now += 1
                most = max(most, now)
            elif re.search(r"\+\+\+ exited with", line):
                now -= 1
        return most


@contextlib.contextmanager
def gramine_machine(folder: Path) -> Iterator[GramineMachine]:
    """Programs that are found by their names, in `folder`/bin."""
    runtime, programs = folder / "gramine" / "runtime", folder / "bin"
    runtime.mkdir(parents=True)
    programs.mkdir()
    (folder / "gramine" / "libsysdb.so").write_bytes(b"the library OS")
    for name in _C_LIBRARY:
        shutil.copyfile(next(Path(at) / name for at in _FOLDERS if (Path(at) / name).exists()), runtime / name)
        (runtime / name).chmod(0o755)
    sgx, trace = Sgx(), folder / "trace"
    settings = {
        "libos": str(folder / "gramine" / "libsysdb.so"),
        "runtime": str(runtime),
        "attestation": str(folder / "attestation"),
    }
    for name in ("gramine-manifest", "gramine-sgx-sign", "gramine-sgx"):
        _program(programs / name, settings, trace)
    with _attesting(folder / "attestation", sgx):
        yield GramineMachine(programs, runtime, trace, sgx)


def _program(path: Path, settings: Mapping[str, str], trace: Path) -> None:
    words = [sys.executable, str(PROGRAMS), json.dumps(settings), path.name]
    if path.name == "gramine-sgx":  # in mounts of its own, and watched
        calls = "trace=open,openat,execve,clone,clone3,exit"
        watch = [tool("strace"), "-f", "-q", "--seccomp-bpf", "-e", calls, "-e", "signal=none", "-o", str(trace)]
        namespaces = [tool("unshare"), "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
        words = [*watch, *namespaces, *words]
    quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
    path.write_text(f'#!/bin/sh\nexec {quoted} "$@"\n')
    path.chmod(0o755)


@contextlib.contextmanager
def _attesting(path: Path, sgx: Sgx) -> Iterator[None]:
    """Gramine's /dev/attestation, for whoever connects."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=_serve, args=(server, sgx), daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def _serve(server: socket.socket, sgx: Sgx) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=_answer, args=(connection, machine(FakeGramine(make=sgx.quote))), daemon=True).start()


def _answer(connection: socket.socket, kernel: FakeKernel) -> None:
    with connection, connection.makefile("rwb") as lines:
        while line := lines.readline():
            name, *arguments = json.loads(line)
            if name == "write":
                arguments[1] = bytes.fromhex(arguments[1])
            try:
                value = getattr(kernel, name)(*arguments)
                answer = {"value": value.hex() if isinstance(value, bytes) else value}
            except OSError as error:
                answer = {"errno": error.errno}
            lines.write(json.dumps(answer).encode() + b"\n")
            lines.flush()
