"""The measured image's recipe: what goes into it, from where, and under which names."""

import importlib.util
import json
import re
import stat
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

from cloister.owner import requirements
from cloister.sim.measure import ROOMS

ROOT = Path(__file__).parents[1]
HERE = ROOT / "packaging" / "image"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


build = load(HERE / "build.py")
engine = load(ROOT / "tools" / "build_engine.py")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sources.list", "# deb http://old.example/debian trixie main\ndeb http://a.example/debian bookworm main\n"),
        ("sources.list", "deb [signed-by=/k] http://a.example/debian/ bookworm main\n"),
        (
            "sources.list.d/debian.sources",
            "Types: deb\n# URIs: http://b.example/debian\nURIs: http://a.example/debian\n",
        ),
    ],
)
def test_debian_comes_from_this_machines_own_mirror(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/another.list").write_text("deb https://packages.example/apt stable main\n")
    (tmp_path / "sources.list.d/security.sources").write_text("URIs: http://a.example/debian-security\n")
    with pytest.raises(build.BuildFailed, match="--mirror"):
        build.own_mirror(tmp_path)
    (tmp_path / name).write_text(text)
    assert build.own_mirror(tmp_path) == "http://a.example/debian"


def test_the_recipe_names_no_mirror_and_debians_keys_are_asked_for() -> None:
    for path in [path for path in HERE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]:
        assert "://" not in path.read_text(), path
    assert "Signed-By: /usr/share/keyrings/" in build.sources("http://a.example/debian")


@pytest.mark.parametrize(
    ("mirror", "security"),
    [
        ("http://debian.example/debian", "http://debian.example/debian-security"),
        (
            "http://a.example/archive/debian/20261101T000000Z",
            "http://a.example/archive/debian-security/20261101T000000Z",
        ),
    ],
)
def test_security_updates_come_from_beside_the_release(mirror: str, security: str) -> None:
    assert re.findall(r"URIs: (\S+)", build.sources(mirror)) == [mirror, security]


def wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name in names:
            packed.writestr(name, name)
    return path


def test_of_a_wheel_modules_are_taken_and_programs_left(tmp_path: Path) -> None:
    names = (
        "a/__init__.py",
        "a-1.dist-info/METADATA",
        "a-1.data/platlib/a/b.so",
        "a-1.data/scripts/a",
        "a-1.data/data/c",
    )
    build.unpack_wheel(wheel(tmp_path / "a.whl", *names), tmp_path / "to")
    found = {str(path.relative_to(tmp_path / "to")) for path in (tmp_path / "to").rglob("*") if path.is_file()}
    assert found == {"a/__init__.py", "a-1.dist-info/METADATA", "a/b.so"}


def test_a_wheel_that_would_write_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(build.BuildFailed, match="outside"):
        build.unpack_wheel(wheel(tmp_path / "a.whl", "../evil.py"), tmp_path / "to")
    assert not (tmp_path / "evil.py").exists()


def test_of_cloister_exactly_what_runs_inside_is_laid_out(tmp_path: Path) -> None:
    build.lay_out(tmp_path / "tree", [wheel(tmp_path / "a.whl", "a/__init__.py")])
    inside = tmp_path / "tree/usr/lib/cloister"
    assert {path.name for path in (inside / "cloister").iterdir()} == {"__init__.py", "py.typed", *ROOMS}
    assert (inside / "a/__init__.py").is_file()
    assert (inside / "cloister/enclave/machine.py").is_file()
    for path in (tmp_path / "tree").rglob("*"):
        assert path.name != "__pycache__"
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)


def test_another_package_than_is_locked_is_told() -> None:
    told = list(build.differences({"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"}))
    assert told == ["b: 1 -> 2", "c: 1 -> not there", "d: not there -> 1"]


def test_the_lock_holds_no_way_in() -> None:
    locked = json.loads((HERE / "packages.json").read_text())
    assert {"python3.13", "systemd", "tpm2-tools"} <= locked.keys()
    assert locked.keys() & {"openssh-server", "openssh-client", "cloud-init", "apt", "sudo", "curl", "gdb"} == set()
    assert [name for name in locked if "busybox" in name] == []


@pytest.mark.parametrize("recipe", ["mkosi.conf", "mkosi.images/initrd/mkosi.conf"])
def test_root_and_initrd_lose_their_shells_and_ask_for_none(recipe: str) -> None:
    given = (HERE / recipe).read_text()
    removed = set(settings(given, "RemoveFiles"))
    assert {f"/usr/bin/{name}" for name in ("bash", "dash", "rbash", "sh", "dpkg*", "apt*", "su")} <= removed
    asked = settings(given, "Packages")
    assert "systemd" in asked
    shells = r"(ba|da|z|k|mk|c|tc|fi)?sh|.*(busybox|openssh|dropbear).*"
    assert [name for name in asked if re.fullmatch(shells, name)] == []


def settings(recipe: str, name: str) -> list[str]:
    """The indented words of one setting, comments left out."""
    found = re.search(rf"^{name}=\n((?:[ \t]+.*\n)+)", recipe, re.MULTILINE)
    assert found is not None
    return [line.strip() for line in found[1].splitlines() if not line.strip().startswith("#")]


def test_the_host_cannot_add_to_what_is_measured() -> None:
    line = re.search(r"^KernelCommandLine=\n((?: +\S+\n)+)", (HERE / "mkosi.conf").read_text(), re.MULTILINE)
    assert line is not None
    words = line[1].split()
    assert {"systemd.import_credentials=no", "systemd.gpt_auto=no", "lockdown=integrity"} <= set(words)
    for unit in ("emergency", "rescue", "debug-shell"):
        assert {f"{where}systemd.mask={unit}.service" for where in ("", "rd.")} <= set(words)


def test_the_unit_starts_the_module_that_there_is_and_ends_the_machine_with_it() -> None:
    unit = (HERE / "tree/usr/lib/systemd/system/cloister.service").read_text()
    (module,) = re.findall(r"run_module\('([\w.]+)'", unit)
    assert importlib.util.find_spec(module) is not None
    assert "SuccessAction=poweroff" in unit
    assert "FailureAction=poweroff" in unit
    assert "sys.path.append('/usr/lib/cloister')" in unit


def test_the_portable_engine_is_named_by_no_machine() -> None:
    locked = engine.read_lock(engine.LOCK.read_text())
    cpus = ("flags : avx2", "flags : avx512f")
    assert len({engine.build_key(locked, cpu, engine.PORTABLE) for cpu in cpus}) == 1
    assert len({engine.build_key(locked, cpu) for cpu in cpus}) == 2
    assert engine.build_key(locked, cpus[0], engine.PORTABLE) != engine.build_key(locked, cpus[0])


def test_the_portable_engine_has_nothing_of_this_machine_in_its_flags() -> None:
    flags = (*engine.flags_of(engine.PORTABLE), *engine.reader_flags_of(engine.PORTABLE))
    assert [flag for flag in flags if "native" in flag.lower() and flag != "-DGGML_NATIVE=OFF"] == []
    assert "-DGGML_NATIVE=OFF" in flags
    assert "-DGGML_AVX2=ON" in flags
    assert engine.flags_of(engine.NATIVE) == engine.FLAGS


def test_what_the_recipe_puts_in_it_does_not_take_out_again() -> None:
    removed = re.findall(r"^ {8}(/\S+)$", (HERE / "mkosi.conf").read_text().split("RemoveFiles=")[1], re.MULTILINE)
    assert "/usr/bin/sh" in removed
    tree = HERE / "tree"
    for path in tree.rglob("*"):
        place = Path("/") / path.relative_to(tree)
        assert not [one for one in removed if fnmatch(str(place), one) or place.is_relative_to(one)], path


def test_ci_boots_it() -> None:
    assert "make test-app-image" in (ROOT / ".ci" / "run").read_text()


def test_owners_fetch_for_the_python_that_is_in_it() -> None:
    assert (requirements.IMAGE_PYTHON, requirements.NEWEST_GLIBC) == (build.PYTHON, build.NEWEST_GLIBC)
