import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.enclave.attest.fakes.azure import FakeMetadata, Paravisor
from tests.enclave.attest.fakes.kernel import FakeKernel
from tests.enclave.attest.fakes.sev import genuine
from tests.vendors import amd, intel

from cloister.enclave.attest import EvidenceSource
from cloister.enclave.attest.azure import AK_HANDLE, USER_DATA_INDEX, AzureCvm, MetadataService, read_hcl
from cloister.enclave.attest.tpm import Tpm, Vtpm, extend_launch
from cloister.errors import CloisterError, ConnectionFailed, MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.azure import SNP, TDX, parse_runtime
from cloister.evidence.endorsements import parse_endorsements
from cloister.evidence.tpm import parse_tpm
from cloister.verify import azure as azure_verifier
from cloister.verify import sev_snp
from cloister.verify.intel import judge_tdx
from cloister.verify.policy import Policy, Tcb

DATA = bytes(range(64))
LAUNCH = b'{"v":1}'


def source_on(paravisor: Paravisor, metadata: FakeMetadata | None = None) -> AzureCvm:
    vtpm = Vtpm(FakeKernel(), Tpm(paravisor.tpm), ak_handle=AK_HANDLE)
    return AzureCvm(vtpm, paravisor.kind, metadata or FakeMetadata(), pause=lambda _: None)


def test_collects_what_the_verifier_accepts_on_sev_snp() -> None:
    source = source_on(Paravisor())
    seam: EvidenceSource = source
    extend_launch(source.vtpm.tpm, LAUNCH)
    items = source.collect(DATA)
    assert seam.platform == "azure-sev-snp"
    assert items.keys() == {"cpu", "runtime", "tpm", "endorsements"}
    vendor = genuine()
    chain = parse_endorsements(items["endorsements"].content).amd
    hardware = sev_snp.judge(
        items["cpu"].content,
        chain,
        vendor.crl,
        policy=Policy(tcb=Tcb(min_sev_snp={"snp": 0})),
        now=amd.NOW,
        roots=vendor.roots,
    )
    judged = azure_verifier.judge(
        hardware,
        items["runtime"].content,
        parse_tpm(items["tpm"].content),
        qualifying_data=hashlib.sha256(items["cpu"].content).digest(),
        policy=Policy(),
        now=amd.NOW,
        launch=LAUNCH,
    )
    assert judged.report_data == DATA
    assert judged.launch_sha256 == hashlib.sha256(LAUNCH).digest()
    assert not [factor for factor in judged.factors if factor.verdict == "fail"]


@pytest.mark.parametrize("metadata", [FakeMetadata(), FakeMetadata(padded=True), FakeMetadata(padding=bytes(900))])
def test_collects_a_quote_of_the_tdreport_on_tdx(metadata: FakeMetadata) -> None:
    source = source_on(Paravisor(kind=TDX), metadata)
    items = source.collect(DATA)
    assert source.platform == "azure-tdx"
    assert items.keys() == {"cpu", "runtime", "tpm"}
    vendor = intel.tdx()
    hardware = judge_tdx(items["cpu"].content, vendor.collateral, policy=Policy(), now=intel.NOW, root=vendor.root)
    judged = azure_verifier.judge(
        hardware,
        items["runtime"].content,
        parse_tpm(items["tpm"].content),
        qualifying_data=hashlib.sha256(items["cpu"].content).digest(),
        policy=Policy(),
        now=intel.NOW,
    )
    assert judged.report_data == DATA
    assert not [factor for factor in judged.factors if factor.verdict == "fail"]


def test_anything_but_zeros_after_the_td_quote_is_refused() -> None:
    with pytest.raises(MalformedEvidence, match="after its end"):
        source_on(Paravisor(kind=TDX), FakeMetadata(padding=b"\0\1")).collect(DATA)


def test_waits_for_a_paravisor_that_is_late() -> None:
    paravisor = Paravisor(late=5)
    items = source_on(paravisor).collect(DATA)
    assert parse_runtime(items["runtime"].content).user_data == DATA


def test_never_gives_out_the_report_over_an_older_question() -> None:
    with pytest.raises(ConnectionFailed, match="user data"):
        source_on(Paravisor(deaf=True)).collect(DATA)


def test_one_question_at_a_time_goes_through_the_nv_index() -> None:
    source = replace(source_on(Paravisor(slow=3)), pause=lambda _: time.sleep(0.002))
    failures: list[BaseException] = []

    def ask(index: int) -> None:
        try:
            items = source.collect(bytes([index]) * 64)
            assert parse_runtime(items["runtime"].content).user_data == bytes([index]) * 64
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_hardware_that_vouches_for_other_runtime_data_is_refused() -> None:
    other = Paravisor(hardware=lambda _: amd.make(report_data=bytes(64)).report)
    with pytest.raises(MalformedEvidence, match="other runtime data"):
        source_on(other).collect(DATA)


def test_a_report_of_another_kind_than_before_is_refused() -> None:
    paravisor = Paravisor(kind=TDX)
    source = AzureCvm(Vtpm(FakeKernel(), Tpm(paravisor.tpm), ak_handle=AK_HANDLE), SNP, FakeMetadata())
    with pytest.raises(MalformedEvidence, match="another kind"):
        source.collect(DATA)


def test_while_the_service_is_down_the_certificates_are_left_for_others_to_give() -> None:
    items = source_on(Paravisor(), FakeMetadata(down=True)).collect(DATA)
    assert items.keys() == {"cpu", "runtime", "tpm"}


def test_without_the_service_there_is_no_td_quote() -> None:
    with pytest.raises(ConnectionFailed):
        source_on(Paravisor(kind=TDX), FakeMetadata(down=True)).collect(DATA)


@pytest.mark.parametrize("kind", [SNP, TDX])
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b'{"quote": 1, "vcekCert": 1}',
        b'{"quote": "!!", "vcekCert": "", "certificateChain": ""}',
        b'{"quote": "AAAA", "vcekCert": "\xc3\xa9", "certificateChain": ""}',
        json.dumps({"quote": "é"}).encode(),
    ],
)
def test_answers_of_another_form_are_refused(kind: int, answer: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        source_on(Paravisor(kind=kind), FakeMetadata(answer=answer)).collect(DATA)


@given(st.binary(max_size=100))
def test_whatever_the_paravisor_reports_only_our_errors_escape(junk: bytes) -> None:
    paravisor = PARAVISOR
    paravisor.tpm.nv[0x01400001] = junk
    with pytest.raises(CloisterError):
        read_hcl(Tpm(paravisor.tpm))


PARAVISOR = Paravisor(deaf=True)


def test_the_launch_config_is_in_pcr14() -> None:
    source = source_on(Paravisor())
    with pytest.raises(NotTrusted):
        source.fix_launch(LAUNCH)
    extend_launch(source.vtpm.tpm, LAUNCH)
    source.fix_launch(LAUNCH)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_refuses_another_size_before_it_writes(size: int) -> None:
    paravisor = Paravisor()
    with pytest.raises(WrongUse):
        source_on(paravisor).collect(bytes(size))
    assert USER_DATA_INDEX not in paravisor.tpm.sizes


# The metadata service ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(respond: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[MetadataService]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            respond(self)

        do_POST = do_GET

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield MetadataService("127.0.0.1", server.server_port, timeout=2.0)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def test_the_service_is_asked_as_azure_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    def respond(handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length", "0"))
        seen = {
            "method": handler.command,
            "path": handler.path,
            "metadata": handler.headers["Metadata"],
            "type": handler.headers["Content-Type"],
            "body": handler.rfile.read(length).decode(),
        }
        answer(handler, 200, json.dumps(seen).encode())

    with serving(respond) as service:
        got = json.loads(service.request("GET", "/metadata/x"))
        assert got == {"method": "GET", "path": "/metadata/x", "metadata": "true", "type": None, "body": ""}
        posted = json.loads(service.request("POST", "/acc/tdquote", b"{}"))
        assert (posted["type"], posted["body"]) == ("application/json", "{}")


@pytest.mark.parametrize("status", [302, 400, 404, 429, 500])
def test_another_status_is_refused_and_no_redirect_followed(status: int) -> None:
    with serving(lambda handler: answer(handler, status, b"{}", Location="/else")) as service:
        with pytest.raises(ConnectionFailed) as caught:
            service.request("GET", "/")
        assert caught.value.got == str(status)


def test_an_answer_over_64_kib_is_refused() -> None:
    with serving(lambda handler: answer(handler, 200, bytes(65537))) as service, pytest.raises(ConnectionFailed):
        service.request("GET", "/")


def test_nobody_there_is_told() -> None:
    with serving(lambda handler: None) as service:
        pass
    with pytest.raises(ConnectionFailed) as caught:
        service.request("GET", "/")
    assert "169.254.169.254" in caught.value.hint


def test_an_answer_that_is_no_http_is_told() -> None:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"nonsense\r\n")

    with serving(respond) as service, pytest.raises(ConnectionFailed):
        service.request("GET", "/")
