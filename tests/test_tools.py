"""The tools that judge whole folders of recorded evidence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from tests.cli.running import run
from tests.vendors import amd, intel

from cloister.cli.main import app

ROOT = Path(__file__).parents[1]
VECTORS = ROOT.parent / "shared" / "vectors"


def case(folder: Path, verdict: str, files: dict[str, bytes], *, now: float = intel.NOW, **facts: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "case.json").write_text(json.dumps({"expected": {"verdict": verdict}, "now": now, **facts}))
    for name, content in files.items():
        (folder / name).write_bytes(content)


def quote(evidence: intel.Evidence) -> dict[str, bytes]:
    return {"quote.bin": evidence.quote, "collateral.json": evidence.collateral, "root.der": evidence.root}


def judged(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    argv = [sys.executable, str(ROOT / "tools" / "verify_vectors.py"), str(folder), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout or "[]")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    good = intel.tdx()
    old = intel.level("OutOfDate", tdx=bytes([5, 0, 5, *([0] * 13)]))
    case(tmp_path / "good", "accept", quote(good))
    case(tmp_path / "old", "policy", quote(intel.tdx(tcb_info={"tcbLevels": [old]})))
    case(tmp_path / "changed", "reject", {**quote(good), "quote.bin": flipped(good.quote, 600)})
    case(tmp_path / "under/the/production/root", "reject", {k: v for k, v in quote(good).items() if k != "root.der"})
    case(tmp_path / "noise", "reject", {"document.cbor": b"noise"})
    case(tmp_path / "unknown", "reject", {"what.is.this": b""})
    return tmp_path


def test_every_case_gets_a_verdict_a_reason_and_agrees(folder: Path) -> None:
    code, rows = judged(folder)
    reasons = {row["case"]: row["reason"] for row in rows}
    assert code == 0, rows
    assert all(row["agrees"] for row in rows)
    assert "evidence.signature" in reasons["changed"]
    assert "tcb.status: OutOfDate" in reasons["old"]
    assert "evidence.root" in reasons["under/the/production/root"]
    assert "malformed" in reasons["noise"]


def test_a_verdict_that_does_not_agree_is_a_failure(folder: Path) -> None:
    case(folder / "believed too much", "accept", {"document.cbor": b"noise"})
    code, rows = judged(folder)
    assert code == 1
    assert [row["case"] for row in rows if not row["agrees"]] == ["believed too much"]


def test_a_folder_without_cases_is_a_mistake(tmp_path: Path) -> None:
    assert judged(tmp_path) == (2, [])


@pytest.mark.skipif(not VECTORS.is_dir(), reason="recorded evidence lies beside the repository, in ../shared/vectors")
def test_all_recorded_evidence_gets_the_verdict_that_it_must() -> None:
    code, rows = judged(VECTORS)
    assert [row for row in rows if not row["agrees"]] == []
    assert (code, len(rows) >= 107) == (0, True)


def test_judgements_are_timed_whatever_they_find(folder: Path) -> None:
    snp = amd.make()
    leaf, ask, ark = snp.chain
    case(folder / "snp", "reject", {"report.bin": snp.report, "leaf.der": leaf, "ask_ark.pem": pem(ask) + pem(ark)})
    ran = run(app, "bench", "verify", str(folder), "--runs", "3", "--json")
    assert ran.exit_code == 0, ran.output
    told = {one["case"]: one for one in json.loads(ran.stdout)["cases"]}
    assert told["good"]["failed"] == []
    assert told["snp"]["failed"] == ["evidence.root"]
    assert {one["runs"] for one in told.values()} == {3}
    assert run(app, "bench", "verify", str(folder / "noise")).exit_code == 2


def pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
