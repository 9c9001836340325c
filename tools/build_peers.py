"""Build and fetch what `cloister bench peers` measures us against. Never part of `make setup`.

    python tools/build_peers.py [--only llama-server|ctransformers]

- llama-server: from the same locked source, toolchain and flags as our engine (`build_engine`), but in one piece: zig
  gives each shared library a C++ library of its own, and the server passes C++ objects between them. About six minutes
  on two cores.
- ctransformers (the original's stack): its wheel and what it needs, locked by hash in requirements/peers.txt, in an
  environment of its own.

Both go to ~/.cache/cloister/peers (or below $XDG_CACHE_HOME), and are made anew when source, flags or CPU differ.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import build_engine as engine

LOCK = engine.ROOT / "requirements" / "peers.txt"
SERVER_FLAGS = (  # after the engine's, whose place they take
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_COMMON=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # nothing from the network
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_CURL=OFF",
)
PEERS = ("llama-server", "ctransformers")


def root() -> Path:
    return engine.cache_root().parent / "peers"


def recorded(folder: Path) -> str:
    """The key that the peer in `folder` was made under; "" where there is none."""
    try:
        return str(json.loads((folder / "peer.json").read_text())["key"])
    except (OSError, ValueError, KeyError):
        return ""


def put(made: Path, name: str, key: str) -> None:
    """Record what it is, and move it to its place whole."""
    (made / "peer.json").write_text(json.dumps({"key": key}))
    place = root() / name
    shutil.rmtree(place, ignore_errors=True)
    made.rename(place)


def provide_server(report: engine.Report) -> None:
    locked = engine.read_lock(engine.LOCK.read_text())
    parts = (engine.build_key(locked, Path("/proc/cpuinfo").read_text()), *SERVER_FLAGS)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    if recorded(root() / "llama-server") == key:
        report.line("llama-server is up to date")
        return
    with tempfile.TemporaryDirectory(prefix="building-", dir=root()) as name:
        folder = Path(name)
        report.line("fetching llama.cpp and a compiler (about 220 MB, kept only while building)")
        engine.fetch(locked, folder)
        source, toolchain = engine.unpack(folder)
        flags = (*engine.FLAGS, *SERVER_FLAGS)
        built = engine.configure_and_build(source, toolchain, folder / "build", report, flags, ("llama-server",))
        program = built / "llama-server"
        engine.run([str(program), "--version"])  # what does not start here is not put there
        done = folder / "done"
        done.mkdir()
        shutil.copy2(program, done)
        put(done, "llama-server", key)


def provide_ctransformers(report: engine.Report) -> None:
    key = hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()[:20]
    place = root() / "ctransformers"
    if recorded(place) == key:
        report.line("ctransformers is up to date")
        return
    report.line("fetching ctransformers")
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)  # an environment does not move: it is made in its place, and recorded last
    pip = [str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    engine.run([*pip, "--require-hashes", "--only-binary", ":all:", "--requirement", str(LOCK)])
    (place / "peer.json").write_text(json.dumps({"key": key}))


def main() -> int:
    parser = argparse.ArgumentParser(description="Build and fetch the peers of `cloister bench peers`.")
    parser.add_argument("--only", choices=PEERS, help="one of them alone")
    only = parser.parse_args().only
    report = engine.Report()
    try:
        with engine.exclusive(root() / "lock", report):
            if only in (None, "ctransformers"):
                provide_ctransformers(report)
            if only in (None, "llama-server"):
                provide_server(report)
    except (engine.BuildFailed, OSError) as error:
        report.line(str(error))
        return 1
    report.line(f"the peers are in {root()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
