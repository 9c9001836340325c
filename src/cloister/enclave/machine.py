"""The enclave's start inside a virtual machine's measured image: what the host wrote onto a disk takes the place of its
boot line.

Order: (1) no dumps; (2) the boot disk read; (3) the launch config extended into PCR 14, where that is what holds it:
before anything is listened to or asked for; (4) the data disk found, a model on it copied into sealed memory;
(5) listening; (6) the network's name servers asked, where the launch config names hosts to connect to; (7) the boot line, as a
host's, to `enclave.main`.

The disks are the host's, who may change them while they are read: what is kept is read once, and nothing on them is
mounted or run. It counts only as far as the launch config, in hardware, names it.

```
boot disk   one line of JSON (`Received`), then anything        its first bytes: {"
data disk   a bundle, or a model's file, then anything          its first bytes: cloister-bundle 00, or GGUF
```
"""

import base64
import binascii
import fcntl
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cloister.enclave import main as front
from cloister.enclave import names
from cloister.enclave.attest.tpm import SubprocessTools, Tpm, extend_launch
from cloister.enclave.boot import Boot, KeyHash, parse_config
from cloister.enclave.hardening import forbid_dumps, quiet_logs
from cloister.enclave.llm.llama.library import library_dir
from cloister.errors import CloisterError, MalformedEvidence, WrongUse
from cloister.evidence.launch import parse_launch
from cloister.evidence.strict_json import Fields, load_object

__all__ = ["DEFAULT_PORT", "EVENTS", "Disks", "Received", "main", "parse_line", "prepare", "seal_model"]

EVENTS = Path("/dev/virtio-ports/cloister.events")
"""Where the host listens to what the enclave says; without it, standard output: the console."""

DEFAULT_PORT = 8484
PATIENCE = 60.0
"""Seconds that a disk may take to appear."""

BY_TPM = frozenset({"vtpm", "azure-tdx", "azure-sev-snp"})
"""Platforms whose launch config PCR 14 holds; elsewhere the CPU's own field does."""

MAX_LINE = 4 * 1024 * 1024
MAX_KEYS = 4096
MAX_MODEL = 1 << 42

_PIPE = 1 << 20
_CHUNK = 1 << 23
_HEAD = 512
_MAGIC = {"bundle": b"cloister-bundle\0", "model": b"GGUF"}
_DISK = re.compile(r"(vd|sd|xvd)[a-z]{1,2}|nvme[0-9]{1,2}n[0-9]{1,2}")
_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What the host says. `launch`, `config`: exact bytes. `data`: what the data disk holds, and `data_bytes` how much of
    it; None without such a disk. `port`: of every address of this machine, as `tls_port` where the configuration says `tls`.
    `endorsements`: the vendor's collateral, b"" for none. `tls_origins`, `founds_group`: as `Boot` has them."""

    launch: bytes
    config: bytes
    data: str | None = None
    data_bytes: int = 0
    model_name: str = "model"
    port: int = DEFAULT_PORT
    api_keys: tuple[KeyHash, ...] = ()
    endorsements: bytes = b""
    tls_port: int | None = None
    tls_origins: tuple[str, ...] = ()
    founds_group: bool = False


def parse_line(content: bytes) -> Received:
    """The boot disk's beginning, at most `MAX_LINE` bytes. `launch`, `config` and `endorsements` are base64.

    Raises: MalformedEvidence for anything else than one line of such JSON.
    """
    line, end, _ = content.partition(b"\n")
    if not end:
        raise MalformedEvidence("The boot disk's line is too long, or cut.", step="boot", expected=f"{MAX_LINE} bytes")
    fields = Fields(load_object(line, max_bytes=MAX_LINE, what="boot"), what="boot")
    fields.integer("v", low=1, high=1)
    received = Received(
        launch=_bytes(fields.take("launch"), "launch"),
        config=_bytes(fields.take("config"), "config"),
        data=_data(fields.take("data") if fields.has("data") else None),
        data_bytes=fields.integer("data_bytes", high=MAX_MODEL) if fields.has("data_bytes") else 0,
        model_name=_name(fields.take("model_name") if fields.has("model_name") else ""),
        port=fields.integer("port", low=1, high=65535) if fields.has("port") else DEFAULT_PORT,
        api_keys=tuple(_keys(fields.take("api_keys"))) if fields.has("api_keys") else (),
        endorsements=_bytes(fields.take("endorsements"), "endorsements") if fields.has("endorsements") else b"",
        tls_port=fields.integer("tls_port", low=1, high=65535) if fields.has("tls_port") else None,
        tls_origins=fields.texts("tls_origins", max_items=16) if fields.has("tls_origins") else (),
        founds_group=fields.boolean("founds_group") if fields.has("founds_group") else False,
    )
    fields.end()
    return received


def _bytes(value: object, name: str) -> bytes:
    try:
        if isinstance(value, str):
            return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise MalformedEvidence(f"boot.{name} is not base64.", step=f"boot.{name}")


def _data(value: object) -> str | None:
    if value is not None and value not in _MAGIC:
        raise MalformedEvidence("boot.data is no such thing.", step="boot.data", expected=" or ".join(_MAGIC))
    return None if value is None else str(value)


def _name(value: object) -> str:
    if not isinstance(value, str) or len(value) > 256 or not value.isprintable():
        raise MalformedEvidence("boot.model_name is no name.", step="boot.model_name")
    return value or "model"


def _keys(value: object) -> Iterator[KeyHash]:
    if not isinstance(value, list) or len(value) > MAX_KEYS:
        raise MalformedEvidence("boot.api_keys is no list of keys.", step="boot.api_keys")
    for one in value:
        fields = Fields(one, what="boot.api_keys")
        yield KeyHash(fields.matching("name", _KEY_NAME, "a key's name"), fields.sha256("sha256"))
        fields.end()


@dataclass(frozen=True, slots=True)
class Disks:
    """The whole disks of this machine, told apart by their first bytes. `patience`: seconds that one may take to appear."""

    devices: Path = Path("/sys/class/block")
    nodes: Path = Path("/dev")
    patience: float = PATIENCE
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def find(self, first: bytes, what: str) -> Path:
        """The one that begins so. Raises: WrongUse for none, or several."""
        until = self.clock() + self.patience
        while not (found := [path for path in self._all() if _head(path).startswith(first)]):
            if self.clock() >= until:
                hint = "Attach it, read-only, before the start."
                raise WrongUse(f"There is no {what} disk.", step="boot.disks", hint=hint)
            self.sleep(0.1)
        if len(found) > 1:
            names = " ".join(path.name for path in found)
            raise WrongUse(f"There are several {what} disks.", step="boot.disks", expected="one", got=names)
        return found[0]

    def _all(self) -> list[Path]:
        names = sorted(path.name for path in self.devices.iterdir()) if self.devices.is_dir() else []
        return [self.nodes / name for name in names if _DISK.fullmatch(name)]


def _head(path: Path) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def seal_model(path: Path, size: int) -> int:
    """The first `size` bytes, copied into memory that nobody can change any more: the engine takes such memory as it is.

    Raises: WrongUse when the disk is shorter, cannot be read, or does not fit into memory.
    """
    fd = os.memfd_create("model", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with path.open("rb", buffering=0) as disk:
            left = size
            while left and (chunk := disk.read(min(left, _CHUNK))):
                left -= len(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[os.write(fd, view) :]
        if left:
            raise WrongUse("The data disk is shorter than the boot disk says.", step="boot.data_bytes")
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        )
    except OSError as error:
        os.close(fd)
        raise WrongUse("The model cannot be read into memory.", step="boot.data", got=error.strerror) from error
    except WrongUse:
        os.close(fd)
        raise
    return fd


def prepare(disks: Disks, tpm: Tpm, *, engine_dir: str) -> Boot:
    """Steps (2) to (5): what a host would have said. The model and the socket stay open.

    Raises: CloisterError.
    """
    received = _read(disks.find(b'{"', "boot"))  # (2)
    parse_launch(received.launch)
    if parse_config(received.config).platform in BY_TPM:
        extend_launch(tpm, received.launch)  # (3)
    data = None if received.data is None else disks.find(_MAGIC[received.data], received.data)  # (4)
    sealed = seal_model(data, received.data_bytes) if data is not None and received.data == "model" else None
    return Boot(
        launch=received.launch,
        config=received.config,
        listen_fd=_listen(received.port),  # (5)
        model_path="" if sealed is None else _path(sealed),
        model_name=received.model_name,
        engine_dir=engine_dir,
        api_keys=received.api_keys,
        endorsements_path=_in_memory(received.endorsements),
        bundle_path=str(data) if received.data == "bundle" else "",
        tls_fd=None if received.tls_port is None else _listen(received.tls_port),
        tls_origins=received.tls_origins,
        founds_group=received.founds_group,
    )


def _read(path: Path) -> Received:
    try:
        with path.open("rb", buffering=0) as disk:
            content = disk.read(MAX_LINE)
    except OSError as error:
        raise WrongUse("The boot disk cannot be read.", step="boot", got=error.strerror) from error
    return parse_line(content)


def _listen(port: int) -> int:
    """On every address, IPv6 and IPv4."""
    try:
        if socket.has_dualstack_ipv6():
            sock = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            sock = socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise WrongUse(f"Cannot listen on port {port}.", step="boot.port", got=error.strerror) from error
    return sock.detach()


def _in_memory(content: bytes) -> str:
    if not content:
        return ""
    fd = os.memfd_create("endorsements", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return _path(fd)


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def main() -> None:
    """Exit status as `enclave.main`'s."""
    forbid_dumps()  # (1)
    quiet_logs()
    _speak_to(EVENTS)
    try:
        boot = prepare(Disks(), Tpm(SubprocessTools()), engine_dir=_engine_dir())
    except CloisterError as error:
        _fail(error)
    if parse_launch(boot.launch).egress:
        threading.Thread(target=names.follow, daemon=True).start()  # (6)
    _as_standard_input(boot.encode())
    front.main()  # (7)


def _engine_dir() -> str:
    """ "" in an image without the engine, for apps that bring no model."""
    return str(library_dir()) if importlib.util.find_spec("llama_cpp") else ""


def _speak_to(port: Path) -> None:
    if port.exists():
        fd = os.open(port, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY)
        os.dup2(fd, 1)
        os.close(fd)


def _as_standard_input(line: bytes) -> None:
    """A pipe that holds the line, and whose other end stays open: it never ends, since no host holds it."""
    reading, writing = os.pipe()
    if fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE) < len(line):
        _fail(WrongUse("The boot line is over 1 MiB.", step="boot", hint="Hand over fewer API keys."))
    os.write(writing, line)
    os.dup2(reading, 0)
    os.close(reading)


def _fail(error: CloisterError) -> NoReturn:
    words: dict[str, Any] = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    sys.stdout.write(json.dumps({"event": "failed", **words, "step": error.step}) + "\n")
    raise SystemExit(1)


if __name__ == "__main__":
    main()
