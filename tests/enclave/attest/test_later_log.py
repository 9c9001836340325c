import hashlib
import json

import pytest
from tests.vendors.tpm import event, event_log, extended

from cloister.enclave.attest.later_log import explains, with_later
from cloister.evidence.eventlog import parse_eventlog

LOG = event_log(event(11, b"section"))


def record(word: str = "ready", digest: str = "", **changes: object) -> bytes:
    value = digest or hashlib.sha256(word.encode()).hexdigest()
    said = {"pcr": 11, "digests": [{"hashAlg": "sha256", "digest": value}], "content": {"string": word}}
    return b"\x1e" + json.dumps({**said, **changes}).encode() + b"\n"


def test_each_record_becomes_an_event() -> None:
    whole = with_later(LOG, record("enter-initrd") + record("ready"))
    assert [one.data for one in parse_eventlog(whole).events] == [b"section", b"enter-initrd", b"ready"]
    assert explains(whole, {11: extended(b"section", b"enter-initrd", b"ready")})
    assert not explains(whole, {11: extended(b"section", b"enter-initrd")})


@pytest.mark.parametrize(
    "records",
    [
        record(digest="00" * 31),
        record(digest="xy" * 32),
        record(digests=[{"hashAlg": "sha1", "digest": "00" * 20}]),
        record(digests=None),
        record(content={}),
        record(content=[]),
        record(pcr=-1),
        record(pcr="11"),
        record() + b"\x1e{",
        b"\x1e" + b"[" * 100_000,
    ],
    ids=range(10),
)
def test_a_record_of_another_kind_adds_nothing(records: bytes) -> None:
    assert with_later(LOG, record("enter-initrd") + records) == LOG


def test_what_is_no_log_stays_as_it_is_and_explains_nothing() -> None:
    assert with_later(b"no log", record()) == b"no log"
    assert not explains(b"no log", {})
    assert not explains(event_log(), {})
