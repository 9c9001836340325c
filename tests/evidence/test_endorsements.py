import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import MalformedEvidence
from cloister.evidence.endorsements import MAX_RIMS, Endorsements, parse_endorsements

FULL = Endorsements(
    intel=b"{}", amd=(b"leaf", b"ca", b"root"), amd_crl=b"crl", tpm_crls=(b"one", b"two"),
    rims={"NV_GPU_DRIVER_GH100_590.12": b"<a/>", "NV_GPU_VBIOS_G520_0200_885_9600A50001": b"<b/>"},
)  # fmt: skip


@pytest.mark.parametrize("given", [Endorsements(), FULL])
def test_what_is_written_is_read(given: Endorsements) -> None:
    assert parse_endorsements(given.item().content) == given


@pytest.mark.parametrize(
    "rims",
    [
        [b"<a/>"],
        {"NV_A": ""},
        {"NV_A": b""},
        {1: b"<a/>"},
        {"nv_a": b"<a/>"},
        {"NV_": b"<a/>"},
        {"NV_A/../B": b"<a/>"},
        {"NV_" + "A" * 94: b"<a/>"},
        {f"NV_{at}": b"<a/>" for at in range(MAX_RIMS + 1)},
    ],
    ids=repr,
)
def test_manifests_are_few_and_have_nvidias_names(rims: object) -> None:
    with pytest.raises(MalformedEvidence) as refused:
        parse_endorsements(cbor2.dumps({"rims": rims}))
    assert refused.value.step.startswith("endorsements")


def test_as_many_manifests_as_there_may_be() -> None:
    most = {f"NV_{at}": b"<a/>" for at in range(MAX_RIMS)}
    assert parse_endorsements(cbor2.dumps({"rims": most})).rims == most


@given(
    st.binary(max_size=200)
    | st.dictionaries(st.sampled_from(["rims", "amd"]), st.dictionaries(st.text() | st.integers(), st.binary())).map(
        cbor2.dumps
    )
)
def test_whatever_it_holds_only_our_error_escapes(content: bytes) -> None:
    try:
        parse_endorsements(content)
    except MalformedEvidence as error:
        assert error.step
