"""The tools that judge whole folders of recorded evidence."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.cli.running import run
from tests.vendors import amd, azure, intel, tpm

from cloister.cli.main import app
from cloister.evidence.azure import TDX

ROOT = Path(__file__).parents[1]
VECTORS = ROOT.parent / "shared" / "vectors"


def case(
    folder: Path, verdict: str, files: dict[str, bytes], *, now: Any = intel.NOW, issuer: str = "", **facts: Any
) -> None:
    folder.mkdir(parents=True)
    expected = {"verdict": verdict, "issuer": issuer}
    (folder / "case.json").write_text(json.dumps({"expected": expected, "now": now, **facts}))
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


def tpm_quote(**files: bytes) -> dict[str, bytes]:
    """A TPM's own, under a pinned key. `files`: by the beginning of their names, instead of its own; b"" for none."""
    evidence = tpm.Tpm(AK).evidence(b"nonce", tpm.ZERO_PCRS)
    whole = {
        "message.bin": evidence.quote,
        "signature.tpmt": evidence.signature,
        "pcrs_sha256.json": json.dumps({at: value.hex() for at, value in tpm.ZERO_PCRS.items()}).encode(),
        "ak.pem": AK.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "nonce.hex": b"nonce".hex().encode(),
    }
    given = {name: files.get(name.partition(".")[0], content) for name, content in whole.items()}
    return {name: content for name, content in given.items() if content}


AK = rsa.generate_private_key(65537, 2048)
SNP = amd.make()
ASK, ARK = (x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in SNP.chain[1:])
BAD = {
    "a key that is none": tpm_quote(ak=b"garbage"),
    "a key in PEM that is none": tpm_quote(ak=b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"),
    "no key": tpm_quote(ak=b""),
    "registers that are no JSON": tpm_quote(pcrs_sha256=b"{"),
    "registers that are a list": tpm_quote(pcrs_sha256=b"[1]"),
    "registers that are no hexadecimal": tpm_quote(pcrs_sha256=b'{"0": "xy"}'),
    "registers without names": tpm_quote(pcrs_sha256=b'{"x": "00"}'),
    "a nonce that is no hexadecimal": tpm_quote(nonce=b"xyz"),
    "evidence that is no JSON": {"evidence.json": b"\xff"},
    "evidence that is nothing": {"evidence.json": b"{}"},
    "evidence that is a list": {"evidence.json": b"[]"},
    "evidence that is no base64": {
        "evidence.json": b'{"ak_public": "", "tpm_quote": {"message": "A", "signature": "A", "pcrs": []}}'
    },
    "endless evidence": {"evidence.json": b"[" * 100_000},
    "a report without certificates": {"report.bin": SNP.report},
    "a report with one certificate": {"report.bin": SNP.report, "vcek.der": SNP.chain[0], "ask_ark.pem": ARK},
    "a list with one certificate": {"crl.pem": SNP.crl or b"", "ask_ark.pem": ARK},
    "certificates that are none": {"ak_certificates.txt": b"-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----"},
    "a bundle of nothing": {"bundle.sigstore": b"{}"},
    "a quote under a root that is none": {**quote(intel.tdx()), "root.der": b"root"},
}


def test_a_bad_case_is_a_verdict_and_no_crash(tmp_path: Path) -> None:
    for name, files in BAD.items():
        case(tmp_path / name, "reject", files)
    case(tmp_path / "a good one", "accept", tpm_quote())
    code, rows = judged(tmp_path)
    assert [row["case"] for row in rows if not row["agrees"]] == []
    assert (code, {row["case"] for row in rows}) == (0, {*BAD, "a good one"})
    assert all(row["reason"].isprintable() and row["reason"] for row in rows)


@pytest.mark.parametrize("facts", [b"{", b"[]", b"{}", b'{"expected": null}', b'{"expected": {"verdict": 0}}', b"\xff"])
def test_a_case_that_expects_nothing_agrees_with_nothing(tmp_path: Path, facts: bytes) -> None:
    case(tmp_path / "good", "accept", quote(intel.tdx()))
    (tmp_path / "good" / "case.json").write_bytes(facts)
    code, rows = judged(tmp_path)
    assert (code, [row["agrees"] for row in rows]) == (1, [False])


@pytest.mark.parametrize("facts", [{"now": "today"}, {"claims": [1]}, {"claims": {"nonce": "xy"}}])
def test_a_case_with_facts_that_are_none_is_malformed(tmp_path: Path, facts: dict[str, Any]) -> None:
    case(tmp_path / "azure", "reject", azure_tdx(), **facts)
    code, rows = judged(tmp_path)
    assert (code, [row["reason"].partition(":")[0] for row in rows]) == (0, ["malformed case"])


def azure_tdx() -> dict[str, bytes]:
    """A trust domain of Azure's: its report vouches for the runtime data, they for the TPM's key."""
    runtime = azure.runtime(AK.public_key())
    made = intel.tdx(report={"report_data": hashlib.sha256(runtime).digest() + bytes(32)})
    evidence = tpm.Tpm(AK).evidence(b"nonce", tpm.ZERO_PCRS)
    return {
        "hcl_report.bin": azure.hcl(b"", runtime, kind=TDX),
        "td_quote.bin": made.quote,
        "collateral.json": made.collateral,
        "root.der": made.root,
        "runtime_data.json": runtime,
        "tpm_message.bin": evidence.quote,
        "tpm_signature.bin": evidence.signature[6:],
        "pcrs_sha256.json": json.dumps([value.hex() for _, value in sorted(tpm.ZERO_PCRS.items())]).encode(),
    }


def test_a_trust_domain_of_azures_is_accepted_with_its_collateral_alone(tmp_path: Path) -> None:
    good, claims = azure_tdx(), {"nonce": b"nonce".hex()}
    case(tmp_path / "good", "accept", good, claims=claims)
    case(tmp_path / "bare", "reject", {k: v for k, v in good.items() if k != "collateral.json"}, claims=claims)
    case(tmp_path / "vendor's root", "reject", {k: v for k, v in good.items() if k != "root.der"}, claims=claims)
    case(tmp_path / "changed", "reject", {**good, "td_quote.bin": flipped(good["td_quote.bin"], 600)}, claims=claims)
    case(tmp_path / "replayed", "reject", good, claims={"nonce": "00"})
    code, rows = judged(tmp_path)
    assert code == 0, rows


def test_a_revocation_lists_chain_is_judged(tmp_path: Path) -> None:
    """Of another ASK, which this ARK did not sign, a list says nothing."""
    other = amd.make(product="Genoa").chain[1]
    both = {"good": ASK + ARK, "other": pem(other) + ARK}
    for name, chain in both.items():
        case(tmp_path / name, "reject", {"crl.pem": SNP.crl or b"", "ask_ark.pem": chain})
    _, rows = judged(tmp_path)
    reasons = {row["case"]: row["reason"] for row in rows}
    assert "evidence.root" in reasons["good"]  # nothing else: its root is a test's own
    assert "evidence.chain" not in reasons["good"]
    assert "evidence.chain: ASK is not signed by its issuer" in reasons["other"]


@pytest.mark.skipif(not VECTORS.is_dir(), reason="recorded evidence lies beside the repository, in ../shared/vectors")
def test_all_recorded_evidence_gets_the_verdict_that_it_must() -> None:
    code, rows = judged(VECTORS)
    assert [row for row in rows if not row["agrees"]] == []
    assert (code, len(rows) >= 107) == (0, True)


SIGNED = {
    "quote.bin": slice(None),
    "quote.dat": slice(None),
    "document.cbor": slice(None),
    "report.bin": slice(None),
    "rim.xml": slice(None),
    "bundle.sigstore": slice(None),
    "artifact.whl": slice(None),
    "message.bin": slice(None),
    "signature.tpmt": slice(None),
    "runtime_data.json": slice(None),
    "tpm_message.bin": slice(None),
    "tpm_signature.bin": slice(None),
    "hcl_report.bin": slice(32, 32 + 1184),  # the hardware's report: the rest is judged in files of its own
    "crl.pem": slice(26, -30),  # between the labels
    "ak_certificates.txt": slice(120, 1400),  # of the first certificate, without label and the zeros that pad it
}
"""Evidence, and where in it everything is under a signature."""


def siblings(folder: Path, facts: dict[str, Any], verdict: str, to: Path) -> None:
    """Copies of a case under `to`, each with one bit of its evidence flipped, and one as it is, which gets its verdict."""
    case(to / "as it is", verdict, {}, **facts)
    for file in folder.iterdir():
        if file.name != "case.json":
            (to / "as it is" / file.name).symlink_to(file)
    names = [name for name in SIGNED if (folder / name).is_file()] or ["evidence.json"]
    for name in names:
        data = (folder / name).read_bytes()
        offsets = range(len(data))[SIGNED.get(name, slice(None))][7 :: max(1, len(data) // 6)]
        for at in (at for at in offsets if not data[at : at + 1].isspace()):
            sibling = to / f"{name} {at}"
            case(sibling, "reject", {name: flipped(data, at)}, **facts)
            for file in folder.iterdir():
                if file.name not in (name, "case.json"):
                    (sibling / file.name).symlink_to(file)


@pytest.mark.skipif(not VECTORS.is_dir(), reason="recorded evidence lies beside the repository, in ../shared/vectors")
def test_all_accepted_evidence_has_siblings_with_one_bit_flipped_which_are_refused(tmp_path: Path) -> None:
    """Some offsets of each file of evidence. Of synthetic evidence every byte is gone through in `tests/verify`."""
    accepted = set()
    for path in sorted(VECTORS.rglob("case.json")):
        facts = json.loads(path.read_text())
        if (verdict := facts["expected"].pop("verdict")) in ("accept", "policy"):
            name = str(path.parent.relative_to(VECTORS))
            accepted.add(name)
            given = {key: facts[key] for key in ("now", "claims") if key in facts}
            siblings(path.parent, {**given, "issuer": facts["expected"].get("issuer")}, verdict, tmp_path / name)
    code, rows = judged(tmp_path)
    assert [row for row in rows if not row["agrees"]] == []
    assert not [row for row in rows if "FileNotFoundError" in row["reason"]]
    assert {row["case"].rpartition("/")[0] for row in rows} == accepted
    assert (code, len(accepted) >= 41) == (0, True)


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
