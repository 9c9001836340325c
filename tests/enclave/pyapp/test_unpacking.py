import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from tests.enclave.pyapp.archives import tar, wheel

from cloister.enclave.pyapp.unpacking import unpack_code, unpack_wheels


def test_code_lands_where_it_belongs(tmp_path: Path) -> None:
    unpack_code(io.BytesIO(tar({"main.py": "1", "pages/a/index.html": "<p>"})), tmp_path)
    assert (tmp_path / "main.py").read_text() == "1"
    assert (tmp_path / "pages/a/index.html").read_text() == "<p>"


@pytest.mark.parametrize("name", ["../out.py", "/out.py", "a/../../out.py", "..", "a\\b"])
def test_nothing_leaves_its_folder(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(ValueError):
        unpack_code(io.BytesIO(tar({name: "1"})), inside)
    with pytest.raises(ValueError):
        unpack_wheels(io.BytesIO(tar({"a.whl": wheel({name.replace("\\", "/../../"): "1"})})), inside)
    assert sorted(tmp_path.iterdir()) == [inside]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_only_files_are_unpacked(tmp_path: Path, kind: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("link")
        entry.type, entry.linkname = kind, "/etc/passwd"
        archive.addfile(entry)
    out.seek(0)
    with pytest.raises(ValueError):
        unpack_code(out, tmp_path)


def test_a_wheels_modules_are_installed_and_its_scripts_are_not(tmp_path: Path) -> None:
    content = wheel(
        {
            "pkg/__init__.py": "1",
            "pkg-1.dist-info/METADATA": "Name: pkg",
            "pkg-1.data/purelib/pure.py": "2",
            "pkg-1.data/platlib/plat.py": "3",
            "pkg-1.data/scripts/run": "4",
        }
    )
    unpack_wheels(io.BytesIO(tar({"pkg-1-py3-none-any.whl": content})), tmp_path)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["pkg-1.dist-info/METADATA", "pkg/__init__.py", "plat.py", "pure.py"]


def test_what_is_no_wheel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        unpack_wheels(io.BytesIO(tar({"a.tar.gz": b""})), tmp_path)
    with pytest.raises(zipfile.BadZipFile):
        unpack_wheels(io.BytesIO(tar({"a.whl": b"no zip"})), tmp_path)
