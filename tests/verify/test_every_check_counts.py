"""No check of the verifier is without a test: each is taken away in turn, and some test must be red (`mutation.py`)."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from tests.verify.mutation import JUDGES, PROBE, Probe, Site, rewritten

from cloister.verify.factors import compare, failed

ROOT = Path(__file__).parents[2]
VALUES = {"__init__", "factors", "platform", "policy", "roots", "verified"}
"""Modules that judge nothing: `policy` and `factors` have tests of their own, the others only hold what was found."""

ANSWERS_FALSE = "pyca answers False, and never raises, for a list whose signature it cannot judge: a second defence."
EQUIVALENT: Mapping[str, str] = MappingProxyType(
    {
        "amd_certificates.load_crl: warnings.simplefilter('ignore', CryptographyDeprecationWarning)": (
            "Silences a warning, as where leaves are loaded; nothing in a list warns yet."
        ),
        "appraisers._tdx: 'runtime' in subject.document.items": (
            "Runtime data without a TPM's quote are malformed: the next part."
        ),
        "amd_certificates._crl_signed: not isinstance(key, rsa.RSAPublicKey)": (
            "No other kind of key verifies RSASSA-PSS, which the next lines demand."
        ),
        "amd_certificates._crl_signed: return False": ANSWERS_FALSE,
        "tpm_certificates._signed_by: return False": ANSWERS_FALSE,
        "intel_chain._signed_list: return False": ANSWERS_FALSE,
        "intel_chain._listed: return True": "pyca reads every entry when it loads a list: one that it loaded, it can search.",
        "nvidia._check_rims: each.manifest is not None": "Exactly where there is none, its signature failed: the next part.",
        "provenance._check_key: policy.measurements_signer is None": "No key equals None: the next part.",
        "rim._load: body.decode('utf-8')": "expat refuses by itself what is not UTF-8.",
        "sev_snp._unjudged: report.launch_mit_vector is not None": "A report has both vectors, or neither.",
        "sev_snp._unjudged: report.current_mit_vector is not None": "A report has both vectors, or neither.",
    }
)
"""What may be taken away without any verdict being another one, and why: "module.function: source"."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of this room's tests in a process of its own, whose verifier alone is rewritten."""
    found = tmp_path_factory.mktemp("mutation") / "survivors.json"
    options = ["-q", "-p", "no:cacheprovider", "--assert=plain", "--tb=native", "--show-capture=no"]
    plugin = ["-p", "tests.verify.mutation", f"--survivors={found}"]
    tests = ["tests/verify", f"--ignore={Path(__file__).relative_to(ROOT)}"]
    command = [sys.executable, "-m", "pytest", *options, *plugin, *tests]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.exists(), ran.stdout[-4000:] + ran.stderr[-4000:]
    return dict(json.loads(found.read_text()))


def name(site: Site) -> str:
    return f"{site.module}.{site.where}: {site.text}"


def test_every_module_is_judged_or_known_to_judge_nothing() -> None:
    modules = {path.stem for path in (ROOT / "src" / "cloister" / "verify").glob("*.py")}
    assert modules == {*JUDGES, *VALUES}


def test_the_tests_are_green_with_every_check_in_force(report: dict[str, Any]) -> None:
    assert report["broken"] == []


@pytest.mark.parametrize("module", JUDGES)
def test_no_check_can_be_taken_away_unnoticed(report: dict[str, Any], module: str) -> None:
    assert report["sites"].get(module, 0) > 0
    survivors = [Site(**each) for each in report["survivors"] if each["module"] == module]
    unnoticed = [str(site) for site in survivors if name(site) not in EQUIVALENT]
    assert not unnoticed, "Nothing misses these. Give each a case that only it refuses:\n" + "\n".join(unnoticed)


def test_every_exception_is_still_one(report: dict[str, Any]) -> None:
    assert {name(Site(**each)) for each in report["survivors"]} >= set(EQUIVALENT)


# The tool itself

JUDGE = """
def judge(a, b):
    factors = [compare("a", expected="1", got=str(a), hint=""), *_faulty(b), _kind(b)]
    return sorted(factor.step for factor in factors if factor.verdict == "fail")

def _faulty(b):
    wrong = [*_faults(b)]
    wrong += [f"{b} is odd"] if b % 2 else []
    if wrong:
        yield failed("b", got="; ".join(wrong))

def _faults(b):
    if not 0 <= b < 10:
        yield "out of range"
    if b == 4 or b == 6:
        yield "unwanted"
    for bad in (2, 8):
        if b == bad:
            raise ValueError("bad")

def _kind(b):
    return failed("kind") if not _is_known(b) or _word(b) else compare("kind", expected="x", got="x", hint="")

def _is_known(b) -> bool:
    if b == 40:
        return False
    return True

def _word(b) -> str:
    return "" if b != 50 else "fifty"
"""


def judged(probe: Probe) -> dict[tuple[int, int], Any]:
    """What the rewritten judge above says of many things, with what is off now."""
    names: dict[str, Any] = {"compare": compare, "failed": failed, PROBE: probe}
    exec(compile(rewritten(JUDGE, "judge", Probe()), "judge", "exec"), names)
    found: dict[tuple[int, int], Any] = {}
    for a, b in [*((1, b) for b in (-1, 0, 1, 2, 4, 6, 8, 10, 40, 50)), (2, 0)]:
        try:
            found[a, b] = names["judge"](a, b)
        except ValueError:
            found[a, b] = "ValueError"
    return found


def test_takes_each_check_away_and_nothing_else() -> None:
    probe = Probe()
    rewritten(JUDGE, "judge", probe)
    whole, changed = judged(probe), {}
    assert whole[1, 0] == []
    assert whole[1, 40] == ["b", "kind"]
    for at, site in enumerate(probe.sites):
        probe.off = at
        without = judged(probe)
        changed[f"{site.kind}: {site.text}"] = {case for case in whole if without[case] != whole[case]}
    assert changed == {
        "verdict: compare('a', expected='1', got=str(a), hint='')": {(2, 0)},
        "fault: wrong += [f'{b} is odd'] if b % 2 else []": {(1, 1)},
        "verdict: failed('b', got='; '.join(wrong))": {(1, b) for b in (-1, 1, 4, 6, 10, 40, 50)},
        "condition: 0 <= b": set(),  # the only case below is odd too: this one would be named
        "condition: b < 10": {(1, 10), (1, 40), (1, 50)},
        "fault: yield 'out of range'": {(1, 10), (1, 40), (1, 50)},
        "condition: b == 4": {(1, 4)},
        "condition: b == 6": {(1, 6)},
        "fault: yield 'unwanted'": {(1, 4), (1, 6)},
        "member: 2": {(1, 2)},
        "member: 8": {(1, 8)},
        "fault: raise ValueError('bad')": {(1, 2), (1, 8)},
        "condition: not _is_known(b)": {(1, 40)},
        "condition: _word(b)": {(1, 50)},
        "verdict: failed('kind')": {(1, 40), (1, 50)},
        "verdict: compare('kind', expected='x', got='x', hint='')": set(),
        "answer: return False": {(1, 40)},
        "answer: return True": {(1, -1), (1, 0), (1, 1), (1, 4), (1, 6), (1, 10), (2, 0)},
        "fault: 'fifty'": {(1, 50)},
    }


def test_names_what_nobody_misses() -> None:
    probe = Probe()
    rewritten(JUDGE, "judge", probe)
    site = next(site for site in probe.sites if "odd" in site.text)
    assert str(site) == "judge.py:8: fault in _faulty: wrong += [f'{b} is odd'] if b % 2 else []"
