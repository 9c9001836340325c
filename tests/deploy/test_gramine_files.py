"""Which files an enclave gets, and how they are laid out; that none is missing, test_gramine_start.py shows."""

import hashlib
import os
import sys
from pathlib import Path

import pytest

import cloister
from cloister.deploy import gramine_files
from cloister.deploy.gramine_files import collect, stage
from cloister.errors import WrongUse
from cloister.models.store import embedded_path


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    folder = tmp_path / "engine"
    folder.mkdir()
    for name in ("libllama.so", "libggml-cpu.so", "membw.so"):
        (folder / name).write_bytes(b"no library")
    return folder


def test_each_file_has_its_place_wherever_it_lies_here(engine: Path) -> None:
    code = {"cloister/__init__.py": Path(cloister.__file__), "numpy/core.py": Path("/elsewhere/numpy/core.py")}
    files = collect(code, engine, embedded_path("tiny"))
    assert files["/app/cloister/__init__.py"] == Path(cloister.__file__)
    assert files["/app/packages/numpy/core.py"] == Path("/elsewhere/numpy/core.py")
    assert files["/model.gguf"] == embedded_path("tiny")
    assert files["/python/bin/python3"] == Path(sys.executable).resolve()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert {f"/python/lib/{version}/{name}" for name in ("os.py", "asyncio/base_events.py")} <= files.keys()
    ours = {path for path in files if path.startswith("/app/packages/llama_cpp/lib/")}
    assert ours == {f"/app/packages/llama_cpp/lib/{name}" for name in ("libllama.so", "libggml-cpu.so")}


def test_the_libraries_are_those_that_the_loader_finds_but_the_c_librarys(engine: Path) -> None:
    libraries = {Path(path).name for path in collect({}, engine, embedded_path("tiny")) if path.startswith("/app/lib/")}
    assert {name.split(".")[0] for name in libraries} >= {"libz", "libssl", "libcrypto", "libffi"}  # lib-dynload's
    assert not {name.split(".")[0] for name in libraries} & {
        "libc",
        "libm",
        "libpthread",
        "ld-linux-x86-64",
        "linux-vdso",
    }


def test_without_ldd_it_says_so(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WrongUse, match="`ldd` is missing"):
        collect({}, engine, embedded_path("tiny"))
    (tmp_path / "ldd").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ldd").chmod(0o755)
    with pytest.raises(WrongUse, match="does not say"):
        collect({}, engine, embedded_path("tiny"))


def test_the_digests_are_of_what_lies_there(tmp_path: Path) -> None:
    source, model = tmp_path / "a.py", tmp_path / "m.gguf"
    source.write_text("print()")
    model.write_bytes(b"GGUF")
    digests = stage(tmp_path / "image", {"/app/b.py": source, "/model.gguf": model}, b"{}")
    root = tmp_path / "image" / "root"
    assert digests == {
        path: hashlib.sha256((root / path.lstrip("/")).read_bytes()).hexdigest()
        for path in ("/app/b.py", "/model.gguf")
    }
    assert (root / "launch.json").read_bytes() == b"{}"
    assert (root / "model.gguf").stat().st_ino == model.stat().st_ino, "a model is not copied where it can be linked"
    assert (root / "app" / "b.py").stat().st_ino != source.stat().st_ino, "code may be edited where it comes from"


def test_a_model_on_another_disk_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(*_: object) -> None:
        raise OSError

    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(os, "link", elsewhere)
    stage(tmp_path / "image", {"/model.gguf": tmp_path / "m.gguf"}, b"{}")
    assert (tmp_path / "image" / "root" / "model.gguf").read_bytes() == b"GGUF"


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongUse) as caught:
        stage(tmp_path / "image", {"/app/b.py": tmp_path / "gone.py"}, b"{}")
    assert caught.value.got == str(tmp_path / "gone.py")


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("libc.so.6", True),
        ("libm.so.6", True),
        ("ld-linux-x86-64.so.2", True),
        ("libnss_files.so.2", True),
        ("linux-vdso.so.1", True),
        ("libcrypto.so.3", False),
        ("libcrypt.so.1", False),
        ("libmagic.so.1", False),
        ("libstdc++.so.6", False),
        ("librtmp.so.1", False),
    ],
)
def test_the_c_librarys_own_parts_are_known(name: str, own: bool) -> None:
    assert (gramine_files._C_LIBRARY.fullmatch(name) is not None) == own
