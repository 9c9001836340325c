"""Build the measured image: a kernel image, and a read-only root under dm-verity with cloister and its engine inside.

    python packaging/image/build.py         (the venv's own python, as root; `make image` does this)

1. Fetch mkosi from Debian trixie, with this machine's own apt: from its mirror, and checked by Debian's keys.
2. Fetch the wheels of requirements/server.txt for the image's Python, each checked by its hash; build the engine for
   x86-64-v3 (tools/build_engine.py). Both are kept.
3. Lay out the tree: of cloister the rooms that run inside an enclave, the wheels unpacked, nothing else.
4. Run mkosi. Its tools and packages are kept: the first time takes minutes, then it is half a minute.
5. Hold the packages in the image against the lock beside this file (`--packages lock` writes it anew), and say what came out:

    build/image/cloister.efi    the kernel image: what `cloister image predict` reads
    build/image/cloister.raw    the disk: this kernel image, the root, and the root's hashes
    build/image/cloister.json   their digests, the root's hash, and every package's version

The same sources and packages give the same bytes.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "packaging" / "image"
LOCK = HERE / "packages.json"
REQUIREMENTS = ROOT / "requirements" / "server.txt"
PACKAGE = ROOT / "src" / "cloister"

RELEASE = "trixie"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PYTHON = "3.13"
PLATFORMS = ("linux_x86_64", "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64")
NEWEST_GLIBC = 41
"""trixie's: 2.41."""

ROOMS = ("__init__.py", "py.typed", "errors.py", "patience.py", "timely.py", "evidence", "verify", "channel", "enclave")
"""All of cloister that runs inside."""

INSIDE = Path("usr/lib/cloister")
ARTIFACTS = ("cloister.efi", "cloister.raw")


class BuildFailed(Exception):  # noqa: N818 - as in tools/build_engine.py
    """What went wrong, and the end of the failed command's output."""


@dataclass(slots=True)
class Report:
    """Progress on stderr, each line with the seconds since the start."""

    started: float = field(default_factory=time.monotonic)

    def line(self, text: str) -> None:
        sys.stderr.write(f"image: {time.monotonic() - self.started:4.0f} s  {text}\n")
        sys.stderr.flush()


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
) -> str:
    """To its end, quietly; `log` keeps all that it printed. Raises: BuildFailed with the end of that."""
    words = [str(word) for word in command]
    whole = {**os.environ, **(env or {})}
    done = subprocess.run(
        words, env=whole, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if log is not None:
        log.write_text(done.stdout)
    if done.returncode:
        raise BuildFailed(f"{Path(words[0]).name} failed ({done.returncode}):\n{done.stdout[-4000:]}")
    return done.stdout


# Debian's packages


def own_mirror(sources: Path = Path("/etc/apt")) -> str:
    """The mirror of Debian that this machine's apt uses. Raises: BuildFailed."""
    for path in sorted([*sources.glob("sources.list"), *sources.glob("sources.list.d/*")]):
        if path.suffix in (".list", ".sources"):
            text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
            found = re.search(r"(?:^URIs:|^deb(?: \[[^]]*\])?)\s+(\S+/debian/?)(?:\s|$)", text, re.MULTILINE)
            if found:
                return found[1].rstrip("/")
    raise BuildFailed("apt's sources name no mirror of Debian: --mirror URL")


def sources(mirror: str) -> str:
    """In apt's own format: the release, its updates and its security updates, signed by Debian."""
    before, _, after = mirror.rpartition("/debian")
    security = f"{before}/debian-security{after}"
    suites = {mirror: f"{RELEASE} {RELEASE}-updates", security: f"{RELEASE}-security"}
    return "\n".join(
        f"Types: deb\nURIs: {uri}\nSuites: {names}\nComponents: main\nSigned-By: {KEYRING}\n"
        for uri, names in suites.items()
    )


def apt(folder: Path, mirror: str) -> list[str]:
    """An apt of its own below `folder`: another release than this machine's, and none of this machine's state."""
    for name in ("lists/partial", "archives/partial", "etc/sources.list.d", "etc/preferences.d"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "etc/sources.list.d/image.sources").write_text(sources(mirror))
    (folder / "status").touch()
    settings = {
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": folder / "etc/sources.list.d",
        "Dir::Etc::PreferencesParts": folder / "etc/preferences.d",
        "Dir::State::Lists": folder / "lists",
        "Dir::State::Status": folder / "status",
        "Dir::Cache": folder,
        "APT::Sandbox::User": "root",
        "APT::Architecture": "amd64",
        "Acquire::Languages": "none",
    }
    return ["apt-get", "-q", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]


def provide_mkosi(cache: Path, mirror: str, report: Report) -> Path:
    """The folder that holds the module `mkosi`."""
    unpacked = cache / "mkosi"
    if not (unpacked / "mkosi").is_dir():
        report.line("fetching mkosi")
        folder = cache / "apt"
        command = apt(folder, mirror)
        run([*command, "update"])
        for left in folder.glob("mkosi_*.deb"):
            left.unlink()
        run([*command, "download", "mkosi"], cwd=folder)
        (package,) = folder.glob("mkosi_*.deb")
        staged = cache / "mkosi.unpacking"
        shutil.rmtree(staged, ignore_errors=True)
        run(["dpkg-deb", "-x", package, staged])
        (module,) = staged.rglob("mkosi/__main__.py")
        module.parent.parent.rename(unpacked)
    return unpacked


# The tree


def provide_wheels(cache: Path, report: Report) -> Path:
    """The folder of all that the lock names, for the image's Python. Named by the lock's content."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + PYTHON.encode()).hexdigest()[:20]
    folder = cache / f"wheels-{digest}"
    if not folder.is_dir():
        report.line("fetching wheels")
        staged = cache / "wheels.fetching"
        shutil.rmtree(staged, ignore_errors=True)
        names = [*PLATFORMS, *(f"manylinux_2_{minor}_x86_64" for minor in range(5, NEWEST_GLIBC + 1))]
        platforms = [word for name in names for word in ("--platform", name)]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--only-binary", ":all:", "--implementation", "cp"]
        run([*command, "--python-version", PYTHON, *platforms, "--dest", str(staged), "-r", str(REQUIREMENTS)])
        staged.rename(folder)
    return folder


def provide_engine(cache: Path, report: Report) -> Path:
    """The engine's wheel."""
    report.line("the engine, for x86-64-v3 (minutes, once)")
    folder = cache / "engine"
    shutil.rmtree(folder, ignore_errors=True)
    tool = ROOT / "tools" / "build_engine.py"
    run([sys.executable, str(tool), "--variant", "x86-64-v3", "--wheel", str(folder)])
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack_wheel(wheel: Path, target: Path) -> None:
    """Its modules and its metadata; no scripts, since nobody is there to call them."""
    with zipfile.ZipFile(wheel) as packed:
        for member in packed.infolist():
            name = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", member.filename)
            if member.is_dir() or re.match(r"[^/]+\.data/", name):
                continue
            path = target / name
            if not path.resolve().is_relative_to(target.resolve()):
                raise BuildFailed(f"{wheel.name} would write outside of its folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(packed.read(member))


def lay_out(target: Path, wheels: Sequence[Path]) -> None:
    """Everything of ours, as it will lie in the image: owned by root, writable by nobody else, one time for all."""
    shutil.rmtree(target, ignore_errors=True)
    inside = target / INSIDE
    inside.mkdir(parents=True)
    for wheel in sorted(wheels):
        unpack_wheel(wheel, inside)
    (inside / "cloister").mkdir()
    for name in ROOMS:
        source, copy = PACKAGE / name, inside / "cloister" / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copyfile(source, copy)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if stat.S_ISDIR(path.stat().st_mode) else 0o644)


# mkosi


def mkosi_command(cache: Path, config: Path, output: Path, mirror: str) -> list[str]:
    """One run of it, with packages from `mirror` alone."""
    sandbox = cache / "sandbox"
    listed = sandbox / "etc/apt/sources.list.d/mkosi.sources"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text(sources(mirror))
    for name in ("output", "cache", "packages", "workspace"):
        (cache / name).mkdir(exist_ok=True)
    return [
        *(sys.executable, "-m", "mkosi", "--directory", str(config), "--force"),
        *("--mirror", mirror, "--sandbox-tree", str(sandbox)),
        *("--output-dir", str(output), "--cache-dir", str(cache / "cache")),
        *("--package-cache-dir", str(cache / "packages"), "--workspace-dir", str(cache / "workspace")),
    ]


def provide_tools(cache: Path, mkosi: Path, mirror: str, report: Report) -> Path:
    """The tree of tools, from the same release. Named by what is in it; made anew where that changed."""
    config = HERE / "tools"
    folder = cache / f"tools-{hashlib.sha256((config / 'mkosi.conf').read_bytes()).hexdigest()[:20]}"
    if not (folder / "tools").is_dir():
        report.line("the tools to build with (minutes, once)")
        shutil.rmtree(folder, ignore_errors=True)
        staged = cache / "tools.making"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        command = [*mkosi_command(cache, config, staged, mirror), "build"]
        run(command, env={"PYTHONPATH": str(mkosi)}, log=cache / "tools.log")
        staged.rename(folder)
    return folder / "tools"


def packages(manifest: Path) -> dict[str, str]:
    """Name -> version of all that was installed."""
    listed = json.loads(manifest.read_text())["packages"]
    return {package["name"]: package["version"] for package in sorted(listed, key=lambda one: one["name"])}


def differences(locked: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*locked, *found}):
        if locked.get(name) != found.get(name):
            yield f"{name}: {locked.get(name, 'not there')} -> {found.get(name, 'not there')}"


Packages: TypeAlias = Literal["as-locked", "lock", "any"]


def check_lock(found: Mapping[str, str], how: Packages, report: Report) -> None:
    """Raises: BuildFailed when the image holds other versions than are locked, and they were to be as locked."""
    if how == "lock":
        LOCK.write_text(json.dumps(found, indent=1) + "\n")
    locked = json.loads(LOCK.read_text())
    changed = list(differences(locked, found))
    if changed and how == "as-locked":
        raise BuildFailed(
            "\n  ".join(["other packages than are locked; after a look at them: --packages lock", *changed])
        )
    for line in changed:
        report.line(f"not as locked: {line}")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def root_hash(kernel_image: Path) -> str:
    """From the command line in it."""
    found = re.search(rb"roothash=([0-9a-f]{64})", kernel_image.read_bytes())
    if found is None:
        raise BuildFailed("the kernel image names no root hash")
    return found[1].decode()


def build(cache: Path, output: Path, mirror: str, packages_are: Packages, *, engine: bool, report: Report) -> None:
    if os.geteuid() != 0:
        raise BuildFailed("mkosi makes file systems with other owners than you: run this as root")
    cache.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    mkosi = provide_mkosi(cache, mirror, report)
    wheels = [*provide_wheels(cache, report).glob("*.whl"), *([provide_engine(cache, report)] if engine else [])]
    tree = cache / "tree"
    lay_out(tree, wheels)
    tools = provide_tools(cache, mkosi, mirror, report)
    report.line("mkosi")
    made = cache / "output"
    command = [
        *mkosi_command(cache, HERE, made, mirror),
        "--tools-tree",
        str(tools),
        "--extra-tree",
        str(tree),
        "build",
    ]
    run(command, env={"PYTHONPATH": str(mkosi)}, log=cache / "mkosi.log")
    found = packages(made / "cloister.manifest")
    check_lock(found, packages_are, report)
    for name in ARTIFACTS:
        shutil.copyfile(made / name, output / name)
    facts = {name: f"sha256:{digest(output / name)}" for name in ARTIFACTS}
    facts["root"] = f"verity:{root_hash(output / ARTIFACTS[0])}"
    (output / "cloister.json").write_text(json.dumps({**facts, "packages": found}, indent=1) + "\n")
    for name, value in facts.items():
        report.line(f"{name:13} {value}")


def cache_root() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "cloister" / "image"


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the measured image.")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "image", metavar="DIR")
    parser.add_argument("--mirror", default="", metavar="URL", help="of Debian; absent: the one that apt uses here")
    parser.add_argument("--no-engine", action="store_true", help="for apps without a model: leave llama.cpp out")
    parser.add_argument(
        "--packages",
        choices=get_args(Packages),
        default="as-locked",
        help="their versions: as locked, or what the mirror has, written down or not",
    )
    given = parser.parse_args()
    report = Report()
    try:
        mirror = given.mirror or own_mirror()
        build(cache_root(), given.output, mirror, given.packages, engine=not given.no_engine, report=report)
    except (BuildFailed, OSError, subprocess.CalledProcessError) as error:
        report.line(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
