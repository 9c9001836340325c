import contextlib
import errno
import hashlib
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.enclave.runtime.world import bundle, owned

from cloister.channel.sections import CHUNK
from cloister.enclave.runtime.opening import SealedBundle, check_bundle
from cloister.errors import EngineDied, MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.bundle import parse_bundle_head
from cloister.evidence.launch import App, parse_launch

CODE, MODEL = os.urandom(3000), os.urandom(2 * CHUNK + 17)


def test_each_section_opens_into_memory_that_nobody_can_change(tmp_path: Path) -> None:
    content, keys = bundle({"code": CODE, "model": MODEL}, model="toy")
    path = tmp_path / "app.cloister"
    path.write_bytes(content)
    shares: list[float] = []
    with SealedBundle(path) as sealed:
        sealed.open(keys, shares.append)
        for name, expected in (("code", CODE), ("model", MODEL)):
            descriptor = sealed.files[name]
            assert os.pread(descriptor, 1 << 22, 0) == expected
            with pytest.raises(OSError):
                os.pwrite(descriptor, b"x", 0)
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize("call", ["readv", "write"])
def test_what_another_start_may_mend_is_no_wrong_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A disk that fails, memory that there is not just now: the host starts it again."""
    content, keys = bundle({"code": CODE})
    path = tmp_path / "app.cloister"
    path.write_bytes(content)

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with SealedBundle(path) as sealed:
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(EngineDied):
            sealed.open(keys)
        monkeypatch.undo()


def test_closed_while_it_is_opened_it_reads_and_writes_nothing_more(tmp_path: Path) -> None:
    """The numbers of its descriptors are other files' at once."""
    content, keys = bundle({"code": CODE, "model": MODEL}, model="toy")
    path = tmp_path / "app.cloister"
    path.write_bytes(content)
    sealed = SealedBundle(path)
    taken: list[int] = []

    def close(_share: float) -> None:
        if not taken:
            sealed.close()
            taken.extend(os.memfd_create("other") for _ in range(4))

    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(EngineDied, match="stopped"):
        sealed.open(keys, close)
    assert [os.fstat(descriptor).st_size for descriptor in taken] == [0] * 4
    for descriptor in taken:
        os.close(descriptor)
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 1  # the bundle's own


def test_closing_waits_for_the_plaintext_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, keys = bundle({"code": CODE})
    path = tmp_path / "app.cloister"
    path.write_bytes(content)
    sealed = SealedBundle(path)
    closing, alive = threading.Thread(target=sealed.close), []

    def slow(_descriptor: int, view: memoryview) -> int:
        closing.start()
        closing.join(0.1)
        alive.append(closing.is_alive())
        return len(view)

    monkeypatch.setattr(os, "write", slow)
    with contextlib.suppress(EngineDied):  # or it was the last of it
        sealed.open(keys)
    closing.join()
    assert alive == [True]


def changes(content: bytes) -> dict[str, bytes]:
    code = parse_bundle_head(content).placements[0]
    model = parse_bundle_head(content).placements[1]
    chunk = CHUNK + 16
    first, second = (
        content[model.offset : model.offset + chunk],
        content[model.offset + chunk : model.offset + 2 * chunk],
    )
    return {
        "a bit": content[: code.offset] + bytes([content[code.offset] ^ 1]) + content[code.offset + 1 :],
        "cut": content[:-1],
        "cut at a chunk": content[: model.offset + 2 * chunk],
        "chunks exchanged": content[: model.offset] + second + first + content[model.offset + 2 * chunk :],
    }


@pytest.mark.parametrize("name", ["a bit", "cut", "cut at a chunk", "chunks exchanged"])
def test_ciphertext_that_was_touched_does_not_open(tmp_path: Path, name: str) -> None:
    content, keys = bundle({"code": CODE, "model": MODEL}, model="toy")
    path = tmp_path / "app.cloister"
    path.write_bytes(changes(content)[name])
    with SealedBundle(path) as sealed, pytest.raises(NotTrusted):
        sealed.open(keys)


def test_another_packagings_ciphertext_or_keys_do_not_open(tmp_path: Path) -> None:
    """The same app, sealed twice: the heads differ in their ids only."""
    (first, keys), (second, others) = bundle({"code": CODE}), bundle({"code": CODE})
    length = parse_bundle_head(first).length
    for content, given in ((first, others), (first[:length] + second[length:], keys)):
        path = tmp_path / "app.cloister"
        path.write_bytes(content)
        with SealedBundle(path) as sealed, pytest.raises(NotTrusted):
            sealed.open(given)


def test_plaintext_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    """Sealed by whoever has the keys, but not what was pinned."""
    content, keys = bundle({"code": CODE})
    other = content.replace(hashlib.sha256(CODE).hexdigest().encode(), b"00" * 32)
    path = tmp_path / "app.cloister"
    path.write_bytes(other)
    with SealedBundle(path) as sealed, pytest.raises(NotTrusted):
        sealed.open(keys)


def test_a_file_that_is_changed_after_the_head_was_read_does_not_open(tmp_path: Path) -> None:
    content, keys = bundle({"code": CODE})
    path = tmp_path / "app.cloister"
    path.write_bytes(content)
    with SealedBundle(path) as sealed:
        path.write_bytes(content[:-10] + bytes(10))
        with pytest.raises(NotTrusted):
            sealed.open(keys)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "app.cloister"
    with pytest.raises(WrongUse):
        SealedBundle(path)
    path.write_bytes(b"PK")
    with pytest.raises(MalformedEvidence):
        SealedBundle(path)


@pytest.mark.parametrize(
    "change",
    [
        {"app": App("wsgi", "00" * 32)},
        {"app": "kind"},
        {"models": ("11" * 32,)},
        {"egress": ("elsewhere.example",)},
        {"logs": "public"},
    ],
    ids=str,
)
def test_a_bundle_that_the_launch_config_does_not_name_is_refused(change: dict[str, object]) -> None:
    own = owned()
    head, launch = parse_bundle_head(own.content), parse_launch(own.launch)
    check_bundle(head, launch)
    if change == {"app": "kind"}:
        change = {"app": replace(launch.app, kind="asgi")}
    with pytest.raises(NotTrusted):
        check_bundle(head, replace(launch, **change))  # type: ignore[arg-type]


def test_requirements_for_another_python_are_told_before_anything_waits() -> None:
    own = owned({"code": CODE, "requirements": b"wheels"}, python="3.2")
    with pytest.raises(WrongUse, match=r"Python 3\.2"):
        check_bundle(parse_bundle_head(own.content), parse_launch(own.launch))
