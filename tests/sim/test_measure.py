import hashlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

from cloister.errors import WrongUse
from cloister.evidence.manifest import manifest_digest
from cloister.sim import engine_digest, measure
from cloister.sim.measure import ROOMS, code_files, code_manifest


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A small enclave that imports one small distribution."""
    package = tmp_path / "cloister"
    for room in ROOMS:
        if not room.endswith(".py"):
            (package / room).mkdir(parents=True)
            (package / room / "__init__.py").write_text(f'"""{room}"""\n')
    (package / "__init__.py").write_text("")
    (package / "errors.py").write_text("import os\n")
    (package / "enclave" / "main.py").write_text("def start():\n    from idna.core import encode\n")
    (package / "enclave" / "table.json").write_bytes(b"{}")
    return package


def names(package: Path) -> set[str]:
    return set(code_files(package))


def own(package: Path) -> set[str]:
    return {name for name in names(package) if name.startswith("cloister/")}


def test_measures_the_rooms_of_the_enclave_and_what_they_import(package: Path) -> None:
    measured = names(package)
    assert {"cloister/__init__.py", "cloister/errors.py", "cloister/enclave/main.py", "idna/core.py"} <= measured
    assert "cloister/enclave/table.json" in measured
    assert not any(name.endswith((".pyc", "/RECORD", "/INSTALLER")) or ".." in name for name in measured)


def test_every_byte_of_our_own_counts(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.packages_distributions()
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: installed)  # or each turn takes 0.2 s
    before = code_manifest(package)
    seen = {before}
    for name in sorted(own(package)):
        path = package / name.removeprefix("cloister/")
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        seen.add(code_manifest(package))
        path.write_bytes(content)
    assert len(seen) == len(own(package)) + 1
    assert code_manifest(package) == before


def test_every_byte_of_a_dependency_counts(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "tinylib-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "tinylib").mkdir()
    (site / "tinylib" / "__init__.py").write_text("VALUE = 1\n")
    (site / "smalllib.py").write_text("VALUE = 1\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tinylib\nVersion: 1.0\n")
    listed = ["tinylib/__init__.py", "smalllib.py", "tinylib-1.0.dist-info/METADATA", "../../bin/tinylib"]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in listed))
    monkeypatch.syspath_prepend(str(site))
    (package / "enclave" / "more.py").write_text("import tinylib\n")
    seen = [code_manifest(package)]
    assert b"  smalllib.py\n" in seen[0]
    for name in ("tinylib/__init__.py", "smalllib.py", "tinylib/unlisted.py"):
        (site / name).write_text("VALUE = 2\n")
        seen.append(code_manifest(package))
    assert len(set(seen)) == 4


def test_files_outside_do_not_count(package: Path) -> None:
    before = code_manifest(package)
    (package / "cli").mkdir()
    (package / "cli" / "main.py").write_text("import rich\n")
    (package / "models").mkdir()
    (package / "models" / "store.py").write_text("import huggingface_hub\n")
    (package / "enclave" / "__pycache__").mkdir()
    (package / "enclave" / "__pycache__" / "main.cpython-311.pyc").write_bytes(b"x")
    assert code_manifest(package) == before


def test_a_new_file_counts(package: Path) -> None:
    before = code_manifest(package)
    (package / "enclave" / "extra.py").write_text("")
    assert code_manifest(package) != before


@pytest.mark.parametrize("name", ["main/__init__.pyc", "main/__init__.so", "extra.pyc"])
def test_what_would_run_in_place_of_a_source_counts(package: Path, name: str) -> None:
    """A folder goes before a module of the same name, and bytecode needs no source."""
    before = code_manifest(package)
    (package / "enclave" / name).parent.mkdir(exist_ok=True)
    (package / "enclave" / name).write_bytes(b"x")
    assert code_manifest(package) != before


def test_a_linked_folder_is_refused(package: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (package / "enclave" / "main").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WrongUse, match="link"):
        code_files(package)


def test_a_package_that_stands_before_a_measured_one_is_refused(package: Path) -> None:
    code_files(package)
    (package.parent / "idna").mkdir()
    (package.parent / "idna" / "__init__.py").write_text("")
    with pytest.raises(WrongUse, match="in the place of idna"):
        code_files(package)


def test_requirements_of_requirements_are_measured_and_extras_are_not(package: Path) -> None:
    (package / "enclave" / "more.py").write_text("import cryptography\n")
    measured = names(package)
    assert "cffi/__init__.py" in measured
    assert not any(name.startswith("pytest/") for name in measured)


def test_the_server_parts_that_are_loaded_by_name_are_measured() -> None:
    measured = code_files()
    assert {"httptools/__init__.py", "uvloop/__init__.py", "cloister/evidence/document.py"} <= set(measured)


def test_an_import_without_a_distribution_is_refused(
    package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "stray_module.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "loose"))
    (package / "enclave" / "more.py").write_text("import stray_module\n")
    with pytest.raises(WrongUse, match="stray_module"):
        code_files(package)


def test_an_import_that_is_not_installed_cannot_run(package: Path) -> None:
    before = names(package)
    (package / "enclave" / "main.py").write_text("import idna\nimport no_such_engine\n")
    assert names(package) == before


@pytest.mark.parametrize("call", ["importlib.import_module('idna.core')", "find_spec('idna')", "__import__('idna')"])
def test_imports_by_name_count_too(package: Path, call: str) -> None:
    (package / "enclave" / "main.py").write_text(f"def start():\n    return {call}\n")
    assert "idna/core.py" in names(package)


def test_imports_by_a_computed_name_are_refused(package: Path) -> None:
    (package / "enclave" / "main.py").write_text("def start(name):\n    return importlib.import_module(name)\n")
    with pytest.raises(WrongUse, match="only running"):
        code_files(package)


def test_the_bindings_are_code_and_the_engines_libraries_are_not() -> None:
    """The libraries are a component of their own. Where the engine is not installed there is nothing of either."""
    measured = [name for name in code_files() if name.startswith("llama_cpp/")]
    assert not any(name.startswith("llama_cpp/lib/") for name in measured)
    assert bool(measured) == (importlib.util.find_spec("llama_cpp") is not None)


def test_code_that_does_not_parse_is_refused(package: Path) -> None:
    (package / "enclave" / "main.py").write_text("def\n")
    with pytest.raises(WrongUse, match="not Python"):
        code_files(package)


def test_the_digest_is_of_the_manifest(package: Path) -> None:
    measured = measure(None, package=package)
    assert measured.code == f"sha256:{hashlib.sha256(code_manifest(package)).hexdigest()}"
    assert code_manifest(package).endswith(b"\n")


def test_the_interpreter_is_named_whole() -> None:
    measured = measure(None).interpreter
    version = ".".join(map(str, sys.version_info[:3]))
    executable = hashlib.sha256(Path(sys.executable).resolve().read_bytes()).hexdigest()
    assert measured == f"cpython {version} sha256:{executable}"


def test_the_engine_is_its_libraries(tmp_path: Path) -> None:
    (tmp_path / "libllama.so.1.2").write_bytes(b"llama")
    (tmp_path / "libllama.so").symlink_to("libllama.so.1.2")
    (tmp_path / "libggml.so").write_bytes(b"ggml")
    (tmp_path / "build.log").write_bytes(b"noise")
    expected = manifest_digest(
        {"libllama.so.1.2": hashlib.sha256(b"llama").digest(), "libggml.so": hashlib.sha256(b"ggml").digest()}
    )
    assert engine_digest(tmp_path) == expected
    (tmp_path / "build.log").write_bytes(b"more")
    assert engine_digest(tmp_path) == expected
    (tmp_path / "libggml.so").write_bytes(b"ggmm")
    assert engine_digest(tmp_path) != expected


def test_two_libraries_of_one_name_are_refused(tmp_path: Path) -> None:
    """One of them would hide behind the other's digest."""
    (tmp_path / "lib").mkdir()
    for folder in (tmp_path, tmp_path / "lib"):
        (folder / "libllama.so.1").write_bytes(folder.name.encode())
    (tmp_path / "lib" / "libllama.so").symlink_to(tmp_path / "libllama.so.1")
    with pytest.raises(WrongUse, match="one name"):
        engine_digest(tmp_path / "lib")


def test_without_an_engine_the_digest_is_of_nothing() -> None:
    assert engine_digest(None) == hashlib.sha256(b"").digest()
