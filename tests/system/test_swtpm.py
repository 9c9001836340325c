"""Against a real TPM 2.0 in software: enrolment by endorsement key, quotes, and everything that must be refused."""

import hashlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from tests.system.shell import tool

from cloister.evidence.binding import report_data
from cloister.evidence.tpm import TpmEvidence, parse_public, parse_quote, parse_tpm, tpm_item
from cloister.verify.enrol import check_activation, check_endorsement, make_credential
from cloister.verify.platform import Appraisal
from cloister.verify.policy import Policy
from cloister.verify.vtpm import judge

pytestmark = pytest.mark.system

NONCE = bytes(range(32))
EXTRA = report_data(NONCE, b"the server's statement")[:32]
LAUNCH = b'{"v":1,"deployment":"acme-chat"}'
RSA_EK, ECC_EK = "0x81010001", "0x81010016"
EK_CERTIFICATES = {RSA_EK: "0x01c00002", ECC_EK: "0x01c00016"}


@dataclass(frozen=True)
class SoftwareTpm:
    """One running swtpm; the folder holds its certificate authority and whatever the tools write."""

    folder: Path

    def run(self, command: str, *arguments: str, code: int = 0) -> str:
        environment = {**os.environ, "TPM2TOOLS_TCTI": f"swtpm:path={self.folder / 'tpm'}"}
        ran = subprocess.run(
            [tool(command), *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (ran.returncode == 0) == (code == 0), f"{command}: {ran.stdout}{ran.stderr}"
        # Objects and sessions that a tool leaves behind fill the TPM's few slots.
        if command != "tpm2_flushcontext":
            self.run("tpm2_flushcontext", "--transient-object")
        return ran.stdout

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> str:
        (self.folder / name).write_bytes(data)
        return name

    @property
    def chain(self) -> tuple[bytes, ...]:
        """The local authority's certificates, the root last."""
        names = ("ca/issuercert.pem", "ca/swtpm-localca-rootca-cert.pem")
        return tuple(x509.load_pem_x509_certificate(self.read(name)).public_bytes(Encoding.DER) for name in names)

    @property
    def roots(self) -> frozenset[str]:
        return frozenset({hashlib.sha256(self.chain[-1]).hexdigest()})

    def endorsement(self, handle: str) -> tuple[bytes, tuple[bytes, ...]]:
        """The endorsement key's public area and certificate chain."""
        self.run("tpm2_readpublic", "-c", handle, "-o", "ek.pub")
        self.run("tpm2_nvread", EK_CERTIFICATES[handle], "-o", "ek.der")
        return self.read("ek.pub"), (self.read("ek.der"), *self.chain)

    def attestation_key(self, name: str, *kind: str, parent: str = RSA_EK) -> bytes:
        """A fresh one below the endorsement key: its public area. `name`.ctx is its context."""
        kind = kind or ("-G", "rsa", "-g", "sha256", "-s", "rsassa")
        self.run("tpm2_createak", "-C", parent, "-c", f"{name}.ctx", "-u", f"{name}.pub", *kind)
        return self.read(f"{name}.pub")

    def activate(self, ak: str, handle: str, credential: bytes, *, code: int = 0) -> bytes:
        self.write("credential", credential)
        session = []
        if handle == RSA_EK:  # the low-range template's policy: whoever may use the endorsement hierarchy
            self.run("tpm2_startauthsession", "--policy-session", "-S", "session")
            self.run("tpm2_policysecret", "-S", "session", "-c", "endorsement")
            session = ["-P", "session:session"]
        (self.folder / "secret").unlink(missing_ok=True)
        options = ["-c", f"{ak}.ctx", "-C", handle, "-i", "credential", "-o", "secret", *session]
        self.run("tpm2_activatecredential", *options, code=code)
        if session:
            self.run("tpm2_flushcontext", "session")
        return self.read("secret") if code == 0 else b""

    def quote(self, ak: str, extra: bytes = EXTRA, pcrs: str = "sha256:all", *options: str) -> TpmEvidence:
        """As it stands in an attestation document."""
        written = ["-m", "quote", "-s", "signature", *options]
        self.run("tpm2_quote", "-c", f"{ak}.ctx", "-l", pcrs, "-q", extra.hex(), *written)
        selected = [index for _, indices in parse_quote(self.read("quote")).selections for index in indices]
        self.run("tpm2_pcrread", "sha256:" + ",".join(str(index) for index in selected), "-o", "pcrs")
        values = self.read("pcrs")
        evidence = TpmEvidence(
            self.read("quote"),
            self.read("signature"),
            {index: values[32 * at : 32 * at + 32] for at, index in enumerate(selected)},
            self.read(f"{ak}.pub"),
        )
        return parse_tpm(tpm_item(evidence).content)


@contextmanager
def running() -> Iterator[SoftwareTpm]:
    """Made and certified by an authority of its own, started, and ended."""
    folder = Path(tempfile.mkdtemp(prefix="swtpm-"))  # a socket's path has to be short
    try:
        for name in ("ca", "state"):
            (folder / name).mkdir()
        authority = [f"statedir = {folder}/ca", f"signingkey = {folder}/ca/signkey.pem"]
        authority += [f"issuercert = {folder}/ca/issuercert.pem", f"certserial = {folder}/ca/certserial"]
        (folder / "authority.conf").write_text("\n".join(authority) + "\n")
        (folder / "authority.options").write_text("--platform-manufacturer None\n")
        setup = [f"create_certs_tool = {tool('swtpm_localca')}"]
        setup += [f"create_certs_tool_config = {folder}/authority.conf"]
        setup += [f"create_certs_tool_options = {folder}/authority.options"]
        (folder / "setup.conf").write_text("\n".join(setup) + "\n")
        options = ["--tpm2", "--tpmstate", f"{folder}/state", "--config", f"{folder}/setup.conf", "--create-ek-cert"]
        banks = ["--pcr-banks", "sha1,sha256", "--logfile", f"{folder}/log"]
        made = subprocess.run([tool("swtpm_setup"), *options, *banks], capture_output=True, timeout=120, check=False)
        assert made.returncode == 0, (folder / "log").read_text()
        sockets = ["--server", f"type=unixio,path={folder}/tpm", "--ctrl", f"type=unixio,path={folder}/tpm.ctrl"]
        command = [tool("swtpm"), "socket", "--tpm2", "--tpmstate", f"dir={folder}/state", "--flags", "startup-clear"]
        process = subprocess.Popen([*command, *sockets], stderr=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 20
            while not (folder / "tpm.ctrl").exists():
                assert process.poll() is None, "swtpm ended"
                assert time.monotonic() < until, "swtpm was not ready in time"
                time.sleep(0.02)
            yield SoftwareTpm(folder)
        finally:
            process.terminate()
            process.wait(20)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def tpm() -> Iterator[SoftwareTpm]:
    with running() as software:
        yield software


def failures(appraisal: Appraisal) -> set[str]:
    return {factor.step for factor in appraisal.factors if factor.verdict == "fail"}


def appraise(evidence: TpmEvidence, pins: frozenset[str], **changes: Any) -> Appraisal:
    given: dict[str, Any] = {"qualifying_data": EXTRA, "policy": Policy(), "now": time.time(), "launch": LAUNCH}
    return judge(evidence, ak_pins=pins, **{**given, **changes})


def enrol(tpm: SoftwareTpm, ak: str, public: bytes, handle: str = RSA_EK) -> frozenset[str]:
    """The whole exchange; the pins that it ends with."""
    ek, chain = tpm.endorsement(handle)
    checked = check_endorsement(ek, chain, policy=Policy(), now=time.time(), roots=tpm.roots)
    assert [factor for factor in checked if factor.verdict == "fail"] == []
    secret = secrets.token_bytes(32)
    credential = make_credential(ek, parse_public(public).name, secret, secrets.token_bytes)
    answer = tpm.activate(ak, handle, credential.tool_file())
    assert check_activation(secret, answer).verdict == "pass"
    return frozenset({parse_public(public).name_digest})


def test_enrol_quote_verify_and_release_a_key(tpm: SoftwareTpm) -> None:
    public = tpm.attestation_key("ak")
    pins = enrol(tpm, "ak", public)
    tpm.run("tpm2_pcrextend", f"14:sha256={hashlib.sha256(LAUNCH).hexdigest()}")
    evidence = tpm.quote("ak")
    appraisal = appraise(evidence, pins)
    assert failures(appraisal) == set()
    assert appraisal.report_data == EXTRA
    assert appraisal.launch_sha256 == hashlib.sha256(LAUNCH).digest()
    assert appraise(evidence, pins, launch=b"another").launch_sha256 == b""

    key = secrets.token_bytes(32)  # released to this TPM alone, now that it is verified
    ek, _ = tpm.endorsement(RSA_EK)
    released = make_credential(ek, parse_public(public).name, key, secrets.token_bytes)
    assert tpm.activate("ak", RSA_EK, released.tool_file()) == key

    # A replayed nonce, and one changed PCR.
    assert failures(appraise(tpm.quote("ak", extra=bytes(32)), pins)) == {"evidence.extra-data"}
    changed = replace(evidence, pcrs={**evidence.pcrs, 8: b"\1" * 32})
    assert failures(appraise(changed, pins)) == {"evidence.pcr-digest"}
    tpm.run("tpm2_pcrextend", f"8:sha256={'11' * 32}")
    later = tpm.quote("ak")
    assert failures(appraise(later, pins)) == set()
    assert later.pcrs[8] != evidence.pcrs[8]
    assert failures(appraise(replace(later, pcrs=evidence.pcrs), pins)) == {"evidence.pcr-digest"}

    # Another key of the same TPM.
    tpm.attestation_key("other")
    other = tpm.quote("other")
    assert failures(appraise(other, pins)) == {"evidence.ak", "evidence.ak-name"}
    assert failures(appraise(replace(other, ak=evidence.ak), pins)) == {"evidence.signature"}
    assert tpm.activate("other", RSA_EK, released.tool_file(), code=1) == b""

    # SHA-1, and fewer PCRs than are given.
    assert failures(appraise(tpm.quote("ak", EXTRA, "sha1:0,1"), pins)) >= {"evidence.pcr-bank"}
    few = tpm.quote("ak", EXTRA, "sha256:0,14")
    assert failures(appraise(few, pins)) == set()
    assert "evidence.pcr-selection" in failures(appraise(replace(few, pcrs=evidence.pcrs), pins))


@pytest.mark.parametrize(
    "kind",
    [
        ("-G", "ecc256", "-g", "sha256", "-s", "ecdsa"),
        ("-G", "ecc384", "-g", "sha384", "-s", "ecdsa"),
        ("-G", "rsa", "-g", "sha256", "-s", "rsapss"),
        ("-G", "rsa", "-g", "sha512", "-s", "rsassa"),
    ],
    ids=["P-256", "P-384", "RSAPSS", "SHA-512"],
)
def test_keys_and_schemes_of_each_kind(tpm: SoftwareTpm, kind: tuple[str, ...]) -> None:
    public = tpm.attestation_key("kind", *kind)
    pins = enrol(tpm, "kind", public)
    assert (
        failures(appraise(tpm.quote("kind", EXTRA, "sha256:0,1,2", "-g", kind[3], "--scheme", kind[5]), pins)) == set()
    )


def test_an_elliptic_endorsement_key_enrols_too(tpm: SoftwareTpm) -> None:
    assert enrol(tpm, "below", tpm.attestation_key("below", parent=ECC_EK), handle=ECC_EK)


def test_a_primary_key_is_named_by_its_quote_and_needs_a_certificate(tpm: SoftwareTpm) -> None:
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|sign"
    scheme = "rsa2048:rsassa-sha256:null"
    tpm.run("tpm2_createprimary", "-C", "endorsement", "-G", scheme, "-a", attributes, "-c", "primary.ctx")
    tpm.run("tpm2_readpublic", "-c", "primary.ctx", "-o", "primary.pub")
    assert parse_public(tpm.read("primary.pub")).attributes == 0x00050472
    assert failures(appraise(tpm.quote("primary"), frozenset())) == {"evidence.ak"}


def test_a_key_that_signs_anything_is_refused(tpm: SoftwareTpm) -> None:
    tpm.run("tpm2_createprimary", "-C", "owner", "-c", "storage.ctx")
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign"
    made = ["-u", "loose.pub", "-r", "loose.priv", "-G", "rsa2048:rsassa-sha256:null", "-a", attributes]
    tpm.run("tpm2_create", "-C", "storage.ctx", *made)
    tpm.run("tpm2_load", "-C", "storage.ctx", "-u", "loose.pub", "-r", "loose.priv", "-c", "loose.ctx")
    pins = frozenset({parse_public(tpm.read("loose.pub")).name_digest})
    assert failures(appraise(tpm.quote("loose"), pins)) == {"evidence.ak-attributes"}


def test_a_foreign_endorsement_key_is_refused(tpm: SoftwareTpm) -> None:
    public = tpm.attestation_key("mine")
    with running() as foreign:
        ek, chain = foreign.endorsement(RSA_EK)
        checked = check_endorsement(ek, chain, policy=Policy(), now=time.time(), roots=tpm.roots)
        assert "evidence.root" in {factor.step for factor in checked if factor.verdict == "fail"}
        credential = make_credential(ek, parse_public(public).name, secrets.token_bytes(32), secrets.token_bytes)
    assert tpm.activate("mine", RSA_EK, credential.tool_file(), code=1) == b""
    own, _ = tpm.endorsement(RSA_EK)
    swapped = check_endorsement(own, chain, policy=Policy(), now=time.time(), roots=tpm.roots)
    assert "evidence.ek" in {factor.step for factor in swapped if factor.verdict == "fail"}
