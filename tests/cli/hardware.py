"""Saved documents of synthetic machines (Intel TDX, AMD SEV-SNP): what `cloister verify FILE` is given; and a policy.

Their roots are trusted only where a test puts them in the place of the vendors' (`trusting_the_synthetic_root`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from tests.vendors import amd, intel
from tests.verify.world import LAUNCH, MODEL, NONCE, NOW, OWNER, STATEMENT

from cloister.cli.verify import Saved
from cloister.evidence.binding import report_data
from cloister.evidence.document import Document, Item
from cloister.evidence.endorsements import Endorsements
from cloister.evidence.launch import launch_digest
from cloister.verify import verify
from cloister.verify.roots import PINNED

__all__ = ["POLICY", "document", "out_of_date", "save", "snp_document", "trusting_the_synthetic_root"]

MR_TD, RTMR1, RTMR2 = "d2" * 48, "a1" * 48, "a2" * 48
POLICY = f"""\
version = 1
deployment = "{LAUNCH.deployment}"
owner_key = "{OWNER}"
models = ["sha256:{MODEL}"]
config = "sha256:{LAUNCH.config_sha256}"
app = "sha256:{LAUNCH.app.sha256}"
platforms = ["tdx"]

[measurements]
tdx = [{{ mr_td = "{MR_TD}", rtmr1 = "{RTMR1}", rtmr2 = "{RTMR2}" }}]
"""
DEBUG = (1 << 28 | 1).to_bytes(8, "little")


def document(vendor: intel.Intel | None = None, *, launch: Any = LAUNCH, **settings: Any) -> Document:
    """Genuine but for `settings`, which are those of `tests.vendors.intel`."""
    digest = launch_digest(launch.encode())
    statement = replace(STATEMENT, launch_sha256=digest.hex()).encode()
    report = {
        "report_data": report_data(NONCE, statement),
        "mr_config_id": digest + bytes(16),
        **settings.pop("report", {}),
    }
    evidence = (vendor or intel.intel()).make(platform="tdx", version=4, report=report, **settings)
    return Document(
        {
            "statement": Item("application/json", statement),
            "launch": Item("application/json", launch.encode()),
            "cpu": Item("application/octet-stream", evidence.quote),
            "endorsements": Endorsements(intel=evidence.collateral).item(),
        }
    )


def out_of_date(**settings: Any) -> Document:
    old = intel.level("OutOfDate", tdx=bytes([5, 0, 5, *([0] * 13)]), advisoryIDs=["INTEL-SA-00837"])
    return document(tcb_info={"tcbLevels": [{**old, "tcbDate": "2025-02-12T00:00:00Z"}]}, **settings)


def snp_document() -> Document:
    digest = launch_digest(LAUNCH.encode())
    statement = STATEMENT.encode()
    evidence = amd.make(report_data=report_data(NONCE, statement), host_data=digest)
    return Document(
        {
            "statement": Item("application/json", statement),
            "launch": Item("application/json", LAUNCH.encode()),
            "cpu": Item("application/octet-stream", evidence.report),
            "endorsements": Endorsements(amd=evidence.chain, amd_crl=evidence.crl).item(),
        }
    )


def save(path: Path, made: Document, at: float = NOW) -> Path:
    path.write_text(Saved(made.encode(), NONCE, at).encode())
    return path


@contextmanager
def trusting_the_synthetic_root() -> Iterator[None]:
    roots = replace(PINNED, intel=intel.tdx().root, amd=amd.make().roots)
    with mock.patch("cloister.cli.verify.judge", partial(verify, roots=roots)):
        yield
