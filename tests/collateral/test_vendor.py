import pytest
from tests.collateral.service import ROOT_CRL, Reply, Service

from cloister.collateral import Addresses, Key, Vendor
from cloister.errors import CloisterError, Unreachable

CHIP = "ab" * 64


@pytest.mark.parametrize(
    ("key", "address"),
    [
        (Key("intel", "pck-crl", "processor"), "https://api.trustedservices.intel.com/sgx/certification/v4/pckcrl?ca=processor&encoding=der"),
        (Key("intel", "root-crl", "sgx"), "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"),
        (Key("intel", "tcb-info", "tdx-00806f050000"), "https://api.trustedservices.intel.com/tdx/certification/v4/tcb?fmspc=00806F050000"),
        (Key("intel", "tcb-info", "sgx-00906ed50000"), "https://api.trustedservices.intel.com/sgx/certification/v4/tcb?fmspc=00906ED50000"),
        (Key("intel", "tcb-info-early", "sgx-00906ed50000"), "https://api.trustedservices.intel.com/sgx/certification/v4/tcb?fmspc=00906ED50000&update=early"),
        (Key("intel", "qe-identity", "sgx"), "https://api.trustedservices.intel.com/sgx/certification/v4/qe/identity"),
        (Key("intel", "qe-identity-early", "tdx"), "https://api.trustedservices.intel.com/tdx/certification/v4/qe/identity?update=early"),
        (Key("amd", "vcek-ca", "milan"), "https://kdsintf.amd.com/vcek/v1/Milan/cert_chain"),
        (Key("amd", "vlek-crl", "turin"), "https://kdsintf.amd.com/vlek/v1/Turin/crl"),
        (Key("amd", "vcek", f"genoa-{CHIP}-0a01000000001754"), f"https://kdsintf.amd.com/vcek/v1/Genoa/{CHIP}?blSPL=10&teeSPL=01&snpSPL=23&ucodeSPL=84"),
        (Key("amd", "vcek", f"turin-{CHIP[:16]}-020301040000004d"), f"https://kdsintf.amd.com/vcek/v1/Turin/{CHIP[:16]}?fmcSPL=02&blSPL=03&teeSPL=01&snpSPL=04&ucodeSPL=77"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_each_piece_has_the_vendors_own_address(key: Key, address: str) -> None:
    assert Addresses().of(key) == address


def test_an_operators_pccs_has_the_same_paths_and_the_roots_list_too() -> None:
    pccs = Addresses(intel="https://pccs.example:8081/")
    assert pccs.of(Key("intel", "qe-identity", "tdx")) == "https://pccs.example:8081/tdx/certification/v4/qe/identity"
    assert pccs.of(Key("intel", "root-crl", "sgx")) == "https://pccs.example:8081/sgx/certification/v4/rootcacrl"


@pytest.mark.parametrize("body", [b"\x30\x03abc", b"3003616263", b"3003616263\n"])
def test_a_list_in_hexadecimal_is_read(service: Service, vendor: Vendor, body: bytes) -> None:
    service.serve({ROOT_CRL: Reply(body)})
    answer = vendor.get(Key("intel", "root-crl", "sgx"))
    assert answer is not None
    assert answer.body == b"\x30\x03abc"


def test_a_clouds_certificate_is_not_asked_for(service: Service, vendor: Vendor) -> None:
    with pytest.raises(Unreachable):
        vendor.get(Key("amd", "vlek", f"milan-{CHIP}-{'00' * 8}"))
    assert service.requests == []


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "a_b", "-a", "a--b", "a.json", "a\n", "\u0661"])
def test_a_key_cannot_lead_out_of_its_folder(name: str) -> None:
    for parts in ((name, "k", "p"), ("v", name, "p"), ("v", "k", name)):
        with pytest.raises(CloisterError):
            Key(*parts)
