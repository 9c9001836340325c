"""A host whose disk fills up during an upload: a real daemon on a real, small file system of its own."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.end_to_end.hosting import ANSWER, Host, ask, told_of, write_words
from tests.system.shell import Shell, tool

from cloister.errors import HostFull
from cloister.host.bundles import UploadLimits

pytestmark = pytest.mark.system

ROOM = 24 << 20
DISK = UploadLimits().reserve + ROOM
LARGE = 16 << 20


@dataclass
class Small:
    """`disk`: the host's state, as this process reaches what only the host has mounted."""

    host: Host
    disk: Path

    def fill(self) -> None:
        """To the last byte."""
        block = bytes(1 << 20)
        with (self.disk / "somebody-elses").open("ab", buffering=0) as file:
            try:
                while file.write(block):
                    pass
            except OSError:
                return

    def free(self) -> None:
        (self.disk / "somebody-elses").unlink()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    """In a mount namespace of the host's own, so that nothing is left of it."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = f"mount -t tmpfs -o mode=0700,size={DISK} tmpfs {place}"
    prefix = f"{tool('unshare')} --mount --map-root-user sh -c '{mount} && exec \"$@\"' sh"
    host = Host(Shell(tmp_path), f"--state {place}", prefix=prefix)
    host.start()
    disk = Path(f"/proc/{host.pid}/root{place}")
    try:
        inside = f"{tool('nsenter')} --target {host.pid} --user --mount --preserve-credentials"
        host.log_in(f"{inside} cloister host token add me --state {place}")
        yield Small(host, disk)
    finally:
        host.end(signal.SIGTERM)


def test_a_disk_that_fills_up_is_said_and_what_was_there_goes_on(small: Small, tmp_path: Path) -> None:
    host = small.host
    write_words(tmp_path)
    words = told_of(host.do("cloister deploy words --json"))
    large = write_words(tmp_path / "large")
    (large / "filler.bin").write_bytes(os.urandom(LARGE))
    made = told_of(host.do("cloister package large/words --json"))

    def progress(done: int, total: int) -> None:
        """Room enough when it begins, and none any more when half of it is there."""
        if done >= total // 2:
            small.fill()

    with host.api() as client, pytest.raises(HostFull, match="disk"):
        client.upload(tmp_path / made["bundle"], made["sha256"], progress)
    assert {path.name for path in (small.disk / "bundles").iterdir()} == {words["app"]["bundle"]}
    assert "disk" in host.do("cloister deploy large/words --name large", code=5).stderr

    # What was there goes on, and is still what it was.
    assert ask(words) == ANSWER
    assert {name: app["state"] for name, app in host.apps().items()} == {"words": "ready"}

    small.free()
    assert ask(told_of(host.do("cloister deploy large/words --name large --json"))) == ANSWER
    assert set(host.apps()) == {"words", "large"}
