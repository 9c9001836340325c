import asyncio
import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace

import pytest
from tests.enclave.attest.fakes import sev
from tests.vendors import amd

from cloister.channel.bhttp import Request
from cloister.channel.keys import KeyRing
from cloister.enclave.attest.detect import Machine, detect, open_source
from cloister.enclave.attestation import Attestation, check_launch
from cloister.enclave.boot import EnclaveConfig
from cloister.enclave.gateway.certificate import LIFE, TlsKey
from cloister.enclave.llm.engine import EngineInfo, ModelInfo
from cloister.errors import EngineDied, NotTrusted
from cloister.evidence.binding import gpu_nonce, report_data
from cloister.evidence.document import Item, parse_document
from cloister.evidence.endorsements import MEDIA_TYPE, Endorsements, parse_endorsements
from cloister.evidence.launch import App, LaunchConfig
from cloister.evidence.statement import Statement, parse_statement
from cloister.verify import sev_snp
from cloister.verify.policy import Policy

CONFIG = EnclaveConfig(platform="sim").encode()
LAUNCH = LaunchConfig(
    owner_key="ed25519:" + "A" * 43,
    deployment="here",
    release=1,
    app=App("llm", "00" * 32),
    models=("aa" * 32,),
    config_sha256=hashlib.sha256(CONFIG).hexdigest(),
).encode()
INFO = EngineInfo(
    sha256="ee" * 32,
    variant="native",
    model=ModelInfo("m", "aa" * 32, "Q8_0", "llama", 1, 1, 64, has_chat_template=True),
    slots=1,
)


class Hardware:
    """Says what it was told; `cpu` holds the report data alone."""

    platform = "sim"

    def __init__(self, launch: bytes = LAUNCH) -> None:
        self._launch = launch
        self.nonces: list[bytes] = []

    def fix_launch(self, launch: bytes) -> None:
        if launch != self._launch:
            raise NotTrusted("another launch config")

    def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
        self.nonces.append(nonce)
        return {"cpu": Item("application/cbor", report_data)}


def test_takes_the_launch_config_that_stands_in_hardware() -> None:
    assert check_launch(LAUNCH, CONFIG, Hardware()).deployment == "here"


@pytest.mark.parametrize("name", ["launch", "config"])
def test_refuses_another_launch_config_than_the_hardwares(name: str) -> None:
    other = LAUNCH.replace(b"here", b"there")
    told = {"launch": (other, CONFIG), "config": (LAUNCH, EnclaveConfig(platform="sim", padding=False).encode())}[name]
    with pytest.raises(NotTrusted):
        check_launch(*told, Hardware())


def test_evidence_binds_the_nonce_and_the_exact_statement() -> None:
    attestation = Attestation(Hardware(), KeyRing(time.time()), LAUNCH, lambda: INFO, ())
    items = parse_document(asyncio.run(attestation.document(bytes(32)))).items
    assert items["cpu"].content == report_data(bytes(32), items["statement"].content)
    assert items["launch"].content == LAUNCH


class Gpus:
    """Two GPUs that answer with the nonce they were asked with."""

    def collect(self, nonce: bytes) -> Mapping[str, Item]:
        return {f"gpu-{at}": Item("application/cbor", bytes([at]) + nonce) for at in range(2)}


def test_gpus_are_asked_first_and_covered_by_the_cpus_evidence() -> None:
    hardware = Hardware()
    attestation = Attestation(hardware, KeyRing(time.time()), LAUNCH, lambda: INFO, (), gpus=Gpus())
    nonce = bytes(range(32))
    items = parse_document(asyncio.run(attestation.document(nonce))).items
    statement, gpus = items["statement"].content, [items[f"gpu-{at}"].content for at in range(2)]
    assert gpus == [bytes([at]) + gpu_nonce(nonce, statement) for at in range(2)]
    assert items["cpu"].content == report_data(nonce, statement, gpus)
    assert hardware.nonces == [nonce]


WHOLE, LEAF = (b"leaf", b"ca", b"root"), (b"leaf",)


@pytest.mark.parametrize(
    ("own", "shipped", "given"),
    [
        (None, Endorsements(intel=b"{}"), Endorsements(intel=b"{}")),
        (Endorsements(amd=WHOLE), None, Endorsements(amd=WHOLE)),
        # A host's table gives the chain without a revocation list: with the operator's, a client needs no network.
        (Endorsements(amd=WHOLE), Endorsements(amd_crl=b"new"), Endorsements(amd=WHOLE, amd_crl=b"new")),
        (Endorsements(amd=WHOLE), Endorsements(amd=(b"1", b"2", b"3")), Endorsements(amd=WHOLE)),
        (Endorsements(amd=LEAF), Endorsements(amd=(b"1", b"2", b"3")), Endorsements(amd=(b"1", b"2", b"3"))),
        (Endorsements(amd=LEAF), Endorsements(amd_crl=b"new"), Endorsements(amd=LEAF, amd_crl=b"new")),
        (Endorsements(amd_crl=b"old"), Endorsements(amd_crl=b"new"), Endorsements(amd_crl=b"new")),
        (Endorsements(amd_crl=b"old"), Endorsements(tpm_crls=(b"tpm",)), Endorsements(amd_crl=b"old", tpm_crls=(b"tpm",))),
    ],
    ids=lambda value: None,
)  # fmt: skip
def test_the_operators_collateral_completes_the_drivers(
    own: Endorsements | None, shipped: Endorsements | None, given: Endorsements
) -> None:
    class Endorsed(Hardware):
        def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
            items = super().collect(report_data)
            return items if own is None else {**items, "endorsements": own.item()}

    attestation = Attestation(
        Endorsed(), KeyRing(time.time()), LAUNCH, lambda: INFO, (),
        endorsements=lambda: shipped.item().content if shipped else b"",
    )  # fmt: skip
    item = parse_document(asyncio.run(attestation.document(b""))).items["endorsements"]
    assert parse_endorsements(item.content) == given
    assert item.media_type == MEDIA_TYPE


def test_a_simulators_own_endorsements_stay_what_they_are() -> None:
    own = Item("application/x-other", b"own")

    class Simulator(Hardware):
        def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
            return {**super().collect(report_data), "endorsements": own}

    shipped = Endorsements(intel=b"{}").item().content
    attestation = Attestation(Simulator(), KeyRing(time.time()), LAUNCH, lambda: INFO, (), endorsements=lambda: shipped)
    assert parse_document(asyncio.run(attestation.document(b""))).items["endorsements"] == own


def test_an_snp_host_without_a_revocation_list_and_an_operator_with_one_satisfy_the_default_policy() -> None:
    vendor = sev.genuine()
    firmware = sev.Firmware(table=sev.whole_table())
    kernel = sev.machine(firmware, tsm=sev.tsm_of(firmware))
    source = open_source(detect(Machine(device=kernel)), Machine(device=kernel))
    shipped = Endorsements(amd_crl=vendor.crl).item().content

    def verdict(endorsements: bytes) -> str:
        attestation = Attestation(
            source, KeyRing(time.time()), LAUNCH, lambda: INFO, (), endorsements=lambda: endorsements
        )
        items = parse_document(asyncio.run(attestation.document(b""))).items
        given = parse_endorsements(items["endorsements"].content)
        judged = sev_snp.judge(
            items["cpu"].content, given.amd, given.amd_crl, policy=Policy(), now=amd.NOW, roots=vendor.roots
        )
        return {factor.step: factor.verdict for factor in judged.factors}["evidence.crl"]

    assert (verdict(b""), verdict(shipped)) == ("fail", "pass")


def test_the_statement_names_the_engine_that_runs_now() -> None:
    running = [INFO]
    attestation = Attestation(Hardware(), KeyRing(time.time()), LAUNCH, lambda: running[-1], ("padding-off",))

    def said() -> bytes:
        return parse_document(asyncio.run(attestation.document(b""))).items["statement"].content

    before = said()
    assert said() == before
    running.append(replace(INFO, variant="no-extra-buffers"))  # a restart fell back to it
    after = parse_statement(said())
    assert (after.engine.variant, after.insecure) == ("no-extra-buffers", ("padding-off",))
    assert after.ohttp_keys == parse_statement(before).ohttp_keys


@pytest.mark.parametrize("lineage", [None, "cc" * 32])
def test_the_statement_names_the_record_of_the_models_lineage_where_there_is_one(lineage: str | None) -> None:
    attestation = Attestation(Hardware(), KeyRing(time.time()), LAUNCH, lambda: INFO, (), lineage_sha256=lineage)
    (model,) = parse_statement(parse_document(asyncio.run(attestation.document(b""))).items["statement"].content).models
    assert (model.sha256, model.lineage_sha256) == (INFO.model.sha256, lineage)


def test_the_statement_lists_the_key_for_ehbp_where_it_is_spoken_and_follows_its_rotation() -> None:
    def said(ring: KeyRing, now: float) -> bytes | None:
        attestation = Attestation(Hardware(), ring, LAUNCH, lambda: INFO, (), clock=lambda: now)
        document = asyncio.run(attestation.document(b""))
        return parse_statement(parse_document(document).items["statement"].content).ehbp_key

    ring = KeyRing(0.0, ehbp=True)
    first = said(ring, 0.0)
    assert first is not None
    assert first == ring.ehbp_key
    assert said(ring, 1900.0) == ring.ehbp_key != first
    assert said(KeyRing(0.0), 0.0) is None


def test_the_statement_names_the_key_that_ends_tls_and_follows_its_rotation_on_a_day() -> None:
    key = TlsKey(("https://localhost:8443",), 0.0)
    ring = KeyRing(0.0)
    now = 0.0
    attestation = Attestation(Hardware(), ring, LAUNCH, lambda: INFO, ("tls",), tls=key, clock=lambda: now)

    def said() -> Statement:
        return parse_statement(parse_document(asyncio.run(attestation.document(b""))).items["statement"].content)

    first = said()
    assert (first.tls_spki, first.aud) == (key.spki_sha256, ("https://localhost:8443",))
    now = LIFE - 1
    assert said().tls_spki == first.tls_spki
    now = LIFE
    assert said().tls_spki == key.spki_sha256 != first.tls_spki
    without = Attestation(Hardware(), ring, LAUNCH, lambda: INFO, (), clock=lambda: now)
    statement = parse_statement(parse_document(asyncio.run(without.document(b""))).items["statement"].content)
    assert (statement.tls_spki, statement.aud) == (None, ())


class Clocked:
    """An attestation whose clock and engine a test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.info: EngineInfo | None = INFO
        self.attestation = Attestation(Hardware(), KeyRing(0.0), LAUNCH, self._engine, (), clock=lambda: self.now)

    def _engine(self) -> EngineInfo:
        if self.info is None:
            raise EngineDied("it is being restarted")
        return self.info

    def statement(self) -> str:
        document = asyncio.run(self.attestation.document(b""))
        return hashlib.sha256(parse_document(document).items["statement"].content).hexdigest()

    def gives(self, *named: str) -> bool:
        headers = tuple((b"cloister-receipt", name.encode()) for name in named)
        request = Request("POST", "https", "enclave.invalid", "/", headers, b"x")
        return self.attestation.receipt(request) is not None


def test_receipts_name_a_statement_that_is_valid_the_one_before_too() -> None:
    clocked = Clocked()
    first = clocked.statement()
    assert clocked.gives(first)
    assert not clocked.gives()
    assert not clocked.gives(first, first)
    assert not clocked.gives("00" * 32)
    clocked.now = 1900.0
    second = clocked.statement()
    assert first != second
    assert clocked.gives(first)
    assert clocked.gives(second)
    clocked.now = 3700.0
    assert not clocked.gives(first)
    assert clocked.gives(second)


def test_statements_that_are_over_are_forgotten() -> None:
    clocked = Clocked()
    for _ in range(9):
        clocked.statement()
        clocked.now += 1900.0
    assert len(clocked.attestation._valid) <= 2


def test_no_receipt_names_a_statement_about_an_engine_that_is_no_more() -> None:
    clocked = Clocked()
    first = clocked.statement()
    clocked.info = replace(INFO, variant="no-extra-buffers")
    assert not clocked.gives(first)
    assert clocked.gives(clocked.statement())


def test_a_receipt_is_no_reason_to_fail_while_the_engine_is_away() -> None:
    clocked = Clocked()
    first = clocked.statement()
    clocked.info = None
    assert clocked.gives(first)
    clocked.now = 3601.0
    assert not clocked.gives(first)
