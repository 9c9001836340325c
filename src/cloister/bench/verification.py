"""How long one judgement of recorded evidence takes, the same bytes again and again."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister.errors import WrongUse
from cloister.evidence.sev_snp import pem_or_der_certificates
from cloister.verify import Factor, Limits, Policy, Tcb, intel, sev_snp

__all__ = ["Timing", "find", "measure"]

_POLICY = Policy(tcb=Tcb(min_sev_snp={"snp": 0}), limits=Limits(dangerously_allow_missing_crl=True))
_TDX = b"\x81\0\0\0"

Judgement = Callable[[], tuple[Factor, ...]]


@dataclass(frozen=True, slots=True)
class Timing:
    """`seconds` of each judgement, parsing and all signatures included. `failed`: the steps that did not hold."""

    case: str
    platform: str
    seconds: tuple[float, ...]
    failed: tuple[str, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        return {
            "case": self.case,
            "platform": self.platform,
            "runs": len(ordered),
            "median_ms": self.median * 1000,
            "p95_ms": ordered[int(len(ordered) * 0.95)] * 1000,
            "failed": list(self.failed),
        }


def find(folder: Path) -> Iterator[tuple[str, str, Judgement]]:
    """Every case below `folder` with a quote (`quote.bin`, `collateral.json`) or an AMD report (`report.bin`, `leaf.der`,
    `ask_ark.pem`), by name, with its platform and what judges it; `case.json` says at what time.

    Raises: WrongUse when there is none.
    """
    cases = [path.parent for path in sorted(folder.rglob("case.json"))]
    found = [(str(case.relative_to(folder)), *judged) for case in cases if (judged := _judgement(case)) is not None]
    if not found:
        raise WrongUse(
            "There is no recorded evidence to judge.",
            hint="A case is a folder with case.json and quote.bin, collateral.json or report.bin, leaf.der, ask_ark.pem.",
        )
    yield from found


def measure(case: str, platform: str, judge: Judgement, runs: int) -> Timing:
    """The first judgement is not counted."""
    factors = judge()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        judge()
        seconds.append(time.perf_counter() - began)
    return Timing(case, platform, tuple(seconds), tuple(one.step for one in factors if one.verdict == "fail"))


def _judgement(case: Path) -> tuple[str, Judgement] | None:
    def read(name: str) -> bytes:
        return (case / name).read_bytes()

    names = {path.name for path in case.iterdir()}
    now = json.loads(read("case.json")).get("now")
    at = time.time() if now is None else float(now)
    if {"quote.bin", "collateral.json"} <= names:
        quote, collateral = read("quote.bin"), read("collateral.json")
        root = read("root.der") if "root.der" in names else None
        platform, judge = ("tdx", intel.judge_tdx) if quote[4:8] == _TDX else ("sgx", intel.judge_sgx)
        return platform, lambda: judge(quote, collateral, policy=_POLICY, now=at, root=root).factors
    if {"report.bin", "leaf.der", "ask_ark.pem"} <= names:
        report, chain = read("report.bin"), (read("leaf.der"), *pem_or_der_certificates(read("ask_ark.pem")))
        return "sev-snp", lambda: sev_snp.judge(report, chain, None, policy=_POLICY, now=at).factors
    return None
