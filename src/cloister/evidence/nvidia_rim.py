"""Which of NVIDIA's reference manifests speak about a device, by their names in NVIDIA's RIM service.

```
NV_GPU_DRIVER_GH100_<driver>                              Hopper: one for all its boards
NV_GPU_CC_DRIVER_<chip>_<driver>                          Blackwell
NV_GPU_VBIOS_<project>_<project SKU>_<chip SKU>_<VBIOS>   the VBIOS without its dots
NV_SWITCH_BIOS_5612_0002_890_<BIOS>                       NVSwitch: the only board there is
```

Source: NVIDIA, "RIM Service" (`GET /v1/rim/{id}`), and the names that nvtrust's verifiers ask for.
"""

import re

from cloister.evidence.nvidia import GpuReport

__all__ = ["MAX_NAME", "rim_names"]

MAX_NAME = 96

_CHIP_SKU, _PROJECT, _PROJECT_SKU, _CHIP = 15, 17, 18, 35
_WORD = re.compile(r"[0-9A-Z]{1,16}")
_DRIVER = re.compile(r"[0-9]{1,8}(\.[0-9]{1,8}){1,3}")
_BLACKWELL = "GB100"
"""What NVIDIA's verifier takes where the report does not name its chip."""


def rim_names(report: GpuReport, *, product: str) -> tuple[str, ...]:
    """The driver's and the VBIOS's (a switch has no driver). `product` such as "GH100", from the device's certificate;
    the report's own words are the device's, and only as good as its signature. () where they make no such names."""
    bios = report.vbios.replace(".", "").upper()
    if product.startswith("LS"):
        return _names(f"NV_SWITCH_BIOS_5612_0002_890_{bios}", words=(bios,))
    chip = _word(report, _CHIP) or _BLACKWELL
    driver = {"GH": "NV_GPU_DRIVER_GH100_", "GB": f"NV_GPU_CC_DRIVER_{chip}_"}.get(product[:2], "")
    if not driver or not _DRIVER.fullmatch(report.driver):
        return ()
    board = (_word(report, _PROJECT), _word(report, _PROJECT_SKU), _word(report, _CHIP_SKU), bios)
    return _names(driver + report.driver, f"NV_GPU_VBIOS_{'_'.join(board)}", words=(chip, *board))


def _names(*names: str, words: tuple[str, ...]) -> tuple[str, ...]:
    return names if all(_WORD.fullmatch(word) for word in words) else ()


def _word(report: GpuReport, field: int) -> str:
    return report.opaque.get(field, b"").decode("latin-1").strip("\0 ").upper()
