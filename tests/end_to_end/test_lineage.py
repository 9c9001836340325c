"""The record beside a model's file reaches the client through the hardware's report."""

import hashlib
from pathlib import Path

from cloister.cli.local import LocalEnclave, Plan
from cloister.client import Session
from cloister.models.lineage import Found, digest_model, lineage_path, save_lineage, trace
from cloister.models.store import LocalModel, embedded_path


def test_the_statement_names_the_record(state: Path, tmp_path: Path) -> None:
    path = tmp_path / "toy.gguf"
    path.write_bytes(embedded_path("tiny").read_bytes())
    found = digest_model(path)
    save_lineage(path, trace(found, Found("toy.gguf", found.sha256)))
    with LocalEnclave(Plan.make(LocalModel(path, "toy", str(path)), slots=1)) as enclave:
        ready = enclave.start()
        with Session(enclave.url, policy=enclave.policy) as session:
            (stated,) = session.verify().statement.models
    record = hashlib.sha256(lineage_path(path).read_bytes()).hexdigest()
    assert (stated.sha256, stated.lineage_sha256) == (found.sha256, record)
    assert (ready["lineage_sha256"], ready["lineage_warning"]) == (record, "")
