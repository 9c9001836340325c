"""Judge every case of a folder of recorded evidence, through the public verifiers alone.

    python tools/verify_vectors.py FOLDER [--json]

A case is a folder with `case.json` (`expected.verdict`, `now` in Unix seconds or null for this run's time, `claims.nonce`)
and the evidence in files whose names say what they are (`_JUDGES`). The policy is `vectors.toml` beside this file.

accept   every check holds
policy   genuine, and its vendor rates its firmware as not up to date: nothing else fails
parse    nothing to judge: the parser takes it
reject   malformed (also where a file of the case is missing or cannot be read), or some other check fails

Exits 0 only when every case gets the verdict that it expects.
"""

import argparse
import base64
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cloister.errors import CloisterError, Malformed, MalformedEvidence
from cloister.evidence.azure import parse_hcl
from cloister.evidence.eventlog import parse_eventlog, replay_pcrs
from cloister.evidence.nvidia import parse_report as parse_gpu_report
from cloister.evidence.sev_snp import parse_certificate_table, parse_report, pem_or_der_certificates, pem_or_der_crl
from cloister.evidence.tpm import TpmEvidence, encode_rsassa, parse_public, parse_quote, public_area
from cloister.verify import (
    Factor,
    Policy,
    amd_certificates,
    azure,
    intel,
    nitro,
    nvidia,
    parse_policy,
    rim,
    sev_snp,
    vtpm,
)
from cloister.verify.boot_log import check_rtmr_log
from cloister.verify.certificates import MALFORMED
from cloister.verify.platform import Appraisal
from cloister.verify.provenance import SIGSTORE_REFUSES, sigstore_verifier
from cloister.verify.tpm_certificates import ATTESTATION_KEY, PROVIDER_ROOTS, judge_chain

_UNREADABLE = (*MALFORMED, AttributeError, LookupError, OSError, RecursionError)
"""What reading a case's files raises where they are missing, or are not what their names say."""

_RATINGS = frozenset({"tcb.status", "tcb.advisories"})
POLICY = Path(__file__).with_name("vectors.toml")


@dataclass(frozen=True, slots=True)
class Case:
    """One folder. `now` in Unix seconds."""

    name: str
    folder: Path
    facts: Mapping[str, Any]
    policy: Policy
    now: float

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    @property
    def expected(self) -> str:
        """A verdict; "" where the case says none."""
        expected = self.facts.get("expected")
        return str(expected.get("verdict", "")) if isinstance(expected, dict) else ""

    @property
    def claims(self) -> Mapping[str, Any]:
        return self.facts.get("claims") or {}

    def nonce(self) -> bytes | None:
        """Of `nonce.hex`, or as claimed; None where the case names none."""
        text = self.read("nonce.hex").decode().strip() if self.has("nonce.hex") else self.claims.get("nonce")
        return bytes.fromhex(text) if isinstance(text, str) else None


@dataclass(frozen=True, slots=True)
class Outcome:
    verdict: str
    reason: str


def judge(case: Case) -> Outcome:
    """The verdict, and the checks that led to it."""
    try:
        factors = tuple(_judge_of(case)(case))
    except Malformed as error:
        return Outcome("reject", f"malformed {error.step}: {error.message}")
    except CloisterError as error:
        return Outcome("reject", f"{error.step}: {error.message}")
    except _UNREADABLE as error:
        return Outcome("reject", f"malformed case: {type(error).__name__}: {ascii(str(error))[1:-1][:200]}")
    if not factors:
        return Outcome("parse", "")
    wrong = [factor for factor in factors if factor.verdict == "fail"]
    reason = "; ".join(f"{factor.step}: {factor.got}" for factor in wrong)
    if not wrong:
        return Outcome(
            "accept", ", ".join(f"{one.step} not checked" for one in factors if one.verdict == "not-checked")
        )
    only_old = all(factor.step in _RATINGS for factor in wrong)
    return Outcome("policy" if only_old else "reject", reason)


def _judge_of(case: Case) -> Callable[[Case], Iterable[Factor]]:
    if not case.expected:
        raise MalformedEvidence("No verdict that could be expected.", step="case.json")
    for needed, judged in _JUDGES:
        if all(case.has(name) for name in needed):
            return judged
    raise MalformedEvidence("No verifier knows these files.", step="case")


def _intel(case: Case, name: str) -> Appraisal:
    quote = case.read(name)
    collateral = case.read("collateral.json") if case.has("collateral.json") else b""
    root = case.read("root.der") if case.has("root.der") else None
    judged = intel.judge_tdx if quote[4:8] == b"\x81\0\0\0" else intel.judge_sgx
    return judged(quote, collateral, policy=case.policy, now=case.now, root=root)


def _quote(case: Case, name: str) -> Iterable[Factor]:
    appraisal = _intel(case, name)
    yield from appraisal.factors
    if case.has("ccel.bin"):
        yield check_rtmr_log(
            case.read("ccel.bin"), {at: bytes.fromhex(appraisal.measurement[f"rtmr{at}"]) for at in range(4)}
        )


def _dcap(case: Case) -> Iterable[Factor]:
    return _quote(case, "quote.bin")


def _dcap_bare(case: Case) -> Iterable[Factor]:
    return _quote(case, "quote.dat")


def _snp(case: Case) -> Iterable[Factor]:
    report = case.read("report.bin")
    chain, crl = _snp_chain(case, report), _snp_crl(case)
    return sev_snp.judge(report, chain, crl, policy=case.policy, now=case.now).factors


def _snp_crl(case: Case) -> bytes | None:
    return pem_or_der_crl(case.read("crl.pem")) if case.has("crl.pem") else None


def _snp_chain(case: Case, report: bytes) -> tuple[bytes, ...]:
    if case.has("auxblob.bin"):
        found = parse_certificate_table(case.read("auxblob.bin")).chain(parse_report(report).signing_key)
        if len(found) == 3:
            return found
    leaf = case.read("leaf.der" if case.has("leaf.der") else "vcek.der")
    return (leaf, *pem_or_der_certificates(case.read("ask_ark.pem")))


def _amd_crl(case: Case) -> Iterable[Factor]:
    ask, ark = (x509.load_der_x509_certificate(der) for der in pem_or_der_certificates(case.read("ask_ark.pem")))
    crl = amd_certificates.load_crl(pem_or_der_crl(case.read("crl.pem")))
    yield amd_certificates.check_root(ark.fingerprint(SHA256()).hex(), sev_snp.ARK_SHA256)
    yield amd_certificates.check_chain((ask, ark), case.now)
    yield amd_certificates.check_crl(crl, (ask, ark), case.policy, case.now)


def _nitro(case: Case) -> Iterable[Factor]:
    return nitro.judge(case.read("document.cbor"), policy=case.policy, now=case.now, nonce=case.nonce()).factors


def _gpu(case: Case) -> Iterable[Factor]:
    report = case.read("report.bin")
    nonce = case.nonce()
    if nonce is None:
        nonce = parse_gpu_report(report).nonce  # none is named: what it was asked with is not judged
    return nvidia.judge(report, case.read("chain.pem"), nonce=nonce, policy=case.policy, now=case.now).factors


def _rim(case: Case) -> Iterable[Factor]:
    return rim.judge(case.read("rim.xml"), now=case.now).factors


def _tpm(case: Case) -> Iterable[Factor]:
    pcrs = json.loads(case.read("pcrs_sha256.json"))
    evidence = _evidence(
        case.read("message.bin"),
        case.read("signature.tpmt"),
        {int(at): value for at, value in pcrs.items()},
        case.read("ak.pem"),
    )
    return _pinned(case, evidence, case.nonce())


def _tpm_json(case: Case) -> Iterable[Factor]:
    found = json.loads(case.read("evidence.json"))
    quote = found["tpm_quote"]
    ak = b"-----BEGIN PUBLIC KEY-----\n%s\n-----END PUBLIC KEY-----\n" % found["ak_public"].encode()
    evidence = _evidence(
        base64.b64decode(quote["message"]), base64.b64decode(quote["signature"]), dict(enumerate(quote["pcrs"])), ak
    )
    return _pinned(case, evidence, None)


def _evidence(quote: bytes, signature: bytes, pcrs: Mapping[int, str], ak_pem: bytes) -> TpmEvidence:
    key = load_pem_public_key(ak_pem)
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise MalformedEvidence("The attestation key is of an unknown kind.", step="tpm.ak")
    values = {at: bytes.fromhex(value) for at, value in pcrs.items()}
    return TpmEvidence(quote=quote, signature=signature, pcrs=values, ak=public_area(key), certificates=())


def _pinned(case: Case, evidence: TpmEvidence, nonce: bytes | None) -> Iterable[Factor]:
    """The case gives the key itself and no certificate: it is pinned. Without a nonce the quote's own is taken."""
    given = parse_quote(evidence.quote).extra_data if nonce is None else nonce
    pins = frozenset({parse_public(evidence.ak).name_digest})
    return vtpm.judge(evidence, qualifying_data=given, policy=case.policy, now=case.now, ak_pins=pins).factors


def _log(case: Case) -> Iterable[Factor]:
    replay_pcrs(parse_eventlog(case.read("eventlog.bin")))
    return ()


def _azure(case: Case) -> Iterable[Factor]:
    hcl = parse_hcl(case.read("hcl_report.bin"))
    if case.has("td_quote.bin"):
        hardware = _intel(case, "td_quote.bin")
    else:
        chain, crl = _snp_chain(case, hcl.hardware), _snp_crl(case)
        hardware = sev_snp.judge(hcl.hardware, chain, crl, policy=case.policy, now=case.now)
    tpm = TpmEvidence(
        quote=case.read("tpm_message.bin"),
        signature=encode_rsassa(case.read("tpm_signature.bin")),
        pcrs={at: bytes.fromhex(value) for at, value in enumerate(json.loads(case.read("pcrs_sha256.json")))},
        ak=b"",
        certificates=(),
    )
    runtime = case.read("runtime_data.json")
    return azure.judge(
        hardware, runtime, tpm, qualifying_data=case.nonce() or b"", policy=case.policy, now=case.now
    ).factors


def _azure_chain(case: Case) -> Iterable[Factor]:
    """Every attestation key's certificate, under whichever intermediate issued it."""
    root = pem_or_der_certificates(case.read("azure_tpm_root_2023.pem"))
    between = [pem_or_der_certificates(path.read_bytes())[0] for path in sorted(case.folder.glob("*intermediate*.pem"))]
    for leaf in _padded_certificates(case.read("ak_certificates.txt")):
        chains = [
            judge_chain(
                (leaf, ca, *root), (), purpose=ATTESTATION_KEY, roots=PROVIDER_ROOTS, policy=case.policy, now=case.now
            )
            for ca in between
        ]
        best = min(chains, key=lambda one: sum(factor.verdict == "fail" for factor in one.factors))
        yield from best.factors


def _padded_certificates(text: bytes) -> Iterable[bytes]:
    """As a TPM's NV index gives them: zeros after the certificate, which whoever collects it cuts off."""
    for block in text.split(b"-----BEGIN CERTIFICATE-----")[1:]:
        der = base64.b64decode(block.split(b"-----END")[0])
        yield der[: 4 + int.from_bytes(der[2:4], "big")]


def _sigstore(case: Case) -> Iterable[Factor]:
    """By the installed sigstore, offline. The case names an issuer; whose identity it is is not judged."""
    from sigstore.errors import Error
    from sigstore.models import Bundle
    from sigstore.verify.policy import OIDCIssuer

    try:
        bundle = Bundle.from_json(case.read("bundle.sigstore"))
        policy = OIDCIssuer(case.facts["expected"]["issuer"])
        sigstore_verifier().verify_artifact(case.read("artifact.whl"), bundle, policy)
    except (Error, *SIGSTORE_REFUSES) as error:
        yield Factor("provenance.signature", "fail", got=type(error).__name__)
        return
    yield Factor("provenance.signature", "pass")


_JUDGES: tuple[tuple[tuple[str, ...], Callable[[Case], Iterable[Factor]]], ...] = (
    (("quote.bin",), _dcap),
    (("quote.dat",), _dcap_bare),
    (("hcl_report.bin",), _azure),
    (("report.bin", "chain.pem"), _gpu),
    (("report.bin",), _snp),
    (("crl.pem", "ask_ark.pem"), _amd_crl),
    (("document.cbor",), _nitro),
    (("rim.xml",), _rim),
    (("message.bin", "signature.tpmt"), _tpm),
    (("evidence.json",), _tpm_json),
    (("eventlog.bin",), _log),
    (("ak_certificates.txt",), _azure_chain),
    (("bundle.sigstore",), _sigstore),
)
"""The first whose files are all there."""


def cases(folder: Path, policy: Policy, now: float) -> list[Case]:
    """Every folder below with a `case.json`, by name. One that cannot be read expects nothing, and so never agrees."""
    found = []
    for path in sorted(folder.rglob("case.json")):
        facts = _facts(path)
        at = facts.get("now")
        found.append(Case(str(path.parent.relative_to(folder)), path.parent, facts, policy, now if at is None else at))
    return found


def _facts(path: Path) -> Mapping[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    asked = arguments.parse_args()
    found = cases(
        asked.folder, parse_policy(POLICY.read_bytes(), read=lambda name: Path(name).read_bytes()), time.time()
    )
    if not found:
        print(f"{asked.folder} holds no case.json", file=sys.stderr)
        return 2
    rows = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        for case in bar.track(found, description="judging"):
            outcome = judge(case)
            rows.append(
                {
                    "case": case.name,
                    "expected": case.expected,
                    "got": outcome.verdict,
                    "agrees": outcome.verdict == case.expected,
                    "reason": outcome.reason,
                }
            )
    print(json.dumps(rows, indent=1)) if asked.json else _show(rows)
    return 0 if all(row["agrees"] for row in rows) else 1


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("case", "expected", "got", "agrees", "reason")
    for row in rows:
        agrees = "[green]yes" if row["agrees"] else "[bold red]NO"
        table.add_row(row["case"], row["expected"], row["got"], agrees, row["reason"].replace("[", "\\["))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    total, agreed = (
        Counter(row["case"].split("/")[0] for row in rows),
        Counter(row["case"].split("/")[0] for row in rows if row["agrees"]),
    )
    for name in total:
        console.print(f"{name}: {agreed[name]} of {total[name]} agree")
    console.print(f"all: {sum(agreed.values())} of {sum(total.values())} agree")


if __name__ == "__main__":
    sys.exit(main())
