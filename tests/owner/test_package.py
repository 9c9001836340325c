import hashlib
import os
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from cloister.channel.sections import SectionOpener
from cloister.enclave.runtime.opening import SealedBundle, check_bundle
from cloister.errors import MalformedApp, WrongUse
from cloister.evidence.bundle import Resources, parse_bundle_head
from cloister.evidence.launch import parse_launch
from cloister.models.store import LocalModel
from cloister.owner import filekeys
from cloister.owner.appfile import AppFile
from cloister.owner.deployment import launch_bytes
from cloister.owner.package import Package, manifest_of, package

CANARY = "canary-in-the-code-7741"


@pytest.fixture
def app(tmp_path: Path) -> AppFile:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "main.py").write_text(f"app = None  # {CANARY}")
    (folder / "secrets.toml").write_text('TOKEN = "secret-canary"')
    return AppFile(
        folder=folder,
        name="hello",
        kind="wsgi",
        entry="main:app",
        code=folder,
        health="/health",
        secrets=("TOKEN",),
        resources=Resources(memory=64),
        settings={"GREETING": "settings-canary"},
    )


def make(app: AppFile, tmp_path: Path, name: str = "a", model: LocalModel | None = None) -> Package:
    return package(app, tmp_path / f"{name}.cloister", state=tmp_path / "state", model=model)


def test_the_same_app_has_the_same_manifest_and_another_ciphertext(app: AppFile, tmp_path: Path) -> None:
    first, second = make(app, tmp_path), make(app, tmp_path, "b")
    assert first.head.manifest_bytes == second.head.manifest_bytes
    assert first.head.id != second.head.id
    assert first.keys != second.keys
    assert first.path.read_bytes()[first.head.length :] != second.path.read_bytes()[second.head.length :]


def test_what_the_package_says_of_its_file_is_so(app: AppFile, tmp_path: Path) -> None:
    made = make(app, tmp_path)
    content = made.path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == made.sha256
    assert len(content) == made.head.total
    assert parse_bundle_head(content) == made.head
    assert list(tmp_path.glob(".*")) == []


def test_no_code_and_no_secret_or_setting_stands_in_the_file(app: AppFile, tmp_path: Path) -> None:
    content = make(app, tmp_path).path.read_bytes()
    for canary in (CANARY, "secret-canary", "settings-canary"):
        assert canary.encode() not in content


def test_another_value_of_a_secret_or_setting_is_the_same_app(app: AppFile, tmp_path: Path) -> None:
    first = make(app, tmp_path)
    (app.folder / "secrets.toml").write_text('TOKEN = "another"')
    second = make(replace(app, settings={"GREETING": "another"}), tmp_path, "b")
    assert first.head.sha256 == second.head.sha256


def test_what_an_app_publishes_and_its_domain_make_another_app(app: AppFile, tmp_path: Path) -> None:
    plain = manifest_of(app)
    for change in ({"logs": "public"}, {"domain": "hello.example.com"}):
        (name, value) = next(iter(change.items()))
        changed = manifest_of(replace(app, **{name: value}))  # type: ignore[arg-type]
        assert (getattr(changed, name), changed.sha256 == plain.sha256) == (value, False)


def test_the_manifest_is_known_without_sealing_anything(app: AppFile, tmp_path: Path) -> None:
    assert manifest_of(app).encode() == make(app, tmp_path).head.manifest_bytes
    (app.folder / "main.py").write_text("app = 2")
    assert manifest_of(app).sha256 != parse_bundle_head((tmp_path / "a.cloister").read_bytes()).sha256


def test_other_code_is_another_app(app: AppFile, tmp_path: Path) -> None:
    first = make(app, tmp_path)
    (app.folder / "main.py").write_text("app = 1")
    assert make(app, tmp_path, "b").head.sha256 != first.head.sha256


def test_keys_are_kept_for_their_owner_alone_and_found_again(app: AppFile, tmp_path: Path) -> None:
    made = make(app, tmp_path)
    (file,) = (tmp_path / "state" / "bundles").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert filekeys.load(tmp_path / "state", made.head) == made.keys
    assert CANARY not in repr(made)
    assert made.keys["code"].hex() not in repr(made)


def test_what_was_packaged_opens(app: AppFile, tmp_path: Path, index: Path) -> None:
    weights = tmp_path / "toy.gguf"
    weights.write_bytes(os.urandom((3 << 20) + 1))
    whole = replace(app, requirements=tmp_path / "lock.txt", model="toy.gguf")
    made = make(whole, tmp_path, model=LocalModel(weights, "toy", "here"))
    assert [one.name for one in made.head.manifest.sections] == ["code", "requirements", "model"]
    assert made.head.manifest.python == "{}.{}".format(*sys.version_info)
    assert manifest_of(replace(whole, platform="vtpm"), model=LocalModel(weights, "toy", "here")).python == "3.13"
    with SealedBundle(made.path) as bundle:
        bundle.open(made.keys)
        assert os.pread(bundle.files["model"], 1 << 23, 0) == weights.read_bytes()
        assert CANARY.encode() in os.pread(bundle.files["code"], 1 << 20, 0)


def test_an_enclave_with_another_python_refuses_it_and_says_what_to_write(
    app: AppFile, tmp_path: Path, index: Path
) -> None:
    other = "3.14" if sys.version_info[:2] != (3, 14) else "3.13"
    for python, fits in (("", True), (other, False)):
        head = make(replace(app, requirements=tmp_path / "lock.txt", python=python), tmp_path).head
        launch = launch_bytes(head, owner_key="ed25519:" + "A" * 43, deployment="hello", release=1, config=b"{}")
        if fits:
            check_bundle(head, parse_launch(launch))
        else:
            with pytest.raises(WrongUse, match=f"for Python {other}") as caught:
                check_bundle(head, parse_launch(launch))
            assert 'python = "{}.{}"'.format(*sys.version_info) in caught.value.hint


def test_a_module_that_is_not_there_is_told_before_anything_is_sealed(app: AppFile, tmp_path: Path) -> None:
    with pytest.raises(MalformedApp, match="not among its files"):
        make(replace(app, entry="other:app"), tmp_path)
    assert not (tmp_path / "state").exists()


def test_a_place_that_cannot_be_written_leaves_nothing(app: AppFile, tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="cannot be written"):
        package(app, tmp_path / "nowhere" / "a.cloister", state=tmp_path / "state")


def test_a_model_larger_than_memory_would_do_takes_constant_memory(app: AppFile, tmp_path: Path) -> None:
    weights = tmp_path / "toy.gguf"
    with weights.open("wb") as file:
        file.truncate(96 << 20)
    tracemalloc.start()
    made = make(replace(app, model="toy.gguf"), tmp_path, model=LocalModel(weights, "toy", "here"))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    with SealedBundle(made.path) as bundle:
        bundle.open(made.keys)
    opened = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 16 << 20
    assert opened < 16 << 20


def test_the_first_section_cannot_be_opened_as_the_second(app: AppFile, tmp_path: Path) -> None:
    made = make(app, tmp_path)
    placement = made.head.placements[0]
    opener = SectionOpener(made.keys["code"], "model", placement.section.size)
    content = made.path.read_bytes()[placement.offset :][: opener.next_sealed]
    with pytest.raises(Exception, match="did not open"):
        opener.open_into(memoryview(content), memoryview(bytearray(len(content))))
