"""Build llama.cpp and install its low-level Python bindings, with no compiler on the machine.

    python tools/build_engine.py            (the venv's own python; `make setup` does this)
    python tools/build_engine.py --variant x86-64-v3 --wheel DIR        (for the measured image: built, not installed)

1. Read what is wanted from requirements/engine.txt: every file is locked by its hash.
2. Name the result by everything that shapes it: source, toolchain, flags, C library, CPU features. A build for one CPU
   dies on another with an illegal instruction, so a result is used only where its name comes out the same. The variant
   `x86-64-v3` is for any processor since 2013 (AVX2, FMA, F16C, BMI2) and any glibc since 2.36; its name says nothing of
   this machine, and its bytes shall not depend on it.
3. When the cache has no such result: fetch source and toolchain (zig's clang, cmake, ninja) with pip into a temporary
   folder, patch the source (tools/engine.patch), compile, pack libraries and bindings into one wheel, move it into the cache, drop the rest.
   A reader of memory (tools/membw.c) is compiled and packed with them, for `cloister bench`: not named like a library,
   so that it is never measured as a part of the engine.
4. Install the wheel here, unless it is installed already. Without a change this takes well under a second, offline.

The wheel holds the thin ctypes layer of llama-cpp-python alone (`llama_cpp.llama_cpp`), not its high-level classes, so
that nothing of them (nor of their dependencies) runs inside the enclave.
"""

import argparse
import base64
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "engine.txt"
SOURCE = "llama-cpp-python"
TOOLS = ("cmake", "ninja", "ziglang")
BINDINGS = ("_ctypes_extensions.py", "llama_cpp.py")
LIBRARIES = ("libggml-base.so", "libggml-cpu.so", "libggml.so", "libllama.so")
PATCH = ROOT / "tools" / "engine.patch"
READER_SOURCE = ROOT / "tools" / "membw.c"
READER = "membw.so"
READER_FLAGS = ("--target=native", "-O3", "-g0", "-fPIC", "-shared", "-s", "-Wall", "-Wextra", "-Werror")
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    # zig builds its C++ library (a minute on one core) for each combination of flags that it first links with. These
    # keep it to one, beside the compiling: the same flags in every call, and cmake's own trials compile but never link
    # (a target of their own makes its first look at the compiler do so, too).
    "-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY",
    "-DCMAKE_C_COMPILER_TARGET=native",
    "-DCMAKE_CXX_COMPILER_TARGET=native",
    "-DCMAKE_C_FLAGS=-O3 -g0 -fPIC",
    "-DCMAKE_CXX_FLAGS=-O3 -g0 -fPIC",
    "-DCMAKE_SHARED_LINKER_FLAGS=-s",
    "-DCMAKE_EXE_LINKER_FLAGS=-s",
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
    "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",
    "-DGGML_NATIVE=ON",
    "-DGGML_OPENMP=OFF",  # its busy waiting costs more than it gains as soon as anything else runs
    "-DGGML_CCACHE=OFF",
    "-DGGML_ALL_WARNINGS=OFF",
    "-DLLAMA_ALL_WARNINGS=OFF",
    "-DLLAMA_BUILD_COMMON=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
NATIVE, PORTABLE = "native", "x86-64-v3"
PORTABLE_TARGET = "x86_64-linux-gnu.2.36"
PORTABLE_CPU = "-march=x86_64_v3"
PORTABLE_SETS = ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2")
RECIPE = "2"
"""Raise this when the steps below change what comes out."""


class BuildFailed(Exception):
    """What went wrong, and the end of the failed command's output."""


@dataclass(frozen=True, slots=True)
class Locked:
    """One `name==version` of the lock with its hashes, as the lock spells them."""

    name: str
    version: str
    hashes: tuple[str, ...]

    def requirement(self) -> str:
        return " ".join((f"{self.name}=={self.version}", *(f"--hash={h}" for h in self.hashes)))


def read_lock(text: str) -> dict[str, Locked]:
    """The packages of a pip-compile lock file by name. Raises: BuildFailed when one of ours is absent or has no hash."""
    found = {}
    for entry in re.split(r"\n(?=\S)", text.replace("\\\n", " ")):
        match = re.match(r"([A-Za-z0-9._-]+)==(\S+)", entry)
        if match:
            hashes = tuple(re.findall(r"--hash=(sha256:[0-9a-f]{64})", entry))
            found[match[1].lower()] = Locked(match[1], match[2], hashes)
    for name in (SOURCE, *TOOLS):
        if name not in found or not found[name].hashes:
            raise BuildFailed(f"{LOCK.name} does not lock {name}")
    return found


def cpu_features(cpuinfo: str) -> str:
    """What `-march=native` looks at, from /proc/cpuinfo: the first processor's lines that name kind and features."""
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part", "isa")
    lines = []
    for line in cpuinfo.split("\n\n", maxsplit=1)[0].splitlines():
        name, _, value = line.partition(":")
        if name.strip() in wanted:
            lines.append(f"{name.strip()}: {' '.join(sorted(value.split()))}")
    return "\n".join(sorted(lines))


def portable(flag: str) -> str:
    """A flag of the native build, as the portable variant has it."""
    flag = flag.replace("-DGGML_NATIVE=ON", "-DGGML_NATIVE=OFF").replace("-O3 -g0", f"-O3 -g0 {PORTABLE_CPU}")
    return flag.replace("TARGET=native", f"TARGET={PORTABLE_TARGET}").replace(
        "--target=native", f"--target={PORTABLE_TARGET}"
    )


def flags_of(variant: str) -> tuple[str, ...]:
    """cmake's."""
    if variant == NATIVE:
        return FLAGS
    return (*map(portable, FLAGS), *(f"-DGGML_{name}=ON" for name in PORTABLE_SETS))


def reader_flags_of(variant: str) -> tuple[str, ...]:
    return READER_FLAGS if variant == NATIVE else (*map(portable, READER_FLAGS), PORTABLE_CPU)


def build_key(locked: dict[str, Locked], cpuinfo: str, variant: str = NATIVE) -> str:
    """A name for the result: equal only where source, compiler, flags and, of the native one, C library and CPU are."""
    here = (*platform.libc_ver(), cpu_features(cpuinfo)) if variant == NATIVE else (variant,)
    parts = [RECIPE, *flags_of(variant), platform.machine(), *here, *BINDINGS, *LIBRARIES]
    parts += [locked[name].requirement() for name in (SOURCE, *TOOLS)]
    parts += [PATCH.read_text(), READER_SOURCE.read_text(), READER, *reader_flags_of(variant)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "cloister" / "engine"  # noqa: PTH117


class Report:
    """Progress on stderr: one moving line on a terminal, a plain line every tenth elsewhere."""

    def __init__(self) -> None:
        self.tty = sys.stderr.isatty()
        self.started = time.monotonic()
        self.shown = -1

    def line(self, text: str) -> None:
        self._end_moving()
        print(f"engine: {text}", file=sys.stderr, flush=True)

    def share(self, done: int, total: int) -> None:
        percent = 100 * done // total
        if self.tty and percent != self.shown:
            seconds = time.monotonic() - self.started
            print(f"\rengine: compiling {percent:3d} % ({seconds:.0f} s)", end="", file=sys.stderr, flush=True)
            self.shown = percent
        elif not self.tty and percent // 10 > self.shown // 10:
            print(f"engine: compiling {percent} %", file=sys.stderr, flush=True)
            self.shown = percent

    def _end_moving(self) -> None:
        if self.tty and self.shown >= 0:
            print(file=sys.stderr)
        self.shown = -1


def run(command: list[str], *, env: dict[str, str] | None = None) -> str:
    """Run to the end, quietly. Raises: BuildFailed with the end of what it printed."""
    done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise BuildFailed(f"{Path(command[0]).name} failed ({done.returncode}):\n{done.stdout[-4000:]}")
    return done.stdout


STUB_BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(directory, settings=None):
    info = pathlib.Path(directory, "source.dist-info")
    info.mkdir()
    info.joinpath("METADATA").write_bytes(pathlib.Path("PKG-INFO").read_bytes())
    return info.name
"""


def fetch(locked: dict[str, Locked], folder: Path) -> None:
    """Source and toolchain, downloaded by pip from whatever index the user has configured, checked by hash.

    pip asks even a source it merely downloads for its metadata, and would run an unlocked build backend from the
    network for that. A backend of three lines in its place answers from the archive's own PKG-INFO.
    """
    backend = folder / "backend" / "scikit_build_core"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build.py").write_text(STUB_BACKEND)
    wanted = folder / "wanted.txt"
    wanted.write_text("".join(locked[name].requirement() + "\n" for name in (SOURCE, *TOOLS)))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    pip += ["--require-hashes", "--no-build-isolation", "--no-binary", SOURCE, "--dest", str(folder)]
    run([*pip, "--requirement", str(wanted)], env={**os.environ, "PYTHONPATH": str(backend.parent)})


def unpack(folder: Path) -> tuple[Path, Path]:
    """Unpack what `fetch` left in `folder`; returns the source's folder and the toolchain's. Contents are hash-locked."""
    source, toolchain = folder / "source", folder / "toolchain"
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):  # not in 3.11.2, Debian 12's own
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(source)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            for member in packed.infolist():
                path = packed.extract(member, toolchain)
                if member.external_attr >> 16 & 0o111 and not member.is_dir():
                    Path(path).chmod(0o755)
        wheel.unlink()
    archive.unlink()
    (inner,) = source.iterdir()
    return inner, toolchain


def patched(original: str, hunks: str) -> str:
    """A text changed as a unified diff's hunks say, each exactly at its line. Raises: BuildFailed where it says other."""
    lines, out, at = original.splitlines(keepends=True), list[str](), 0
    for hunk in re.split(r"(?m)^@@ ", hunks)[1:]:
        head, _, body = hunk.partition("\n")
        start = int(head.split(",", 1)[0].removeprefix("-")) - 1
        out += lines[at:start]
        at = start
        for line in body.splitlines(keepends=True):
            if line[0] != "+":
                if at >= len(lines) or lines[at] != line[1:]:
                    raise BuildFailed(
                        f"{PATCH.name} is for another version of llama.cpp: line {at + 1} is not as it says"
                    )
                at += 1
            if line[0] != "-":
                out.append(line[1:])
    return "".join(out + lines[at:])


def apply_patch(text: str, source: Path) -> None:
    """Change llama.cpp's files as `text` says (docs/adr/0014). Raises: BuildFailed."""
    for part in re.split(r"(?m)^--- a/", text)[1:]:
        name, _, hunks = part.partition("\n")
        path = source / "vendor/llama.cpp" / name
        path.write_text(patched(path.read_text(), hunks.partition("\n")[2]))


def script(path: Path, command: str) -> str:
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)
    return str(path)


def executable(toolchain: Path, name: str) -> str:
    """A program in the unpacked wheels, wherever its wheel keeps it."""
    for path in sorted(toolchain.rglob(name)):
        if path.is_file() and os.access(path, os.X_OK) and path.parent.name in ("bin", "scripts"):
            return str(path)
    raise BuildFailed(f"the toolchain has no {name}")


def environment(source: Path, build: Path) -> dict[str, str]:
    """What the compilers see: nobody else's flags, and no cache but the build's own."""
    env = {k: v for k, v in os.environ.items() if k not in ("CFLAGS", "CXXFLAGS", "LDFLAGS", "CPPFLAGS", "CC", "CXX")}
    env |= {"ZIG_GLOBAL_CACHE_DIR": str(build / "zig"), "ZIG_LOCAL_CACHE_DIR": str(build / "zig")}
    return env | {"GIT_CEILING_DIRECTORIES": str(source.parent), "NINJA_STATUS": "[%f/%t] "}


def configure_and_build(
    source: Path, toolchain: Path, build: Path, report: Report, flags: Sequence[str], targets: Sequence[str]
) -> Path:
    """llama.cpp with these flags: `targets`, or all when there are none. Returns the folder that holds what was built."""
    build.mkdir()
    zig = f"'{toolchain}/ziglang/zig'"
    map_paths = f"-ffile-prefix-map='{source}'=llama"  # no path of this machine in the libraries: their digest is shown
    tools = {
        "CMAKE_C_COMPILER": script(build / "cc", f"{zig} cc {map_paths}"),
        "CMAKE_CXX_COMPILER": script(build / "c++", f"{zig} c++ {map_paths}"),
        "CMAKE_AR": script(build / "ar", f"{zig} ar"),
        "CMAKE_RANLIB": script(build / "ranlib", f"{zig} ranlib"),
        "CMAKE_MAKE_PROGRAM": executable(toolchain, "ninja"),
    }
    cmake, env, out = executable(toolchain, "cmake"), environment(source, build), build / "out"
    report.line("configuring")
    defines = [f"-D{name}={value}" for name, value in tools.items()]
    run([cmake, "-S", str(source / "vendor/llama.cpp"), "-B", str(out), "-G", "Ninja", *defines, *flags], env=env)
    tail: list[str] = []
    with subprocess.Popen(
        [tools["CMAKE_MAKE_PROGRAM"], "-C", str(out), *targets],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as ninja:
        for line in ninja.stdout or ():
            tail = [*tail[-60:], line]
            if step := re.match(r"\[(\d+)/(\d+)\] ", line):
                report.share(int(step[1]), int(step[2]))
    if ninja.returncode:
        raise BuildFailed(f"the compiler failed ({ninja.returncode}):\n{''.join(tail)[-4000:]}")
    return out / "bin"


def compile_libraries(source: Path, toolchain: Path, build: Path, report: Report, variant: str) -> Path:
    """Configure and build; returns the folder that holds the libraries and the reader."""
    built = configure_and_build(source, toolchain, build, report, flags_of(variant), ())
    reader = [str(build / "cc"), *reader_flags_of(variant), "-o", str(built / READER), str(READER_SOURCE)]
    run(reader, env=environment(source, build))
    return built


def pack(source: Path, libraries: Path, version: str, key: str, folder: Path) -> Path:
    """One wheel of bindings and libraries, the same bytes from the same input."""
    info = f"llama_cpp_python-{version}.dist-info"
    machine = platform.machine()
    tag = f"py3-none-linux_{machine}"
    metadata = f"Metadata-Version: 2.1\nName: {SOURCE}\nVersion: {version}\nLicense: MIT\n"
    metadata += "Summary: llama.cpp and its low-level bindings, built here\nRequires-Dist: typing-extensions>=4.5.0\n"
    files = {
        "llama_cpp/__init__.py": b"",
        **{f"llama_cpp/{name}": (source / "llama_cpp" / name).read_bytes() for name in BINDINGS},
        **{f"llama_cpp/lib/{name}": (libraries / name).read_bytes() for name in (*LIBRARIES, READER)},
        "llama_cpp/lib/build.json": json.dumps({"key": key, "version": version}).encode(),
        f"{info}/licenses/LICENSE.md": (source / "LICENSE.md").read_bytes(),
        f"{info}/licenses/llama.cpp/LICENSE": (source / "vendor/llama.cpp/LICENSE").read_bytes(),
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: cloister\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
    }
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    wheel = folder / f"llama_cpp_python-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            packed.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return wheel


@contextlib.contextmanager
def exclusive(path: Path, report: Report) -> Iterator[None]:
    """Hold a lock file: of two builds at once, the second waits and then finds the first one's result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.line("another build runs; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cached_wheel(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.whl"))), None)


def provide_wheel(locked: dict[str, Locked], key: str, report: Report, variant: str = NATIVE) -> Path:
    """The wheel from the cache, built first when it is not there."""
    root = cache_root()
    if wheel := cached_wheel(root / key):
        return wheel
    with exclusive(root / "lock", report):
        if wheel := cached_wheel(root / key):
            return wheel
        for left in root.glob("building-*"):  # of builds that were killed: we hold the lock, so nobody uses them
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=root) as name:
            folder = Path(name)
            report.line("fetching llama.cpp and a compiler (about 220 MB, kept only while building)")
            fetch(locked, folder)
            source, toolchain = unpack(folder)
            apply_patch(PATCH.read_text(), source)
            libraries = compile_libraries(source, toolchain, folder / "build", report, variant)
            done = folder / "done"
            done.mkdir()
            pack(source, libraries, locked[SOURCE].version, key, done)
            done.rename(root / key)
        report.line(f"built in {time.monotonic() - report.started:.0f} s")
    wheel = cached_wheel(root / key)
    if wheel is None:
        raise BuildFailed("the build left no wheel")
    return wheel


def installed_key() -> str | None:
    """The key of the engine installed in this environment, if its files are all there."""
    try:
        files = importlib.metadata.files(SOURCE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    if not all(Path(str(file.locate())).exists() for file in files if "__pycache__" not in str(file)):
        return None
    for file in files:
        if file.name == "build.json":
            return str(json.loads(file.read_text()).get("key"))
    return None


def install(wheel: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--force-reinstall", str(wheel)])


def main() -> int:
    parser = argparse.ArgumentParser(description="Build and install the engine.")
    parser.add_argument("--variant", choices=(NATIVE, PORTABLE), default=NATIVE, help="for which processors")
    parser.add_argument("--wheel", type=Path, metavar="DIR", help="leave the wheel there, and install nothing")
    given = parser.parse_args()
    if given.variant != NATIVE and given.wheel is None:
        parser.error("only the native variant is installed here: --wheel DIR")
    report = Report()
    try:
        locked = read_lock(LOCK.read_text())
        key = build_key(locked, Path("/proc/cpuinfo").read_text(), given.variant)
        if given.wheel is not None:
            given.wheel.mkdir(parents=True, exist_ok=True)
            shutil.copy(provide_wheel(locked, key, report, given.variant), given.wheel)
            return 0
        if installed_key() == key:
            report.line("up to date")
            return 0
        install(provide_wheel(locked, key, report))
    except (BuildFailed, OSError) as error:
        report.line(str(error))
        return 1
    report.line(f"installed ({time.monotonic() - report.started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
