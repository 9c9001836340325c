"""A TPM 2.0, real or virtual, through the tpm2-tools: its attestation key, quotes, PCRs and NV indices.

Sources: TCG, "TPM 2.0 Library", part 3; the tools' manual pages (tpm2-tools 5.x). The tools are started without a shell,
in an empty folder of their own; keys stay in the TPM, the folder sees wrapped contexts.
"""

import hashlib
import re
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from cloister.enclave.attest.boot_log import TPM_LOG, read_boot_log
from cloister.enclave.attest.device import Device
from cloister.enclave.attest.later_log import LATER_LOG, explains, with_later
from cloister.enclave.attest.launch import check_question, extended, refuse_launch, register_holds
from cloister.errors import ConnectionFailed, MalformedEvidence, WrongUse
from cloister.evidence.document import Item
from cloister.evidence.tpm import PCR_COUNT, TpmEvidence, parse_public, parse_quote, parse_signature, tpm_item

__all__ = [
    "AttestationKey",
    "EndorsementKey",
    "Output",
    "SubprocessTools",
    "Tpm",
    "TpmTools",
    "Vtpm",
    "extend_launch",
]

LAUNCH_PCR = 14
PCR_SIZE = 32
MAX_QUALIFYING = 32

RESOURCE_MANAGER = "device:/dev/tpmrm0"
TIMEOUT = 30.0
"""Seconds for one tool. A discrete TPM makes an RSA key in ten."""

QUOTE_ATTEMPTS = 3

EK_CERTIFICATE_RSA = 0x01C00002

_ALL_PCRS = "sha256:" + ",".join(str(index) for index in range(PCR_COUNT))
SEARCH_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")
_AK_ATTRIBUTES = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"
_NV_HANDLE = re.compile(r"0x[0-9a-fA-F]{1,8}")
_MAX_OUTPUT = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Output:
    """What a tool printed, and the files that were asked for."""

    stdout: bytes
    files: Mapping[str, bytes]


class TpmTools(Protocol):
    """Starts one of the tpm2-tools in an empty folder that holds `inputs`; reads `outputs` from it afterwards."""

    def run(
        self, command: Sequence[str], *, inputs: Mapping[str, bytes] | None = None, outputs: Sequence[str] = ()
    ) -> Output:
        """Raises: ConnectionFailed when the tool is missing, fails, takes too long or leaves no output."""


@dataclass(frozen=True, slots=True)
class SubprocessTools:
    """The installed tools. `tcti` says how to reach the TPM: the kernel's resource manager unless told otherwise.

    `path` is searched for them, and not what PATH says: whoever starts the enclave sets that.
    """

    tcti: str = RESOURCE_MANAGER
    path: str = SEARCH_PATH
    timeout: float = TIMEOUT

    def run(
        self, command: Sequence[str], *, inputs: Mapping[str, bytes] | None = None, outputs: Sequence[str] = ()
    ) -> Output:
        with tempfile.TemporaryDirectory(prefix="cloister-tpm-") as folder:
            for name, content in (inputs or {}).items():
                (Path(folder) / name).write_bytes(content)
            stdout = self._start(command, folder)
            if "tpmrm" not in self.tcti:
                self._start(("tpm2_flushcontext", "-t"), folder)  # nobody else clears the few slots for keys
            return Output(stdout, {name: self._output(Path(folder) / name, command[0]) for name in outputs})

    def _start(self, command: Sequence[str], folder: str) -> bytes:
        environment = {"PATH": self.path, "TPM2TOOLS_TCTI": self.tcti, "LC_ALL": "C"}
        try:
            ran = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self.timeout,
            )
        except FileNotFoundError as error:
            hint = "Install the package tpm2-tools."
            raise ConnectionFailed(f"{command[0]} is missing.", step="attest.tpm", hint=hint) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConnectionFailed(f"{command[0]} did not end.", step="attest.tpm") from error
        if ran.returncode:
            raise ConnectionFailed(f"{command[0]} failed.", step="attest.tpm", got=_why(ran.stderr))
        return ran.stdout[:_MAX_OUTPUT]

    def _output(self, path: Path, tool: str) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConnectionFailed(f"{tool} left no {path.name}.", step="attest.tpm") from error


def _why(stderr: bytes) -> str:
    """The first error that the tool tells of, without what could paint on a terminal."""
    lines = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.startswith("ERROR: ")]
    return _UNPRINTABLE.sub("?", lines[0].removeprefix("ERROR: ").strip())[:160] if lines else "no reason given"


@dataclass(frozen=True, slots=True)
class AttestationKey:
    """A restricted signing key. `context` is the tools' saved context, b"" for one that stays in the TPM at `handle`;
    `public` its TPM2B_PUBLIC."""

    public: bytes
    context: bytes = b""
    handle: int | None = None

    def argument(self) -> str:
        return f"{self.handle:#010x}" if self.handle is not None else "ak.ctx"

    def inputs(self) -> Mapping[str, bytes]:
        return {} if self.handle is not None else {"ak.ctx": self.context}


@dataclass(frozen=True, slots=True)
class EndorsementKey:
    """What a verifier enrols by: `public` its TPM2B_PUBLIC, `certificate` DER from the TPM's NV, b"" where there is none."""

    public: bytes
    context: bytes
    certificate: bytes


@dataclass(frozen=True, slots=True)
class Tpm:
    """The operations that attestation needs. Blocking; a TPM does one at a time."""

    tools: TpmTools

    def pcr(self, index: int) -> bytes:
        """32 bytes of the SHA-256 bank."""
        value = self.tools.run(("tpm2_pcrread", f"sha256:{index}", "-o", "pcr"), outputs=("pcr",)).files["pcr"]
        if len(value) != PCR_SIZE:
            raise MalformedEvidence("The TPM has no SHA-256 bank.", step="attest.tpm", expected="32 bytes")
        return value

    def extend_pcr(self, index: int, digest: bytes) -> None:
        """One extend of the SHA-256 bank by 32 bytes, for good."""
        self.tools.run(("tpm2_pcrextend", f"{index}:sha256={digest.hex()}"))

    def nv_indices(self) -> tuple[int, ...]:
        """All that are defined."""
        text = self.tools.run(("tpm2_getcap", "handles-nv-index")).stdout.decode("ascii", "replace")
        return tuple(int(found, 16) for found in _NV_HANDLE.findall(text))

    def nv_read(self, index: int) -> bytes:
        """The whole index, by the owner's authority (empty, as clouds leave it)."""
        command = ("tpm2_nvread", f"{index:#010x}", "-C", "o", "-o", "nv")
        return self.tools.run(command, outputs=("nv",)).files["nv"]

    def nv_write(self, index: int, data: bytes) -> None:
        """The whole index; defines it first where it is not there."""
        if index not in self.nv_indices():
            attributes = "ownerread|ownerwrite"
            self.tools.run(("tpm2_nvdefine", f"{index:#010x}", "-C", "o", "-s", str(len(data)), "-a", attributes))
        self.tools.run(("tpm2_nvwrite", f"{index:#010x}", "-C", "o", "-i", "nv"), inputs={"nv": data})

    def endorsement_key(self) -> EndorsementKey:
        """The RSA key of the TCG's template "L-1", made anew from the TPM's seed: always the same."""
        command = ("tpm2_createek", "-G", "rsa", "-c", "ek.ctx", "-u", "ek.pub", "-f", "tss")
        files = self.tools.run(command, outputs=("ek.ctx", "ek.pub")).files
        stored = self.nv_read(EK_CERTIFICATE_RSA) if EK_CERTIFICATE_RSA in self.nv_indices() else b""
        parse_public(files["ek.pub"])
        return EndorsementKey(files["ek.pub"], files["ek.ctx"], der_prefix(stored))

    def own_ak(self) -> AttestationKey:
        """A primary key of the endorsement hierarchy: ECDSA P-256 with SHA-256, restricted, never leaves this TPM. Made
        anew from the TPM's seed, and always the same: who enrolled it once may pin it, whatever boots there later."""
        command = ("tpm2_createprimary", "-C", "e", "-G", "ecc256:ecdsa-sha256:null", "-g", "sha256")
        made = self.tools.run((*command, "-a", _AK_ATTRIBUTES, "-c", "ak.ctx"), outputs=("ak.ctx",)).files["ak.ctx"]
        command = ("tpm2_readpublic", "-c", "ak.ctx", "-f", "tss", "-o", "ak.pub")
        public = self.tools.run(command, inputs={"ak.ctx": made}, outputs=("ak.pub",)).files["ak.pub"]
        parse_public(public)
        return AttestationKey(public, made)

    def persistent_ak(self, handle: int) -> AttestationKey:
        """One that the provider left in the TPM."""
        command = ("tpm2_readpublic", "-c", f"{handle:#010x}", "-f", "tss", "-o", "ak.pub")
        public = self.tools.run(command, outputs=("ak.pub",)).files["ak.pub"]
        parse_public(public)
        return AttestationKey(public, handle=handle)

    def activate(self, ek: EndorsementKey, ak: AttestationKey, credential: bytes) -> bytes:
        """TPM2_ActivateCredential: the secret that a verifier sealed to both keys. `credential` is the tools' file
        (`verify.enrol.Credential.tool_file`). Raises: ConnectionFailed when it was sealed to other keys."""
        session = self.tools.run(
            ("tpm2_startauthsession", "--policy-session", "-S", "session"), outputs=("session",)
        ).files["session"]
        session = self.tools.run(
            ("tpm2_policysecret", "-S", "session", "-c", "e"), inputs={"session": session}, outputs=("session",)
        ).files["session"]
        command = ("tpm2_activatecredential", "-c", ak.argument(), "-C", "ek.ctx", "-i", "credential", "-o", "secret")
        inputs = {**ak.inputs(), "ek.ctx": ek.context, "credential": credential, "session": session}
        return self.tools.run((*command, "-P", "session:session"), inputs=inputs, outputs=("secret",)).files["secret"]

    def quote(self, ak: AttestationKey, qualifying_data: bytes, certificates: tuple[bytes, ...] = ()) -> TpmEvidence:
        """All 24 PCRs of the SHA-256 bank, over `qualifying_data` (at most 32 bytes), by `ak`.

        A PCR that is extended between the quote and the reading makes them disagree: then once more, three times in all.

        Raises: WrongUse for another size; ConnectionFailed; MalformedEvidence for an answer to another question.
        """
        if not 0 < len(qualifying_data) <= MAX_QUALIFYING:
            raise WrongUse("A quote is over at most 32 bytes.", step="attest.tpm", got=str(len(qualifying_data)))
        for _ in range(QUOTE_ATTEMPTS):
            message, signature, values = self._quote_once(ak, qualifying_data)
            quote = parse_quote(message)
            if quote.extra_data != qualifying_data:
                raise MalformedEvidence("The TPM's quote answers another question.", step="attest.tpm")
            if quote.pcr_digest == hashlib.sha256(values).digest():
                parse_signature(signature)
                return TpmEvidence(message, signature, _pcrs(values), ak.public, certificates)
        raise ConnectionFailed("The PCRs change faster than they can be quoted.", step="attest.tpm")

    def _quote_once(self, ak: AttestationKey, qualifying_data: bytes) -> tuple[bytes, bytes, bytes]:
        names = ("message", "signature", "pcrs")
        command = ("tpm2_quote", "-c", ak.argument(), "-l", _ALL_PCRS, "-q", qualifying_data.hex(), "-g", "sha256")
        files = ("-m", "message", "-s", "signature", "-o", "pcrs", "-F", "values")
        found = self.tools.run((*command, *files), inputs=ak.inputs(), outputs=names).files
        if len(found["pcrs"]) != PCR_COUNT * PCR_SIZE:
            raise MalformedEvidence("The TPM did not give 24 PCRs.", step="attest.tpm", got=str(len(found["pcrs"])))
        return found["message"], found["signature"], found["pcrs"]


def _pcrs(values: bytes) -> Mapping[int, bytes]:
    return MappingProxyType({at: values[at * PCR_SIZE : (at + 1) * PCR_SIZE] for at in range(PCR_COUNT)})


def der_prefix(data: bytes) -> bytes:
    """The one DER value at the start: NV indices are as long as somebody reserved. b"" where there is none."""
    if len(data) < 4 or data[0] != 0x30 or data[1] != 0x82:
        return b""
    end = 4 + int.from_bytes(data[2:4], "big")
    return data[:end] if end <= len(data) else b""


def _holds_launch(tpm: Tpm, launch: bytes) -> bool:
    """PCR 14 is exactly one extend from zero by SHA-256(launch)."""
    return register_holds(tpm.pcr(LAUNCH_PCR), extended("sha256", hashlib.sha256(launch).digest()))


def extend_launch(tpm: Tpm, launch: bytes) -> None:
    """For early boot, whose code is measured before it runs: extends PCR 14 once. Does nothing where that was done already.

    Raises: NotTrusted where PCR 14 holds something else.
    """
    value = tpm.pcr(LAUNCH_PCR)
    if not any(value):
        tpm.extend_pcr(LAUNCH_PCR, hashlib.sha256(launch).digest())
    elif register_holds(value, extended("sha256", hashlib.sha256(launch).digest())):
        return
    if not _holds_launch(tpm, launch):
        hint = "shim measures its keys into PCR 14: boot a unified kernel image directly."
        raise refuse_launch("PCR 14", tpm.pcr(LAUNCH_PCR), hint)


@dataclass(slots=True)
class Vtpm:
    """An `EvidenceSource`: a TPM alone, whose quote is over the first 32 bytes of the report data.

    `ak_handle`: the provider's own attestation key, if it left one in the TPM; otherwise the TPM's own, made at first use
    from its seed. `certificate_index` and `issuers`: where that key's certificate lies, and the CA
    certificates above it (the root last); without issuers no certificate is sent, since it would prove nothing.
    """

    device: Device
    tpm: Tpm
    ak_handle: int | None = None
    certificate_index: int | None = None
    issuers: tuple[bytes, ...] = ()
    log_path: str = TPM_LOG
    platform: str = field(default="vtpm", init=False)
    _keys: tuple[EndorsementKey | None, AttestationKey] | None = field(default=None, init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False)

    def fix_launch(self, launch: bytes) -> None:
        """Early boot did it (`extend_launch`). Raises: NotTrusted where it did not, or by another launch config."""
        with self._lock:
            if not _holds_launch(self.tpm, launch):
                hint = (
                    "The image extends PCR 14 by the launch config in early boot, before the enclave's process starts."
                )
                raise refuse_launch("PCR 14", self.tpm.pcr(LAUNCH_PCR), hint)

    def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
        """`tpm`, a quote over `report_data`'s first half; `eventlog` where the kernel has one that explains the PCRs."""
        check_question(report_data, nonce)
        return self.collect_over(report_data[:MAX_QUALIFYING])

    def collect_over(self, qualifying_data: bytes) -> Mapping[str, Item]:
        """The same over up to 32 bytes: in front of a confidential VM they are SHA-256 of the CPU's evidence."""
        with self._lock:
            _, ak = self._made()
            evidence = self.tpm.quote(ak, qualifying_data, self._certificates())
        log = self._log(evidence.pcrs)
        return {"tpm": tpm_item(evidence), **({} if log is None else {"eventlog": log})}

    def _log(self, pcrs: Mapping[int, bytes]) -> Item | None:
        """The firmware's, or that and systemd's; None where neither replays into the PCRs: they are pinned then, not
        explained, and a log that is not theirs would only be refused."""
        log = read_boot_log(self.device, self.log_path)
        if log is None or explains(log.content, pcrs):
            return log
        later = read_boot_log(self.device, LATER_LOG)
        whole = b"" if later is None else with_later(log.content, later.content)
        return Item(log.media_type, whole) if explains(whole, pcrs) else None

    def enrolment(self) -> tuple[EndorsementKey, AttestationKey]:
        """What a verifier needs to pin the attestation key by the TPM's own certificate. Raises: WrongUse when the key is
        the provider's: it has a certificate of its own."""
        with self._lock:
            ek, ak = self._made()
        if ek is None:
            raise WrongUse("The provider's attestation key is not enrolled here.", step="attest.tpm")
        return ek, ak

    def activate(self, credential: bytes) -> bytes:
        """The secret in a verifier's credential, for `enrolment`'s keys. Raises: ConnectionFailed for other keys'."""
        ek, ak = self.enrolment()
        with self._lock:
            return self.tpm.activate(ek, ak, credential)

    def _made(self) -> tuple[EndorsementKey | None, AttestationKey]:
        if self._keys is None:
            if self.ak_handle is not None:
                self._keys = (None, self.tpm.persistent_ak(self.ak_handle))
            else:
                self._keys = (self.tpm.endorsement_key(), self.tpm.own_ak())
        return self._keys

    def _certificates(self) -> tuple[bytes, ...]:
        if self.certificate_index is None or not self.issuers:
            return ()
        leaf = der_prefix(self.tpm.nv_read(self.certificate_index))
        if not leaf:
            raise MalformedEvidence("The attestation key's NV index holds no certificate.", step="attest.tpm")
        return (leaf, *self.issuers)
