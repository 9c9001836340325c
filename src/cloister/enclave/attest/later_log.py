"""What systemd measured into the TPM once the firmware's log had ended, as further events of that log.

Without them the log does not explain a PCR that both measure into: 11, of a unified kernel image.

Source: systemd, `tpm2_userspace_log` in `src/shared/tpm2-util.c`: records of TCG's "Canonical Event Log Format" as JSON
text sequences (RFC 7464), one for each extend, in their order.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from cloister.errors import MalformedEvidence
from cloister.evidence.eventlog import EV_IPL, EventLog, parse_eventlog, replay_pcrs
from cloister.evidence.tpm import hash_name

__all__ = ["LATER_LOG", "explains", "with_later"]

LATER_LOG = "/run/log/systemd/tpm2-measure.log"

_SEPARATOR = b"\x1e"


def with_later(log: bytes, records: bytes) -> bytes:
    """`log` (a TCG event log) and an event for each record; `log` as it is where it, or a record, is of another kind."""
    try:
        parsed = parse_eventlog(log)
        return log + b"".join(_event(record, parsed) for record in _records(records))
    except (MalformedEvidence, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
        return log


def explains(log: bytes, pcrs: Mapping[int, bytes]) -> bool:
    """Whether the log replays into these values. A verifier refuses evidence whose log does not."""
    try:
        replayed = replay_pcrs(parse_eventlog(log))
    except MalformedEvidence:
        return False
    return bool(replayed) and all(pcrs.get(index) == value for index, value in replayed.items())


def _records(records: bytes) -> Iterator[Mapping[str, Any]]:
    for text in records.split(_SEPARATOR):
        if text.strip():
            yield json.loads(text)


def _event(record: Mapping[str, Any], log: EventLog) -> bytes:
    told = {one["hashAlg"]: bytes.fromhex(one["digest"]) for one in record["digests"]}
    digests = [(algorithm, told[hash_name(algorithm)], size) for algorithm, size in log.algorithms.items()]
    if any(len(digest) != size for _, digest, size in digests):
        raise ValueError("a digest of another length")
    data = str(record["content"]["string"]).encode()
    packed = b"".join(struct.pack("<H", algorithm) + digest for algorithm, digest, _ in digests)
    return struct.pack("<III", record["pcr"], EV_IPL, len(digests)) + packed + struct.pack("<I", len(data)) + data
