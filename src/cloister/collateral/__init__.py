"""What vendors publish about their hardware: taken from the document, a disk cache or the vendor, and checked before use."""

from cloister.collateral.completion import Completed, Found, Progress, Reviewed, complete, review
from cloister.collateral.pieces import Answer, CollateralSource, Key, Piece
from cloister.collateral.store import Cache, Entry
from cloister.collateral.vendor import AMD_KDS, INTEL_PCS, NVIDIA_RIM, Addresses, Vendor

__all__ = [
    "AMD_KDS",
    "INTEL_PCS",
    "NVIDIA_RIM",
    "Addresses",
    "Answer",
    "Cache",
    "CollateralSource",
    "Completed",
    "Entry",
    "Found",
    "Key",
    "Piece",
    "Progress",
    "Reviewed",
    "Vendor",
    "complete",
    "review",
]
