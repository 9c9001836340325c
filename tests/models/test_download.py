import hashlib
import json
import socket
from pathlib import Path

import pytest
from tests.models.conftest import REPOSITORY, REVISION, Hub

from cloister.errors import ConnectionFailed, MalformedModel, WrongUse
from cloister.models.download import pull, resolve, split_quantization
from cloister.models.lineage import Fetched, lineage_path, read_lineage
from cloister.models.reference import HubModel
from cloister.models.store import LocalModel, embedded_path, records

Q8 = bytes(range(256)) * 4096
Q4 = b"four" * 1000


@pytest.fixture
def filled(hub: Hub) -> Hub:
    hub.files = {"README.md": b"hello", "toy-Q4_K_M.gguf": Q4, "toy-q8_0.gguf": Q8, "mmproj-F16.gguf": b"eye"}
    return hub


def test_fetches_the_preferred_quantization_and_records_it(filled: Hub, cache: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    model = resolve(f"hf.co/{REPOSITORY}", progress=lambda *step: seen.append(step))
    path = cache / "acme--toy-GGUF" / "toy-q8_0.gguf"
    assert model == LocalModel(path, "toy-q8_0", f"hf.co/{REPOSITORY}@{REVISION[:12]}/toy-q8_0.gguf")
    assert path.read_bytes() == Q8
    record = json.loads(path.with_name("toy-q8_0.gguf.cloister.json").read_text())
    assert record["sha256"] == record["hub_sha256"] == hashlib.sha256(Q8).hexdigest()
    assert (record["revision"], record["size"], record["quantization"]) == (REVISION, len(Q8), "Q8_0")
    assert seen[-1] == ("toy-q8_0.gguf", len(Q8), len(Q8))
    assert not list(path.parent.glob("*.partial"))


def test_fetches_what_the_tag_names(filled: Hub) -> None:
    assert resolve(f"hf.co/{REPOSITORY}:q4_k_m").path.read_bytes() == Q4
    assert resolve(f"hf.co/{REPOSITORY}:toy-q8_0.gguf").path.read_bytes() == Q8


def test_what_is_here_is_used_without_the_network(filled: Hub) -> None:
    resolve(f"hf.co/{REPOSITORY}")
    asked = len(filled.requests)
    filled.status = 503
    assert resolve(f"hf.co/{REPOSITORY}").path.read_bytes() == Q8
    assert len(filled.requests) == asked


def test_another_tag_of_the_same_repository_is_not_taken_for_the_usual_choice(filled: Hub) -> None:
    resolve(f"hf.co/{REPOSITORY}:Q4_K_M")
    assert resolve(f"hf.co/{REPOSITORY}").path.read_bytes() == Q8


def test_a_file_without_a_quantization_is_not_taken_for_the_usual_choice(filled: Hub) -> None:
    filled.files["a.gguf"] = b"plain"
    assert resolve(f"hf.co/{REPOSITORY}:a.gguf").path.read_bytes() == b"plain"
    assert resolve(f"hf.co/{REPOSITORY}").path.read_bytes() == Q8


@pytest.mark.parametrize("tag", ["Q8_0", "toy-q8_0.gguf"])
def test_the_usual_choice_is_here_under_its_own_name_too(filled: Hub, tag: str) -> None:
    resolve(f"hf.co/{REPOSITORY}")
    filled.status = 503
    assert resolve(f"hf.co/{REPOSITORY}:{tag}").path.read_bytes() == Q8


def test_pulling_again_fetches_nothing_when_nothing_changed(filled: Hub) -> None:
    pull(HubModel(REPOSITORY))
    record = pull(HubModel(REPOSITORY, "Q8_0"))
    assert record.tags == ("", "Q8_0")
    assert len(filled.downloads()) == 1


def test_pulling_again_fetches_a_newer_file(filled: Hub) -> None:
    old = pull(HubModel(REPOSITORY))
    filled.files["toy-q8_0.gguf"] = Q8[::-1]
    filled.revision = "f" * 40
    new = pull(HubModel(REPOSITORY))
    assert new.sha256 != old.sha256
    assert [record.revision for record in records()] == ["f" * 40]
    assert new.local_model().path.read_bytes() == Q8[::-1]


def test_goes_on_where_the_connection_broke(filled: Hub) -> None:
    filled.cuts = [1000, 500_000]
    assert resolve(f"hf.co/{REPOSITORY}").path.read_bytes() == Q8
    assert filled.downloads()[0] == "bytes=0-"
    starts = [int(ranges.removeprefix("bytes=").rstrip("-")) for ranges in filled.downloads()]
    assert starts == sorted(starts)
    assert 0 < starts[-1] < len(Q8)


def test_goes_on_in_another_process_and_takes_no_part_for_the_whole(filled: Hub, cache: Path) -> None:
    filled.cuts = [600_000, 0, 0, 0, 0]
    with pytest.raises(ConnectionFailed) as caught:
        resolve(f"hf.co/{REPOSITORY}")
    assert "network" in caught.value.hint
    assert not (cache / "acme--toy-GGUF" / "toy-q8_0.gguf").exists()
    assert list(records()) == []
    (partial,) = (cache / "acme--toy-GGUF").glob("*.partial")
    have = partial.stat().st_size
    assert 0 < have <= 600_000
    filled.requests.clear()
    assert resolve(f"hf.co/{REPOSITORY}").path.read_bytes() == Q8
    assert filled.downloads() == [f"bytes={have}-"]


def test_starts_again_when_the_server_knows_no_ranges(filled: Hub) -> None:
    filled.ranges = False
    filled.cuts = [500_000]
    assert resolve(f"hf.co/{REPOSITORY}").path.read_bytes() == Q8


def test_refuses_bytes_that_the_hub_did_not_announce(filled: Hub, cache: Path) -> None:
    filled.announced["toy-q8_0.gguf"] = "ab" * 32
    with pytest.raises(MalformedModel) as caught:
        resolve(f"hf.co/{REPOSITORY}")
    assert "ab" * 32 in (caught.value.expected or "")
    assert hashlib.sha256(Q8).hexdigest() in (caught.value.got or "")
    assert not [path for path in (cache / "acme--toy-GGUF").iterdir() if path.suffix != ".lock"]


def test_a_spoilt_partial_file_is_found_out_and_dropped(filled: Hub, cache: Path) -> None:
    filled.cuts = [600_000, 0, 0, 0, 0]
    with pytest.raises(ConnectionFailed):
        resolve(f"hf.co/{REPOSITORY}")
    (partial,) = (cache / "acme--toy-GGUF").glob("*.partial")
    partial.write_bytes(b"X" + partial.read_bytes()[1:])
    with pytest.raises(MalformedModel):
        resolve(f"hf.co/{REPOSITORY}")
    assert resolve(f"hf.co/{REPOSITORY}").path.read_bytes() == Q8


def test_the_token_is_shown_to_the_hub_and_to_nobody_it_sends_on_to(filled: Hub) -> None:
    resolve(f"hf.co/{REPOSITORY}")
    shown = {path.startswith("/cdn/"): value for path, value in filled.authorizations}
    assert shown == {False: "Bearer hf_test", True: ""}


def test_lists_what_there_is_when_the_tag_names_nothing(filled: Hub) -> None:
    with pytest.raises(WrongUse) as caught:
        resolve(f"hf.co/{REPOSITORY}:Q2_K")
    assert caught.value.hint == "There is: Q4_K_M, Q8_0"


def test_lists_the_files_when_the_tag_names_several(hub: Hub) -> None:
    hub.files = {"a-Q8_0.gguf": b"a", "b-Q8_0.gguf": b"b"}
    with pytest.raises(WrongUse) as caught:
        resolve(f"hf.co/{REPOSITORY}:Q8_0")
    assert "a-Q8_0.gguf, b-Q8_0.gguf" in caught.value.hint
    assert resolve(f"hf.co/{REPOSITORY}:b-Q8_0.gguf").path.read_bytes() == b"b"


def test_takes_the_only_file_whatever_its_name(hub: Hub) -> None:
    hub.files = {"model.gguf": b"a"}
    assert resolve(f"hf.co/{REPOSITORY}").path.read_bytes() == b"a"


def test_refuses_a_model_in_several_parts(hub: Hub) -> None:
    hub.files = {"toy-Q8_0-00001-of-00002.gguf": b"a", "toy-Q8_0-00002-of-00002.gguf": b"b"}
    with pytest.raises(WrongUse, match="split into several files"):
        resolve(f"hf.co/{REPOSITORY}:Q8_0")


def test_refuses_a_repository_without_a_model(hub: Hub) -> None:
    hub.files = {"README.md": b""}
    with pytest.raises(WrongUse, match=r"holds no \.gguf file"):
        resolve(f"hf.co/{REPOSITORY}")


def test_a_repository_that_is_not_there(hub: Hub) -> None:
    with pytest.raises(WrongUse, match=r"There is no hf\.co/acme/missing"):
        resolve("hf.co/acme/missing")


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_fails_is_unreachable(filled: Hub, status: int) -> None:
    filled.status = status
    with pytest.raises(ConnectionFailed):
        resolve(f"hf.co/{REPOSITORY}")


def test_no_network_is_said_clearly(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(ConnectionFailed) as caught:
            resolve("hf.co/acme/toy")
    assert "embedded" in caught.value.hint


def test_embedded_and_local_models_need_no_hub(tmp_path: Path) -> None:
    assert resolve("tiny") == LocalModel(embedded_path("tiny"), "tiny", "embedded in the package")
    (tmp_path / "own.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path / "own.gguf")).name == "own"


def test_an_embedded_model_that_is_not_there_is_said_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.models.store.__file__", str(tmp_path / "store.py"))
    with pytest.raises(WrongUse, match="does not hold the embedded model 'demo'"):
        resolve("default")


def test_records_where_the_file_came_from(filled: Hub) -> None:
    path = pull(HubModel(REPOSITORY)).local_model().path
    lineage = read_lineage(path)
    assert lineage is not None
    assert lineage.steps == (Fetched(REPOSITORY, REVISION, "toy-q8_0.gguf", hashlib.sha256(Q8).hexdigest()),)
    assert (lineage.sha256, lineage.size) == (hashlib.sha256(Q8).hexdigest(), len(Q8))


def test_the_record_has_the_digests_of_a_models_tensors(hub: Hub) -> None:
    content = embedded_path("tiny").read_bytes()
    hub.files = {"tiny.gguf": content}
    lineage = read_lineage(pull(HubModel(REPOSITORY)).local_model().path)
    assert lineage is not None
    assert len(lineage.tensors) == 38


def test_a_newer_file_has_a_record_of_its_own_and_a_lost_one_is_written_again(filled: Hub) -> None:
    path = pull(HubModel(REPOSITORY)).local_model().path
    first = lineage_path(path).read_bytes()
    lineage_path(path).unlink()
    pull(HubModel(REPOSITORY))
    assert lineage_path(path).read_bytes() == first
    filled.files["toy-q8_0.gguf"] = Q8[::-1]
    pull(HubModel(REPOSITORY))
    lineage = read_lineage(path)
    assert lineage is not None
    assert lineage.sha256 == hashlib.sha256(Q8[::-1]).hexdigest()


@pytest.mark.parametrize(
    ("stem", "parts"),
    [("toy-q8_0", ("toy", "Q8_0")), ("a.F16", ("a", "F16")), ("toy", ("toy", "")), ("Q4_K_M", ("", "Q4_K_M"))],
)
def test_a_quantization_at_the_end_of_a_name_is_split_off(stem: str, parts: tuple[str, str]) -> None:
    assert split_quantization(stem) == parts
