"""Put together the attestation document for one nonce: statement and launch config as they are, fresh evidence."""

from cloister.enclave.attest import EvidenceSource
from cloister.evidence.binding import report_data
from cloister.evidence.document import Document, Item

__all__ = ["make_document"]


def make_document(source: EvidenceSource, *, statement: bytes, launch: bytes, nonce: bytes) -> Document:
    """`statement` and `launch` are exact bytes; `nonce` has 32, or 0 for documents that are only displayed.

    Blocks while the platform makes its evidence. Raises: MalformedEvidence for a nonce of another size, and whatever
    the source raises.
    """
    evidence = source.collect(report_data(nonce, statement))
    return Document(
        {"statement": Item("application/json", statement), "launch": Item("application/json", launch), **evidence}
    )
