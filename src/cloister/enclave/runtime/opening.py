"""A bundle's ciphertext, opened into sealed memory in constant space, and checked against its manifest."""

import contextlib
import fcntl
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from cloister.channel.hpke import TAG_LENGTH
from cloister.channel.sections import CHUNK, SectionOpener
from cloister.errors import ChannelBroken, EngineDied, NotTrusted, WrongUse
from cloister.evidence.bundle import MAX_HEAD, BundleHead, Placement, parse_bundle_head
from cloister.evidence.launch import LaunchConfig

__all__ = ["SealedBundle", "check_bundle"]

Progress = Callable[[float], None]


class SealedBundle:
    """A bundle's file, read once: its head now, its sections when their keys are there. The file may be changed meanwhile:
    then a section does not open. Whoever closes it may do so while another thread opens it."""

    def __init__(self, path: Path) -> None:
        """Raises: WrongUse when it is not there, EngineDied when it cannot be read, MalformedEvidence when it is no bundle."""
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise WrongUse("The bundle cannot be read.", step="bundle", got=error.strerror) from error
        try:
            self.head: BundleHead = parse_bundle_head(_read(self._file.fileno(), MAX_HEAD))
        except BaseException:
            self._file.close()
            raise
        self._memory: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def files(self) -> Mapping[str, int]:
        """Section -> descriptor of the memory that its plaintext goes into; empty until it was opened."""
        for section in self.head.manifest.sections:
            if section.name not in self._memory:
                flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
                self._memory[section.name] = os.memfd_create(section.name, flags)
        return self._memory

    def open(self, keys: Mapping[str, bytes], on_progress: Progress = lambda _share: None) -> None:
        """Every section, into its memory, which nobody can change afterwards.

        Raises: NotTrusted for a section that is cut, changed, another bundle's, or not what the manifest says; EngineDied
        when it cannot be read, when there is no memory for it, and when it is closed meanwhile.
        """
        total = sum(section.size for section in self.head.manifest.sections) or 1
        done = 0
        for placement in self.head.placements:
            for count in self._open(placement, keys[placement.section.name]):
                done += count
                on_progress(done / total)

    def _open(self, placement: Placement, key: bytes) -> Iterator[int]:
        """How many bytes of plaintext came of each chunk; all of it counts only at the end."""
        section = placement.section
        opener = SectionOpener(key, section.name, section.size)
        digest = hashlib.sha256()
        sealed, plain = memoryview(bytearray(CHUNK + TAG_LENGTH)), memoryview(bytearray(CHUNK))
        with self._kept():
            memory = self.files[section.name]
            self._file.seek(placement.offset)
        while not opener.ended:
            with self._kept():
                length = _read_into(self._file.fileno(), sealed[: opener.next_sealed])
            try:
                count = opener.open_into(sealed[:length], plain)
            except ChannelBroken as error:
                raise _other(section.name) from error
            digest.update(plain[:count])
            with self._kept():
                _write(memory, plain[:count])
            yield count
        if digest.hexdigest() != section.sha256:
            raise _other(section.name)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        with self._kept():
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Its descriptors are its own for as long as this lasts: a closed one's number may be anything's, which plaintext must
        not go into. Raises: EngineDied."""
        with self._lock:
            if self._file.closed:
                raise EngineDied("The app was stopped while it was opened.", step="bundle")
            yield

    def close(self) -> None:
        """The memory is given back once nobody else holds it."""
        with self._lock:
            self._file.close()
            for descriptor in self._memory.values():
                os.close(descriptor)
            self._memory = {}

    def __enter__(self) -> "SealedBundle":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def check_bundle(head: BundleHead, launch: LaunchConfig) -> None:
    """The bundle handed over must be the one that the launch config names, for this Python. Raises: NotTrusted, WrongUse."""
    manifest = head.manifest
    same = (
        head.sha256 == launch.app.sha256
        and manifest.kind == launch.app.kind
        and manifest.models == launch.models
        and manifest.egress == launch.egress
        and manifest.logs == launch.logs
    )
    if not same:
        raise NotTrusted(
            "The bundle handed over is not the one that the launch config names.",
            step="launch.app",
            expected=launch.app.sha256,
            got=head.sha256,
            hint="Start the enclave again with the bundle it was launched for.",
        )
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    if manifest.python not in ("", own):
        raise WrongUse(
            f"The app's requirements are for Python {manifest.python}, and this is {own}.",
            step="bundle",
            hint=f'Write python = "{own}" in cloister.toml, and deploy it anew.',
        )


def _other(name: str) -> NotTrusted:
    return NotTrusted(
        f"The bundle's section {name!r} is not what its owner sealed.",
        step="bundle",
        hint="It was cut or changed on its way, or these are another packaging's keys. Upload it again.",
    )


def _read(descriptor: int, most: int) -> bytes:
    found = bytearray(most)
    return bytes(found[: _read_into(descriptor, memoryview(found))])


def _read_into(descriptor: int, view: memoryview) -> int:
    """Fewer bytes than asked for only at the end. Raises: EngineDied, which another start may mend."""
    done = 0
    try:
        while done < len(view) and (count := os.readv(descriptor, [view[done:]])):
            done += count
    except OSError as error:
        hint = "Is the host's disk well?"
        raise EngineDied("The bundle cannot be read.", step="bundle", got=error.strerror, hint=hint) from error
    return done


def _write(descriptor: int, view: memoryview) -> None:
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        hint = "Give it more, or stop another app."
        raise EngineDied("There is no memory for the app.", step="bundle", got=error.strerror, hint=hint) from error
