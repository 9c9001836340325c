import hashlib
import zipfile
from pathlib import Path

import pytest
from tests.owner.wheels import build_wheel

from cloister.errors import MalformedApp, NotTrusted
from cloister.owner.requirements import HERE, fetched, target_of

LINUX = "manylinux_2_28_x86_64"
OTHER = "3.13" if HERE.python != "3.13" else "3.12"


def binary_wheel(index: Path, tag: str, requires: str = "") -> str:
    """Of a package `native`, for one Python and platform; its line in a lock."""
    path = index / f"native-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        about = f"Metadata-Version: 2.1\nName: native\nVersion: 1.0\n{requires}\nRequires-Dist: not-a-header\n"
        wheel.writestr("native-1.0.dist-info/METADATA", about)
        wheel.writestr("native-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        wheel.writestr("native-1.0.dist-info/RECORD", "")
    return f"native==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def tag_for(python: str) -> str:
    short = f"cp{python.replace('.', '')}"
    return f"{short}-{short}-{LINUX}"


def test_locked_packages_are_fetched_as_wheels(tmp_path: Path, index: Path) -> None:
    with fetched(tmp_path / "lock.txt") as wheels:
        ((name, path),) = wheels
        assert name.startswith("itsdangerous-")
        assert path.read_bytes() == (index / name).read_bytes()
    assert not path.exists()


def test_a_package_that_was_modified_is_refused(tmp_path: Path, index: Path) -> None:
    (wheel,) = index.iterdir()
    wheel.write_bytes(wheel.read_bytes() + b"more")
    with pytest.raises(NotTrusted, match="not the one that was locked"), fetched(tmp_path / "lock.txt"):
        pass


def test_a_lock_that_was_modified_is_refused(tmp_path: Path, index: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(lock.read_text().replace("sha256:", "sha256:00")[:-3] + "\n")
    with pytest.raises((NotTrusted, MalformedApp)), fetched(lock):
        pass


@pytest.mark.parametrize("content", ["itsdangerous\n", "itsdangerous==99 --hash=sha256:" + "0" * 64 + "\n"])
def test_requirements_without_hashes_or_that_are_nowhere_are_refused(tmp_path: Path, index: Path, content: str) -> None:
    lock = tmp_path / "other.txt"
    lock.write_text(content)
    with pytest.raises(MalformedApp), fetched(lock):
        pass


def test_a_dependency_that_the_lock_forgot_is_refused(tmp_path: Path, index: Path) -> None:
    lock = tmp_path / "lock.txt"
    wheel = build_wheel("jinja2", index)
    version = wheel.name.split("-")[1]
    lock.write_text(f"jinja2=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    with pytest.raises(MalformedApp), fetched(lock):
        pass


def test_a_lock_of_nothing_is_refused(tmp_path: Path, index: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("# nothing\n")
    with pytest.raises(MalformedApp), fetched(lock):
        pass


@pytest.mark.parametrize(
    ("platform", "python", "expected", "is_image"),
    [
        ("", "", HERE.python, False),
        ("sim", "", HERE.python, False),
        ("sgx", "", HERE.python, False),
        ("sim", "3.14", "3.14", False),
        *((platform, "", "3.13", True) for platform in ("tdx", "sev-snp", "vtpm", "azure-tdx", "azure-sev-snp")),
        ("tdx", "3.14", "3.14", True),
    ],
)
def test_a_platform_has_its_python_unless_the_owner_says_another(
    platform: str, python: str, expected: str, is_image: bool
) -> None:
    target = target_of(platform, python)
    assert (target.python, LINUX in target.tags) == (expected, is_image)


def test_wheels_are_the_targets_not_the_packagers(tmp_path: Path, index: Path) -> None:
    lock = tmp_path / "lock.txt"
    there, here = (binary_wheel(index, tag_for(python)) for python in (OTHER, HERE.python))
    lock.write_text(lock.read_text() + there.rstrip() + here.removeprefix("native==1.0"))
    for python in (OTHER, HERE.python):
        with fetched(lock, target_of("tdx", python)) as wheels:
            assert [name for name, _ in wheels][1] == f"native-1.0-{tag_for(python)}.whl"


@pytest.mark.parametrize("platform", ["tdx", "sim"])
def test_a_requirement_without_a_wheel_for_the_target_is_named(tmp_path: Path, index: Path, platform: str) -> None:
    lock = tmp_path / "lock.txt"
    tag = tag_for(HERE.python) if platform == "sim" else tag_for(OTHER).replace("x86_64", "aarch64")
    lock.write_text(lock.read_text() + binary_wheel(index, tag))
    wanted = f"native==1.0 has no wheel for Python {OTHER}"
    with pytest.raises(MalformedApp, match=wanted) as caught, fetched(lock, target_of(platform, OTHER)):
        pass
    assert ("python = " in caught.value.hint) == (platform == "sim")


def test_for_another_python_a_dependency_that_the_lock_forgot_is_refused_too(tmp_path: Path, index: Path) -> None:
    lock = tmp_path / "lock.txt"
    whole = lock.read_text()
    conditional = "Requires-Dist: tomli; python_version < '3.11'\nRequires-Dist: rich ; extra == 'more'\n"
    for requires, missing in (
        ("Requires-Dist: ItsDangerous (>=2)\n", ""),
        ("Requires-Dist: Mark_Safe>=1\n", "mark-safe"),
    ):
        lock.write_text(whole + binary_wheel(index, tag_for(OTHER), conditional + requires))
        if missing:
            with pytest.raises(MalformedApp, match=f"lacks {missing}, which native requires"):
                fetched(lock, target_of("tdx", OTHER)).__enter__()
        else:
            with fetched(lock, target_of("tdx", OTHER)) as wheels:
                assert len(wheels) == 2


def test_conditions_in_a_lock_are_not_judged_by_another_python(tmp_path: Path, index: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("# a; b\n" + lock.read_text().replace(" --hash", " ; python_version >= '3' --hash", 1))
    with fetched(lock) as wheels:
        assert len(wheels) == 1
    with pytest.raises(MalformedApp, match="lines with conditions"), fetched(lock, target_of("sim", OTHER)):
        pass
