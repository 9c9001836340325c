from dataclasses import replace

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import MalformedEvidence
from cloister.evidence.simulated import (
    SimBody,
    combined_measurement,
    endorsements_item,
    parse_chain,
    parse_report,
    report_item,
)

COMPONENTS = {"code": "sha256:00", "interpreter": "cpython 3.11.7 sha256:11", "engine": "sha256:22"}
BODY = SimBody(bytes(64), bytes(32), COMPONENTS, combined_measurement(COMPONENTS))
REPORT = report_item(BODY.encode(), bytes(96)).content


def report(**changes: object) -> bytes:
    return report_item(cbor2.dumps({**cbor2.loads(BODY.encode()), **changes}), bytes(96)).content


def test_round_trips() -> None:
    parsed = parse_report(REPORT)
    assert (parsed.body, parsed.encoded, parsed.signature) == (BODY, BODY.encode(), bytes(96))


def test_the_combined_measurement_depends_on_each_component() -> None:
    values = {combined_measurement({**COMPONENTS, name: "other"}) for name in COMPONENTS}
    assert len(values | {combined_measurement(COMPONENTS)}) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"v": True},
        {"v": 1.0},
        {"report_data": bytes(63)},
        {"report_data": "x" * 64},
        {"launch_sha256": bytes(33)},
        {"measurement": None},
        {"components": {}},
        {"components": {**COMPONENTS, "more": "x"}},
        {"components": {**COMPONENTS, "code": b"x"}},
        {"components": {**COMPONENTS, "code": ""}},
        {"components": {**COMPONENTS, "code": "x\x1b[0m"}},
        {"components": {**COMPONENTS, "code": "x\n"}},
        {"components": {**COMPONENTS, "code": "x" * 257}},
        {"components": ["code"]},
        {"more": 1},
    ],
)
def test_refuses_bodies_of_another_shape(changes: dict[str, object]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_report(report(**changes))


@pytest.mark.parametrize("size", [0, 95, 97, 104])
def test_refuses_signatures_of_another_size(size: int) -> None:
    with pytest.raises(MalformedEvidence):
        parse_report(report_item(BODY.encode(), bytes(size)).content)


@pytest.mark.parametrize(
    "data",
    [
        REPORT + b"\0",
        b"\xbf" + REPORT[1:] + b"\xff",
        b"\xb8\x02" + REPORT[1:],
        b"\xd9\xd9\xf7" + REPORT,
        b"\xd8\x1c" + REPORT,
        b"\xa2\x64body\x01\x64body\x01",
        b"\xa1\xa0\x01",
        b"\x81" * 70_000,
        b"\x80",
        bytes(65_537),
    ],
    ids=["trailing", "indefinite", "long form", "tag", "shared", "repeated", "odd key", "deep", "list", "too long"],
)
def test_refuses_cbor_that_is_not_strict(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_report(data)


def test_refuses_truncation_everywhere() -> None:
    for length in range(len(REPORT)):
        with pytest.raises(MalformedEvidence):
            parse_report(REPORT[:length])
    body = BODY.encode()
    for length in range(len(body)):
        with pytest.raises(MalformedEvidence):
            parse_report(report_item(body[:length], bytes(96)).content)


def test_a_component_may_not_be_missing_when_a_report_is_made() -> None:
    with pytest.raises(KeyError):
        replace(BODY, components={"code": "x"}).encode()


def test_reads_the_chain() -> None:
    assert parse_chain(endorsements_item([b"one", b"two"]).content) == (b"one", b"two")


@pytest.mark.parametrize("chain", [[], [b""] * 5, ["x"], {}, b"x", None])
def test_refuses_chains_of_another_shape(chain: object) -> None:
    with pytest.raises(MalformedEvidence):
        parse_chain(cbor2.dumps({"chain": chain}))


@given(st.binary(max_size=120))
def test_is_total_over_bytes(data: bytes) -> None:
    for parse in (parse_report, parse_chain):
        with pytest.raises(MalformedEvidence):
            parse(data)


@given(data=st.data())
def test_is_total_over_mangled_reports(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(REPORT)))
    mangled = REPORT[:at] + data.draw(st.binary(max_size=6)) + REPORT[at + data.draw(st.integers(0, 6)) :]
    try:
        parse_report(mangled)
    except MalformedEvidence:
        return
