import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.cli.conftest import Enclave
from tests.collateral.service import QE_IDENTITY, TCB_INFO_EARLY, Running, Service, amd_replies, intel_replies, roots
from tests.vendors import amd, intel
from typer.testing import Result

from cloister.cli import collateral, main
from cloister.cli.verify import Saved, read_saved
from cloister.evidence.document import Document, Item, parse_document
from cloister.evidence.endorsements import Endorsements, parse_endorsements
from cloister.evidence.statement import EngineStatement, Statement
from cloister.verify import Policy
from cloister.verify.intel import judge_tdx

Run = Callable[..., Result]
DAY = 86400.0
NOW = intel.NOW


@pytest.fixture
def service() -> Iterator[Service]:
    running = Running()
    yield running.service
    running.stop()


@pytest.fixture
def tdx() -> intel.Evidence:
    return intel.tdx()


@pytest.fixture
def snp() -> amd.Evidence:
    return amd.make()


class Clock:
    now = NOW


@pytest.fixture(autouse=True)
def clock(
    service: Service, tdx: intel.Evidence, snp: amd.Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Clock:
    """The synthetic vendors in place of the real ones, and their time in place of ours."""
    clock = Clock()
    line = ("cloister.cli.collateral", "Keep what vendors publish about their hardware.")
    monkeypatch.setattr(main, "COMMANDS", {**main.COMMANDS, "collateral": line})
    monkeypatch.setattr(collateral, "PINNED", replace(roots(tdx=tdx), amd=snp.roots))
    monkeypatch.setattr(collateral, "_now", lambda: clock.now)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CLOISTER_INTEL_PCS", service.url)
    monkeypatch.setenv("CLOISTER_AMD_KDS", service.url)
    monkeypatch.setenv("CLOISTER_NVIDIA_RIM", service.url)
    return clock


def _statement() -> bytes:
    statement = Statement(
        purpose="serve",
        aud=(),
        launch_sha256="bb" * 32,
        ohttp_keys=b"keys",
        receipt_key=bytes(32),
        engine=EngineStatement("aa" * 32, "plain"),
        models=(),
        iat=int(NOW) - 60,
        exp=int(NOW) + 3600,
    )
    return statement.encode()


def _save(path: Path, cpu: bytes, *, at: float = NOW, endorsements: Endorsements | None = None) -> Path:
    items = {"statement": Item("application/json", _statement()), "cpu": Item("application/octet-stream", cpu)}
    if endorsements is not None:
        items["endorsements"] = endorsements.item()
    path.write_text(Saved(Document(items).encode(), bytes(32), at).encode())
    return path


@pytest.fixture
def quote(tmp_path: Path, tdx: intel.Evidence) -> Path:
    return _save(tmp_path / "tdx.json", tdx.quote)


@pytest.fixture
def report(tmp_path: Path, snp: amd.Evidence) -> Path:
    return _save(tmp_path / "snp.json", snp.report)


HEAD = "what                       platform            issued      until       days left\n"
FETCHED = """\
Intel PCK revocation list  platform            2027-01-14  2027-02-13         29
Intel root revocation list SGX                 2027-01-14  2027-02-13         29
Intel TCB info             TDX 00906ed50000    2027-01-14  2027-02-13         29
Intel QE identity          TDX                 2027-01-14  2027-02-13         29
"""
CHIP = """\
AMD VCEK                   Milan 646566676869… 2026-12-16  2034-01-13       2555
AMD VCEK's CA              Milan               2024-01-16  2047-01-10       7300
AMD VCEK revocation list   Milan               2027-01-05  2027-11-11        300
"""


def test_fetching_asks_the_vendor_and_tells_what_is_kept_until_when(
    run: Run, service: Service, tdx: intel.Evidence, quote: Path
) -> None:
    service.serve(intel_replies(tdx))
    ran = run("collateral", "fetch", quote)
    assert (ran.exit_code, ran.stdout) == (0, HEAD + FETCHED)
    assert ran.stderr.splitlines() == [
        "asking 127.0.0.1 for Intel PCK revocation list",
        "asking 127.0.0.1 for Intel root revocation list",
        "asking 127.0.0.1 for Intel TCB info",
        "asking 127.0.0.1 for Intel QE identity",
    ]


def test_what_is_kept_is_shown_with_the_days_left(
    run: Run, service: Service, tdx: intel.Evidence, snp: amd.Evidence, quote: Path, report: Path
) -> None:
    service.serve({**intel_replies(tdx), **amd_replies(snp)})
    run("collateral", "fetch", quote)
    run("collateral", "fetch", report)
    asked = len(service.requests)
    shown = run("collateral", "show").stdout
    assert sorted(shown.splitlines()) == sorted((HEAD + FETCHED + CHIP).splitlines())
    told = json.loads(run("collateral", "show", "--json").stdout)
    assert len(told) == 7
    (info,) = [each for each in told if each["kind"] == "tcb-info"]
    assert info == {
        "vendor": "intel",
        "kind": "tcb-info",
        "platform": "tdx-00906ed50000",
        "usable": True,
        "problem": "",
        "issued": NOW - DAY,
        "next_update": NOW + 29 * DAY,
        "days_left": 29,
        "fetched_at": int(NOW),
    }
    assert len(service.requests) == asked


def test_what_is_out_of_date_is_shown_as_not_usable(
    run: Run, service: Service, tdx: intel.Evidence, quote: Path, clock: Clock
) -> None:
    service.serve(intel_replies(tdx))
    run("collateral", "fetch", quote)
    clock.now += 30 * DAY
    shown = run("collateral", "show").stdout
    assert (
        "Intel PCK revocation list  platform            not usable: Intel PCK revocation list (platform) is out of date"
        in shown
    )
    assert shown.count("not usable") == 4
    told = json.loads(run("collateral", "show", "--json").stdout)
    assert [(each["usable"], each["days_left"]) for each in told] == [(False, None)] * 4


def test_an_empty_cache_says_how_to_fill_it(run: Run) -> None:
    ran = run("collateral", "show")
    assert (ran.exit_code, ran.stdout) == (0, "")
    assert "cloister collateral fetch" in ran.stderr
    assert json.loads(run("collateral", "show", "--json").stdout) == []


def test_the_early_update_set_is_fetched_on_demand(
    run: Run, service: Service, tdx: intel.Evidence, quote: Path
) -> None:
    service.serve({**intel_replies(tdx), **intel_replies(tdx, early=True)})
    ran = run("collateral", "fetch", quote, "--early")
    assert ran.exit_code == 0
    assert TCB_INFO_EARLY in service.requests
    assert "Intel TCB info, early" in ran.stdout
    assert len(json.loads(run("collateral", "show", "--json").stdout)) == 6


def test_a_document_is_written_with_its_collateral_inside(
    run: Run, service: Service, tdx: intel.Evidence, quote: Path, tmp_path: Path
) -> None:
    service.serve(intel_replies(tdx))
    out = tmp_path / "out.json"
    ran = run("collateral", "export", quote, "-o", out)
    assert (ran.exit_code, ran.stdout) == (0, f"{out}  {out.stat().st_size:,} bytes\n")
    saved = read_saved(out)
    assert (saved.nonce, saved.at) == (bytes(32), NOW)
    items = parse_document(saved.document).items
    carried = parse_endorsements(items["endorsements"].content).intel or b""
    appraisal = judge_tdx(items["cpu"].content, carried, policy=Policy(), now=saved.at, root=tdx.root)
    assert [factor.step for factor in appraisal.factors if factor.verdict == "fail"] == []


def test_a_document_that_carries_it_is_written_as_it_is(
    run: Run, service: Service, tdx: intel.Evidence, tmp_path: Path, clock: Clock
) -> None:
    saved = _save(tmp_path / "in.json", tdx.quote, endorsements=Endorsements(intel=tdx.collateral))
    clock.now += 400 * DAY
    assert run("collateral", "export", saved, "-o", tmp_path / "out.json").exit_code == 0
    assert read_saved(tmp_path / "out.json") == read_saved(saved)
    assert service.requests == []


def test_what_was_fetched_before_is_enough_to_export_offline(
    run: Run, service: Service, snp: amd.Evidence, report: Path, tmp_path: Path
) -> None:
    service.serve(amd_replies(snp))
    refused = run("collateral", "export", report, "-o", tmp_path / "out.json", "--offline")
    assert refused.exit_code == 5
    assert "hint: Once, with a network" in refused.stderr
    assert not (tmp_path / "out.json").exists()
    run("collateral", "fetch", report)
    service.replies.clear()
    assert run("collateral", "export", report, "-o", tmp_path / "out.json", "--offline").exit_code == 0


def test_a_document_older_than_its_collateral_is_judged_when_that_was_issued(
    run: Run, service: Service, tdx: intel.Evidence, quote: Path, tmp_path: Path, clock: Clock
) -> None:
    fresh = {"issueDate": intel.iso(NOW + 600), "nextUpdate": intel.iso(NOW + 30 * DAY)}
    service.serve(intel_replies(intel.tdx(tcb_info=fresh)))
    clock.now += 900
    assert run("collateral", "export", quote, "-o", tmp_path / "out.json").exit_code == 0
    assert read_saved(tmp_path / "out.json").at == NOW + 600


def test_a_document_that_expired_before_its_collateral_was_issued_is_refused(
    run: Run, service: Service, tdx: intel.Evidence, quote: Path, tmp_path: Path, clock: Clock
) -> None:
    fresh = {"issueDate": intel.iso(NOW + 2 * DAY), "nextUpdate": intel.iso(NOW + 30 * DAY)}
    service.serve(intel_replies(intel.tdx(tcb_info=fresh)))
    clock.now += 3 * DAY
    ran = run("collateral", "export", quote, "-o", tmp_path / "out.json")
    assert ran.exit_code == 2
    assert "Save it anew" in ran.stderr
    assert not (tmp_path / "out.json").exists()


def test_a_vendor_who_is_not_the_vendor_is_not_trusted(run: Run, service: Service, quote: Path) -> None:
    service.serve(intel_replies(intel.other_intel().make(intel.Settings(platform="tdx", version=4))))
    ran = run("collateral", "fetch", quote)
    assert (ran.exit_code, ran.stdout) == (3, "")
    assert "another root than Intel's" in ran.stderr
    assert json.loads(run("collateral", "show", "--json").stdout) == []


def test_nobody_there_is_unreachable(run: Run, quote: Path, nowhere: str) -> None:
    ran = run("collateral", "fetch", quote, "--intel", nowhere)
    assert (ran.exit_code, ran.stdout) == (5, "")
    assert "hint: " in ran.stderr


def test_half_an_answer_is_no_answer(run: Run, service: Service, tdx: intel.Evidence, quote: Path) -> None:
    service.serve(intel_replies(tdx))
    service.change(QE_IDENTITY, cut=40)
    assert run("collateral", "fetch", quote).exit_code == 5
    assert [each["kind"] for each in json.loads(run("collateral", "show", "--json").stdout)] == [
        "pck-crl",
        "root-crl",
        "tcb-info",
    ]


@pytest.mark.parametrize(
    "url", ["http://pccs.example", "ftp://pccs.example", "https://", "https://u@pccs.example", "x"]
)
def test_an_address_that_anybody_could_answer_is_refused(run: Run, quote: Path, url: str) -> None:
    assert run("collateral", "fetch", quote, "--intel", url).exit_code == 2


def test_a_file_that_is_no_document_is_malformed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{}")
    assert run("collateral", "fetch", tmp_path / "x").exit_code == 4
    assert run("collateral", "fetch", tmp_path / "missing").exit_code == 2


def test_a_running_enclave_is_asked_for_its_document(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    ran = run("collateral", "fetch", enclave.url)
    assert (ran.exit_code, ran.stdout) == (0, "")
    assert "needs no collateral" in ran.stderr
    assert enclave.gateway.paths == ["GET /.well-known/cloister-attestation"]
    assert run("collateral", "export", enclave.url, "-o", tmp_path / "out.json").exit_code == 0
    assert "sim-report" in parse_document(read_saved(tmp_path / "out.json").document).items["cpu"].media_type


def test_a_cache_that_cannot_be_written_is_an_error_of_fetching(
    run: Run, service: Service, tdx: intel.Evidence, quote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.serve(intel_replies(tdx))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    ran = run("collateral", "fetch", quote)
    assert ran.exit_code == 2
    assert "XDG_CACHE_HOME" in ran.stderr
