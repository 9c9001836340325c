"""Whole documents of every hardware platform, under synthetic vendors: what is accepted, what each lie is refused by."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from tests.vendors import amd, aws, intel, nvidia, tpm
from tests.vendors.azure import runtime
from tests.vendors.p384 import Issued
from tests.verify.world import CONFIG, LAUNCH, MODEL, NONCE, NOW, OTHER_OWNER, OWNER, STATEMENT, failures, replaced

from cloister.errors import MalformedEvidence, MalformedPolicy, VerificationFailed
from cloister.evidence.binding import gpu_nonce, report_data
from cloister.evidence.document import Document, Item, gpu_labels
from cloister.evidence.endorsements import Endorsements
from cloister.evidence.launch import App, LaunchConfig, launch_digest
from cloister.evidence.nitro import MEDIA_TYPE as COSE
from cloister.evidence.nitro import launch_pcr
from cloister.evidence.nvidia import GpuEvidence
from cloister.evidence.provenance import Payload, Provenance, signed_bytes
from cloister.evidence.statement import Statement
from cloister.evidence.strict_json import b64url
from cloister.evidence.tpm import tpm_item
from cloister.verify import Limits, Policy, Tcb, Verified, verify
from cloister.verify.roots import Roots

RAW = "application/octet-stream"
MAKER, OTHER_MAKER = tpm.Maker(), tpm.Maker()
TPM = tpm.Tpm().certified(MAKER)
PARAVISOR_TPM = tpm.Tpm(key=rsa.generate_private_key(65537, 2048), attributes=0x00050472)
LOADER, OTHER_LOADER = tpm.extended(b"loader"), tpm.extended(b"another loader")
KERNEL = tpm.extended(b"kernel")
PCR_LOG = tpm.event_log(tpm.event(4, b"loader"))
OTHER_PCR_LOG = tpm.event_log(tpm.event(4, b"another loader"))
BOOT = (b"firmware", b"kernel", b"command line")
RTMRS = {f"rtmr{at}": tpm.extended(data, name="sha384") for at, data in enumerate(BOOT)}
SNP_CODE, OTHER_CODE = b"\xc0" * 48, b"\xcf" * 48


def ccel(*data: bytes) -> bytes:
    events = [tpm.event(at, one, algorithms=(0x000C,)) for at, one in enumerate(data, 1)]
    return tpm.event_log(*events, algorithms=(0x000C,))


@cache
def gpus() -> tuple[Issued, Issued]:
    """Two devices under one root."""
    return nvidia.device(), beside("GH100", "48B02D0000000002")


@cache
def beside(product: str, serial: str) -> Issued:
    """Another device under the same root."""
    first = nvidia.device()
    leaf, key = first.certificates[-1], ec.generate_private_key(ec.SECP384R1())
    name, critical = nvidia.device_name(product, serial)
    builder = (
        x509.CertificateBuilder()
        .subject_name(leaf.subject)
        .issuer_name(leaf.issuer)
        .serial_number(int(serial, 16))
        .public_key(key.public_key())
        .not_valid_before(leaf.not_valid_before_utc)
        .not_valid_after(leaf.not_valid_after_utc)
        .add_extension(name, critical=critical)
    )
    for extension in leaf.extensions:
        if not isinstance(extension.value, x509.SubjectAlternativeName):
            builder = builder.add_extension(extension.value, critical=extension.critical)
    second = builder.sign(first.keys[-2], hashes.SHA384())
    return Issued((*first.certificates[:-1], second), (*first.keys[:-1], key))


ROOTS = Roots(
    intel=intel.intel().certificate("root", intel.Settings()).public_bytes(Encoding.DER),
    amd=amd.make().roots,
    nitro=aws.nitro().root_sha256,
    nvidia=nvidia.device().root_sha256,
    ak=tpm.pinned(MAKER.root),
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a document is made by. `booted`: the launch config that the hardware was started with. `fields`: what else
    is otherwise, by the platform's builder."""

    platform: str
    launch: LaunchConfig = LAUNCH
    booted: LaunchConfig | None = None
    statement: Statement = STATEMENT
    nonce: bytes = NONCE
    other_code: bool = False
    gpus: tuple[Issued, ...] = ()
    gpu_challenge: bytes | None = None
    with_tpm: tpm.Tpm | None = None
    by_rtmr3: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def booted_bytes(self) -> bytes:
        return (self.booted or self.launch).encode()

    def started_with(self, **changes: Any) -> "Machine":
        """Genuinely started with another launch config, which everything agrees with."""
        launch = replace(self.launch, **changes)
        digest = launch_digest(launch.encode()).hex()
        return replace(self, launch=launch, statement=replace(self.statement, launch_sha256=digest))

    def pcrs(self) -> dict[int, bytes]:
        loader = OTHER_LOADER if self.other_code else LOADER
        return {**tpm.ZERO_PCRS, 4: loader, 9: KERNEL, 14: tpm.extended(self.booted_bytes)}

    def document(self) -> Document:
        challenge = gpu_nonce(self.nonce, self.statement.encode())
        evidence = {f"gpu-{at}": self._gpu(one, challenge) for at, one in enumerate(self.gpus)}
        bound = report_data(self.nonce, self.statement.encode(), [item.content for item in evidence.values()])
        return Document(
            {
                "statement": Item("application/json", self.statement.encode()),
                "launch": Item("application/json", self.launch.encode()),
                **BUILDERS[self.platform](self, bound),
                **evidence,
            }
        )

    def _gpu(self, device: Issued, challenge: bytes) -> Item:
        nonce = self.gpu_challenge or challenge
        return GpuEvidence(nvidia.report(device, nonce=nonce), nvidia.chain(device), nonce).item()


def sgx(machine: Machine, bound: bytes) -> dict[str, Item]:
    code = b"\xee" * 32 if machine.other_code else intel.MR_ENCLAVE
    made = intel.sgx(report={"report_data": bound, "mr_enclave": code}, **machine.fields)
    return {"cpu": Item(RAW, made.quote), "endorsements": Endorsements(intel=made.collateral).item()}


def tdx(machine: Machine, bound: bytes) -> dict[str, Item]:
    """In MRCONFIGID, or in RTMR3."""
    digest = launch_digest(machine.booted_bytes)
    launch = {"mr_config_id": digest + bytes(16), "rtmr3": bytes(48)}
    if machine.by_rtmr3:
        launch = {"mr_config_id": bytes(48), "rtmr3": tpm.extended(machine.booted_bytes, name="sha384")}
    kernel = b"another kernel" if machine.other_code else b"kernel"
    code = {**RTMRS, "rtmr1": tpm.extended(kernel, name="sha384")}
    made = intel.tdx(report={"report_data": bound, **launch, **code}, **machine.fields)
    items = {"cpu": Item(RAW, made.quote), "endorsements": Endorsements(intel=made.collateral).item()}
    if machine.with_tpm is None:
        return {**items, "eventlog": Item(RAW, ccel(b"firmware", kernel, b"command line"))}
    evidence = machine.with_tpm.evidence(hashlib.sha256(made.quote).digest(), machine.pcrs())
    both = Endorsements(intel=made.collateral, tpm_crls=(MAKER.crl(),)).item()
    return {**items, "endorsements": both, "tpm": tpm_item(evidence)}


def snp(machine: Machine, bound: bytes) -> dict[str, Item]:
    code = OTHER_CODE if machine.other_code else SNP_CODE
    given = {"report_data": bound, "host_data": launch_digest(machine.booted_bytes), "measurement": code}
    made = amd.make(**{**given, **machine.fields})
    return {"cpu": Item(RAW, made.report), "endorsements": Endorsements(amd=made.chain, amd_crl=made.crl).item()}


def nitro(machine: Machine, bound: bytes) -> dict[str, Item]:
    pcrs = aws.pcrs(pcr16=launch_pcr(machine.booted_bytes))
    if machine.other_code:
        pcrs |= {0: b"\xee" * 48}
    given = {"user_data": bound, "nonce": machine.nonce, "pcrs": pcrs}
    return {"cpu": Item(COSE, aws.document(**{**given, **machine.fields}))}


def azure(hardware: Callable[[Machine, bytes], dict[str, Item]]) -> Callable[[Machine, bytes], dict[str, Item]]:
    """The hardware measures the paravisor, which is the same whatever boots."""

    def build(machine: Machine, bound: bytes) -> dict[str, Item]:
        tee = machine.with_tpm or PARAVISOR_TPM
        key = tee.key.public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        data = runtime(key, **{"user-data": bound.hex().upper()})
        paravisor = replace(machine, other_code=machine.fields.get("other_paravisor", False), fields={}, with_tpm=None)
        items = hardware(paravisor, hashlib.sha256(data).digest() + bytes(32))
        evidence = tee.evidence(hashlib.sha256(items["cpu"].content).digest(), machine.pcrs())
        log = OTHER_PCR_LOG if machine.other_code else PCR_LOG
        return {**items, "runtime": Item(RAW, data), "tpm": tpm_item(evidence), "eventlog": Item(RAW, log)}

    return build


def vtpm(machine: Machine, bound: bytes) -> dict[str, Item]:
    evidence = (machine.with_tpm or TPM).evidence(bound[:32], machine.pcrs())
    log = OTHER_PCR_LOG if machine.other_code else PCR_LOG
    lists = Endorsements(tpm_crls=(MAKER.crl(),))
    return {"tpm": tpm_item(evidence), "eventlog": Item(RAW, log), "endorsements": lists.item()}


BUILDERS: dict[str, Callable[[Machine, bytes], dict[str, Item]]] = {
    "sgx": sgx,
    "tdx": tdx,
    "sev-snp": snp,
    "nitro": nitro,
    "azure-sev-snp": azure(snp),
    "azure-tdx": azure(tdx),
    "vtpm": vtpm,
}

MACHINES = {
    "sgx": Machine(platform="sgx"),
    "tdx": Machine(platform="tdx"),
    "tdx, RTMR3": Machine(platform="tdx", by_rtmr3=True),
    "tdx, quote 5": Machine(platform="tdx", fields={"version": 5, "td15": True}),
    "tdx+tpm": Machine(platform="tdx", with_tpm=TPM),
    "sev-snp": Machine(platform="sev-snp"),
    "sev-snp+gpus": Machine(platform="sev-snp", gpus=gpus()),
    "nitro": Machine(platform="nitro"),
    "azure-sev-snp": Machine(platform="azure-sev-snp"),
    "azure-tdx": Machine(platform="azure-tdx"),
    "vtpm": Machine(platform="vtpm"),
}
every = pytest.mark.parametrize("name", MACHINES)

TDX_CODE: dict[str, str | int] = {
    "mr_td": "d2" * 48,
    **{name: value.hex() for name, value in RTMRS.items() if name != "rtmr0"},
}
GPU_CODE = {
    "driver": nvidia.DRIVER,
    "vbios": nvidia.VBIOS,
    "measurements": hashlib.sha256(nvidia.record(nvidia.measurements())).hexdigest(),
}
PINNED_BOOT: dict[str, str | int] = {"pcr4": LOADER.hex(), "pcr9": KERNEL.hex()}
CODE: dict[str, dict[str, str | int]] = {
    "sgx": {"mr_enclave": intel.MR_ENCLAVE.hex(), "launch_sha256": STATEMENT.launch_sha256},
    "tdx": TDX_CODE,
    "sev-snp": {"measurement": SNP_CODE.hex()},
    "nitro": {"pcr0": "01" * 48},
    "azure-sev-snp": {"measurement": SNP_CODE.hex(), **PINNED_BOOT},
    "azure-tdx": {
        "mr_td": "d2" * 48,
        "rtmr1": RTMRS["rtmr1"].hex(),
        "rtmr2": RTMRS["rtmr2"].hex(),
        **PINNED_BOOT,
    },
    "vtpm": PINNED_BOOT,
}


def policy(name: str, **pins: Any) -> Policy:
    """Everything pinned to what the machine of this name is, but for `pins`."""
    platform = MACHINES[name].platform
    entry = {**CODE[platform], "pcr4": LOADER.hex()} if name == "tdx+tpm" else CODE[platform]
    defaults: dict[str, Any] = {
        "deployment": LAUNCH.deployment,
        "owner_key": OWNER,
        "models": frozenset({MODEL}),
        "config": CONFIG,
        "app": LAUNCH.app.sha256,
        "platforms": (platform,),
        "measurements": {platform: (entry,), "nvidia": (GPU_CODE,)},
        "tcb": Tcb(min_sev_snp={"snp": 1} if "sev-snp" in name else {}),
        "limits": Limits(max_crl_age_days=30, gpus=len(MACHINES[name].gpus)),
    }
    return Policy(**{**defaults, **pins})


def judged(document: Document, believed: Policy, *, nonce: bytes = NONCE, now: float = NOW) -> Verified:
    return verify(document, policy=believed, nonce=nonce, now=now, roots=ROOTS)


def refused(document: Document, believed: Policy, **how: Any) -> set[str]:
    """The steps that failed; or that of the parser which refused."""
    try:
        judged(document, believed, **how)
    except VerificationFailed as error:
        assert all(factor.expected and factor.got for factor in failures(error).values())
        return set(failures(error))
    except MalformedEvidence as error:
        return {f"malformed {error.step}"}
    return set()


@cache
def genuine(name: str) -> Document:
    return MACHINES[name].document()


def without(document: Document, *labels: str) -> Document:
    return Document({label: item for label, item in document.items.items() if label not in labels})


def evenly(content: bytes, count: int = 32) -> list[bytes]:
    """One flipped bit in each of `count` bytes, from the first to the last; every time another bit.

    Not in the PCK list's issuer chain, which Intel's services hand out too, and of which nobody reads a byte.
    """
    unread = range(*(content.find(mark) for mark in (b"-----BEGIN", b'"root_ca_crl"')))
    places = sorted({at * (len(content) - 1) // (count - 1) for at in range(count)} - set(unread))
    return [content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :] for at in places]


# What is accepted --------------------------------------------------------------------------------------------------------


@every
def test_a_genuine_machine_is_accepted(name: str) -> None:
    verified = judged(genuine(name), policy(name))
    assert verified.platform == MACHINES[name].platform
    assert verified.launch_sha256 == STATEMENT.launch_sha256
    assert verified.launch.owner_key == OWNER
    assert verified.counters["release"] == 1
    assert "binding" in {factor.step for factor in verified.factors if factor.verdict == "pass"}


@every
def test_without_pins_it_is_refused(name: str) -> None:
    extra = {
        "vtpm": {"evidence.provider"},
        "sev-snp+gpus": {"gpu-0.measurement", "gpu-1.measurement"},
    }
    minimum = {"tcb.minimum"} if "sev-snp" in name else set()
    strict = {"owner", "deployment", "app", "models", "measurement", *minimum, *extra.get(name, set())}
    assert refused(genuine(name), Policy()) == strict


@every
def test_under_the_vendors_own_roots_it_is_refused(name: str) -> None:
    with pytest.raises(VerificationFailed) as caught:
        verify(genuine(name), policy=policy(name), nonce=NONCE, now=NOW)
    assert "evidence.root" in failures(caught.value)


@every
@pytest.mark.parametrize("pin", ["owner_key", "deployment", "app", "models"])
def test_who_started_what_must_be_named(name: str, pin: str) -> None:
    assert refused(genuine(name), policy(name, **{pin: None})) == {pin.removesuffix("_key")}


def test_a_sealed_app_without_a_model_is_not_taken_for_a_model_in_its_name() -> None:
    """The genuine image, started without its bundle: the launch config repeats whatever the policy pins, but the model."""
    app: dict[str, Any] = {"app": App("asgi", "66" * 32), "models": ()}
    pins: dict[str, Any] = {"models": None}
    sealed = MACHINES["sev-snp"].started_with(**app)
    sealed = replace(sealed, statement=replace(sealed.statement, models=(), code="sealed"))
    assert not refused(sealed.document(), policy("sev-snp", **pins))
    for kind in ("asgi", "llm"):
        other = MACHINES["sev-snp"].started_with(app=App(kind, "66" * 32))
        assert refused(other.document(), policy("sev-snp", **pins)) == {"models"}
        assert refused(other.document(), policy("sev-snp", models=frozenset())) == {"models"}
    assert not refused(sealed.document(), policy("sev-snp", models=frozenset()))


@pytest.mark.parametrize("name", ["sev-snp", "azure-sev-snp"])
def test_a_policy_may_name_the_processors_product(name: str) -> None:
    entry = CODE[MACHINES[name].platform]
    for product, wrong in (("Milan", set()), ("Genoa", {"measurement.product"})):
        pinned = {MACHINES[name].platform: ({**entry, "product": product},)}
        assert refused(genuine(name), policy(name, measurements=pinned)) == wrong


@every
def test_shared_keys_are_believed_only_under_a_configuration_that_is_named(name: str) -> None:
    """It says whom the group lets in: of somebody else's making, a simulator."""
    machine = MACHINES[name]
    shared: dict[str, Any] = {"key_scope": "group", "group_policy_sha256": "77" * 32}
    document = replace(machine, statement=replace(machine.statement, **shared)).document()
    assert not refused(document, policy(name))
    assert refused(document, policy(name, config=None)) == {"key-scope"}
    assert refused(document, policy(name, config="88" * 32)) == {"config"}
    assert not refused(genuine(name), policy(name, config=None))


@every
def test_another_platforms_policy_refuses_it(name: str) -> None:
    """The machine's name is on no list but its own."""
    for other, machine in MACHINES.items():
        if machine.platform != MACHINES[name].platform:
            assert {"platform", "measurement"} <= refused(genuine(name), policy(other))


# Who started what --------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    ("step", "changes"),
    [
        ("owner", {"owner_key": OTHER_OWNER}),
        ("deployment", {"deployment": "acme-chat2"}),
        ("app", {"app": App("llm", "aa" * 32)}),
        ("config", {"config_sha256": "aa" * 32}),
        ("models", {"models": (MODEL, "aa" * 32)}),
    ],
)
def test_started_as_another_it_is_refused(name: str, step: str, changes: dict[str, Any]) -> None:
    pinned = {"measurement.launch_sha256"} if name == "sgx" else set()
    assert refused(MACHINES[name].started_with(**changes).document(), policy(name)) == {step, *pinned}


STARTED_OTHERWISE = {
    "tdx": {"launch", "statement.launch"},
    "tdx, RTMR3": {"launch"},
    "tdx, quote 5": {"launch", "statement.launch"},
    "tdx+tpm": {"launch", "statement.launch"},
    "sev-snp": {"launch", "statement.launch"},
    "sev-snp+gpus": {"launch", "statement.launch"},
    "nitro": {"launch"},
    "azure-sev-snp": {"launch"},
    "azure-tdx": {"launch"},
    "vtpm": {"launch"},
}
"""Registers that hold a digest say which; extended ones only that it is another."""


@pytest.mark.parametrize("name", STARTED_OTHERWISE)
def test_somebody_elses_launch_config_shown_is_refused(name: str) -> None:
    """The hardware was started with the attacker's own; document and statement show the owner's."""
    own = replace(LAUNCH, owner_key=OTHER_OWNER, app=App("exfiltrate", "aa" * 32))
    assert refused(replace(MACHINES[name], booted=own).document(), policy(name)) == STARTED_OTHERWISE[name]


@pytest.mark.parametrize("name", ["tdx, RTMR3", "nitro", "azure-sev-snp", "azure-tdx", "vtpm"])
def test_a_register_extended_twice_holds_no_launch_config(name: str) -> None:
    machine = MACHINES[name]
    launch = LAUNCH.encode()
    if machine.platform == "nitro":
        once = launch_pcr(launch)
        twice = hashlib.sha384(once + hashlib.sha384(launch).digest()).digest()
        document = replace(machine, fields={"pcrs": aws.pcrs(pcr16=twice)}).document()
    elif machine.platform == "tdx":
        twice = tpm.extended(launch, launch, name="sha384")
        bound = report_data(NONCE, STATEMENT.encode())
        report = {**RTMRS, "report_data": bound, "mr_config_id": bytes(48), "rtmr3": twice}
        made = intel.tdx(report=report)
        document = replaced(genuine(name), "cpu", made.quote)
    else:
        device = PARAVISOR_TPM if machine.platform.startswith("azure") else TPM
        held = device.evidence(_qualifying(name), {**machine.pcrs(), 14: tpm.extended(launch, launch)})
        document = replaced(genuine(name), "tpm", tpm_item(held).content)
    assert refused(document, policy(name)) == {"launch"}


def _qualifying(name: str) -> bytes:
    if name == "vtpm":
        return report_data(NONCE, STATEMENT.encode())[:32]
    return hashlib.sha256(genuine(name).items["cpu"].content).digest()


# Which code --------------------------------------------------------------------------------------------------------------

OTHER_MEASUREMENT = {
    "sgx": {"measurement.mr_enclave"},
    "tdx": {"measurement.rtmr1"},
    "tdx, RTMR3": {"measurement.rtmr1"},
    "tdx, quote 5": {"measurement.rtmr1"},
    "tdx+tpm": {"measurement.rtmr1", "measurement.pcr4"},
    "sev-snp": {"measurement.measurement"},
    "sev-snp+gpus": {"measurement.measurement"},
    "nitro": {"measurement.pcr0"},
    "azure-sev-snp": {"measurement.pcr4"},
    "azure-tdx": {"measurement.pcr4"},
    "vtpm": {"measurement.pcr4"},
}


@every
def test_other_code_is_refused(name: str) -> None:
    assert refused(replace(MACHINES[name], other_code=True).document(), policy(name)) == OTHER_MEASUREMENT[name]


@pytest.mark.parametrize(
    ("name", "step"), [("azure-sev-snp", "measurement.measurement"), ("azure-tdx", "measurement.rtmr1")]
)
def test_another_paravisor_is_refused(name: str, step: str) -> None:
    """Whoever owns such hardware may start what they like on it, name a key of their own, and sign any PCRs with it."""
    own = tpm.Tpm(key=rsa.generate_private_key(65537, 2048), attributes=0x00050472)
    forged = replace(MACHINES[name], fields={"other_paravisor": True}, with_tpm=own)
    assert refused(forged.document(), policy(name)) == {step}


def test_gpus_with_other_firmware_are_refused() -> None:
    pins = {"sev-snp": (CODE["sev-snp"],), "nvidia": ({**GPU_CODE, "driver": "590.13"},)}
    steps = refused(genuine("sev-snp+gpus"), policy("sev-snp+gpus", measurements=pins))
    assert steps == {"gpu-0.measurement.driver", "gpu-1.measurement.driver"}


@pytest.mark.parametrize(
    ("driver", "steps"), [(nvidia.DRIVER, set()), ("590.13", {"gpu-0.measurement.driver", "gpu-1.measurement.driver"})]
)
def test_a_signers_measurements_count_for_gpus_too(driver: str, steps: set[str]) -> None:
    key = Ed25519PrivateKey.generate()
    signer = f"ed25519:{b64url(key.public_key().public_bytes_raw())}"
    gpu: dict[str, str | int] = {**GPU_CODE, "driver": driver}
    entries = {"sev-snp": (CODE["sev-snp"],), "nvidia": (gpu,)}
    payload = Payload(LAUNCH.deployment, LAUNCH.release, entries).encode()
    signed = Provenance(payload, key=signer, signature=key.sign(signed_bytes(payload))).item()
    document = Document({**genuine("sev-snp+gpus").items, "provenance": signed})
    assert refused(document, policy("sev-snp+gpus", measurements={}, measurements_signer=signer)) == steps


# Fresh, whole, and nothing but itself ------------------------------------------------------------------------------------


@every
def test_another_nonce_is_refused(name: str) -> None:
    extra = {
        "nitro": {"evidence.nonce"},
        "vtpm": {"evidence.extra-data"},
        "sev-snp+gpus": {"gpu-0.evidence.nonce", "gpu-1.evidence.nonce"},
    }
    assert refused(genuine(name), policy(name), nonce=bytes(32)) == {"binding", *extra.get(name, set())}


@every
def test_made_for_nobody_it_is_refused(name: str) -> None:
    assert refused(replace(MACHINES[name], nonce=b"").document(), policy(name), nonce=b"") == {"nonce"}


@every
def test_another_statement_is_refused(name: str) -> None:
    theirs = replace(STATEMENT, receipt_key=b"\1" * 32).encode()
    assert "binding" in refused(replaced(genuine(name), "statement", theirs), policy(name))


@every
def test_a_flipped_bit_in_any_item_is_refused(name: str) -> None:
    """But for the boot log, of which only the digests are proved."""
    document, believed = genuine(name), policy(name)
    for label in document.items.keys() - {"eventlog"}:
        for mutant in evenly(document.items[label].content):
            assert refused(replaced(document, label, mutant), believed), label


@pytest.mark.parametrize("name", [name for name, machine in MACHINES.items() if "eventlog" in machine.document().items])
def test_a_flipped_bit_in_a_boot_logs_digest_is_refused(name: str) -> None:
    document, believed = genuine(name), policy(name)
    log = document.items["eventlog"].content
    at = log.index(hashlib.sha384(b"kernel").digest() if name.startswith("tdx") else hashlib.sha256(b"loader").digest())
    for place in range(at, at + 32):
        mutant = log[:place] + bytes([log[place] ^ 1 << place % 8]) + log[place + 1 :]
        assert refused(replaced(document, "eventlog", mutant), believed) == {"evidence.eventlog"}


@every
def test_an_item_cut_short_is_refused(name: str) -> None:
    document, believed = genuine(name), policy(name)
    for label, item in document.items.items():
        assert refused(replaced(document, label, item.content[:-1]), believed), label


@every
def test_an_item_left_out_is_refused(name: str) -> None:
    """But for the boot log: what it says is proved by registers, and nothing rests on it."""
    document, believed = genuine(name), policy(name)
    for label in document.items.keys() - {"eventlog"}:
        assert refused(without(document, label), believed), label


@every
def test_an_item_that_nobody_judges_is_refused(name: str) -> None:
    document, believed = genuine(name), policy(name)
    extra = {
        "gpu-7": Item("application/cbor", b"\xa0"),
        "runtime": Item(RAW, b"{}"),
        "tpm": Item("application/cbor", b""),
    }
    for label in extra.keys() - document.items.keys():
        assert refused(Document({**document.items, label: extra[label]}), believed), label


@every
@pytest.mark.parametrize("now", [0.0, NOW - 121, NOW + 3721, NOW + 4e8, 2.0**39])
def test_outside_its_time_it_is_refused(name: str, now: float) -> None:
    assert {"issued", "expires"} & refused(genuine(name), policy(name), now=now)


# One platform's evidence as another's ------------------------------------------------------------------------------------


def _as_sgx() -> Document:
    quote = genuine("tdx").items["cpu"].content
    return replaced(without(genuine("tdx"), "eventlog"), "cpu", quote[:4] + bytes(4) + quote[8:])


def _as_tdx() -> Document:
    quote = genuine("sgx").items["cpu"].content
    return replaced(genuine("sgx"), "cpu", quote[:4] + b"\x81\0\0\0" + quote[8:])


def _cut_to_snp() -> Document:
    return replaced(genuine("sgx"), "cpu", genuine("sgx").items["cpu"].content[:1184])


def _as_nitro() -> Document:
    document = genuine("sev-snp")
    cpu = replace(document.items["cpu"], media_type=COSE)
    return Document({**without(document, "endorsements").items, "cpu": cpu})


def _nitro_as_raw() -> Document:
    cpu = replace(genuine("nitro").items["cpu"], media_type=RAW)
    return Document({**genuine("nitro").items, "cpu": cpu})


def _with(name: str, **items: Item) -> Document:
    return Document({**genuine(name).items, **{label.replace("_", "-"): item for label, item in items.items()}})


def _from(name: str, label: str) -> Item:
    return genuine(name).items[label]


def _own_tpm(cpu: bytes, device: tpm.Tpm) -> Item:
    return tpm_item(device.evidence(hashlib.sha256(cpu).digest(), MACHINES["tdx+tpm"].pcrs()))


def _plain_as_azure() -> Document:
    """A plain VM that brings runtime data and a TPM of its own; its report_data is that of a plain VM."""
    own = tpm.Tpm(key=rsa.generate_private_key(65537, 2048), attributes=0x00050472)
    key = own.key.public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    data = runtime(key, **{"user-data": report_data(NONCE, STATEMENT.encode()).hex()})
    return _with("sev-snp", runtime=Item(RAW, data), tpm=_own_tpm(_from("sev-snp", "cpu").content, own))


def _azure_as_plain() -> Document:
    return without(genuine("azure-sev-snp"), "runtime", "tpm", "eventlog")


def _gpus(**changes: Any) -> Document:
    return replace(MACHINES["sev-snp+gpus"], **changes).document()


def _swapped_gpu() -> Document:
    """Fresh, and by a genuine device; the CPU's evidence was made over another report of it."""
    again = MACHINES["sev-snp+gpus"]._gpu(gpus()[0], gpu_nonce(NONCE, STATEMENT.encode()))
    return replaced(genuine("sev-snp+gpus"), "gpu-0", again.content)


def _gpus_reordered() -> Document:
    items = dict(genuine("sev-snp+gpus").items)
    items["gpu-0"], items["gpu-1"] = items["gpu-1"], items["gpu-0"]
    return Document(items)


def _collateral_of_another_intel() -> Document:
    made = intel.other_intel().make(intel.Settings(platform="tdx", version=4))
    return replaced(genuine("tdx"), "endorsements", Endorsements(intel=made.collateral).item().content)


def _chip_of_another_amd() -> Document:
    made = amd.make(ark=amd.Authority(owner="other"), ask=amd.Authority(owner="other"), leaf=amd.Leaf(owner="other"))
    return replaced(genuine("sev-snp"), "endorsements", Endorsements(amd=made.chain, amd_crl=made.crl).item().content)


def _without_amd_list() -> Document:
    return replaced(genuine("sev-snp"), "endorsements", Endorsements(amd=amd.make().chain).item().content)


CONFUSIONS: dict[str, tuple[Callable[[], Document], str, set[str]]] = {
    "a TDX quote called SGX": (_as_sgx, "sgx", {"malformed evidence.quote"}),
    "an SGX quote called TDX": (_as_tdx, "tdx", {"malformed evidence.quote"}),
    "an SGX quote as long as an SNP report": (_cut_to_snp, "sgx", {"malformed endorsements.amd"}),
    "an SNP report called Nitro": (_as_nitro, "nitro", {"malformed nitro"}),
    "a Nitro document called raw": (_nitro_as_raw, "nitro", {"malformed endorsements.intel"}),
    "SGX under TDX's collateral": (
        lambda: _with("sgx", endorsements=_from("tdx", "endorsements")),
        "sgx",
        {"evidence.collateral", "evidence.qe", "tcb.level"},
    ),
    "TDX under AMD's certificates": (
        lambda: _with("tdx", endorsements=_from("sev-snp", "endorsements")),
        "tdx",
        {"malformed endorsements.intel"},
    ),
    "TDX under another Intel's collateral": (
        _collateral_of_another_intel,
        "tdx",
        {"evidence.root", "evidence.chain", "evidence.crl"},
    ),
    "SNP under another AMD's certificates": (
        _chip_of_another_amd,
        "sev-snp",
        {"evidence.root", "evidence.crl", "evidence.signature"},
    ),
    "SNP without a revocation list": (_without_amd_list, "sev-snp", {"evidence.crl"}),
    "runtime data beside plain SNP": (
        lambda: _with("sev-snp", runtime=_from("azure-sev-snp", "runtime")),
        "azure-sev-snp",
        {"malformed tpm"},
    ),
    "runtime data beside SGX": (
        lambda: _with("sgx", runtime=_from("azure-sev-snp", "runtime")),
        "sgx",
        {"document.runtime"},
    ),
    "plain SNP with runtime data and a TPM of one's own": (_plain_as_azure, "azure-sev-snp", {"evidence.runtime"}),
    "Azure without its TPM as plain SNP": (_azure_as_plain, "sev-snp", {"binding"}),
    "another Azure VM's TPM": (
        lambda: _with("azure-sev-snp", tpm=_from("azure-tdx", "tpm")),
        "azure-sev-snp",
        {"evidence.extra-data"},
    ),
    "a TPM that nobody certified beside TDX": (
        lambda: _with("tdx+tpm", tpm=_own_tpm(_from("tdx+tpm", "cpu").content, tpm.Tpm())),
        "tdx+tpm",
        {"tpm.evidence.ak"},
    ),
    "a TPM of another maker beside TDX": (
        lambda: _with("tdx+tpm", tpm=_own_tpm(_from("tdx+tpm", "cpu").content, tpm.Tpm().certified(OTHER_MAKER))),
        "tdx+tpm",
        {"tpm.evidence.root", "tpm.evidence.crl"},
    ),
    "a TPM's quote over another CPU's evidence": (
        lambda: _with("tdx+tpm", tpm=_own_tpm(_from("tdx", "cpu").content, TPM)),
        "tdx+tpm",
        {"tpm.evidence.extra-data"},
    ),
    "TDX without the TPM that the policy pins": (
        lambda: without(genuine("tdx+tpm"), "tpm"),
        "tdx+tpm",
        {"measurement.pcr4"},
    ),
    "a TPM alone, its CPU's evidence left out": (
        lambda: without(genuine("tdx+tpm"), "cpu"),
        "vtpm",
        {"binding", "evidence.extra-data"},
    ),
    "a boot log of another boot, TDX": (
        lambda: _with("tdx", eventlog=Item(RAW, ccel(b"firmware", b"another kernel", b"command line"))),
        "tdx",
        {"evidence.eventlog"},
    ),
    "a boot log of another boot, Azure": (
        lambda: _with("azure-sev-snp", eventlog=Item(RAW, OTHER_PCR_LOG)),
        "azure-sev-snp",
        {"evidence.eventlog"},
    ),
    "a TD's boot log before a TPM": (
        lambda: _with("vtpm", eventlog=_from("tdx", "eventlog")),
        "vtpm",
        {"malformed eventlog.algorithm"},
    ),
    "GPUs asked with another nonce": (
        lambda: _gpus(gpu_challenge=bytes(32)),
        "sev-snp+gpus",
        {"gpu-0.evidence.nonce", "gpu-1.evidence.nonce"},
    ),
    "one GPU twice": (lambda: _gpus(gpus=(gpus()[0], gpus()[0])), "sev-snp+gpus", {"gpu-1.device", "gpus"}),
    "a GPU left out by the enclave": (lambda: _gpus(gpus=gpus()[:1]), "sev-snp+gpus", {"gpus"}),
    "a GPU left out on the way": (
        lambda: without(genuine("sev-snp+gpus"), "gpu-1"),
        "sev-snp+gpus",
        {"binding", "gpus"},
    ),
    "a GPU's report swapped on the way": (_swapped_gpu, "sev-snp+gpus", {"binding"}),
    "GPUs in another order": (_gpus_reordered, "sev-snp+gpus", {"binding"}),
    "a GPU beside a machine that has none": (
        lambda: _with("sev-snp", gpu_0=_from("sev-snp+gpus", "gpu-0")),
        "sev-snp",
        {"binding", "gpus"},
    ),
    "a GPU beside Nitro": (
        lambda: _with("nitro", gpu_0=_from("sev-snp+gpus", "gpu-0")),
        "nitro",
        {"document.gpu-0"},
    ),
}


@pytest.mark.parametrize("confusion", CONFUSIONS)
def test_one_thing_as_another_is_refused(confusion: str) -> None:
    made, name, expected = CONFUSIONS[confusion]
    assert refused(made(), policy(name)) == expected


def test_gpus_count_in_the_order_of_their_numbers() -> None:
    assert gpu_labels(_gpus_reordered()) == ("gpu-0", "gpu-1")


def test_a_switch_stands_for_no_gpu() -> None:
    switch, name = beside("LS_10", "48B02D0000000003"), "sev-snp+gpus"
    assert refused(_gpus(gpus=(*gpus(), switch)), policy(name)) == set()
    assert refused(_gpus(gpus=(gpus()[0], switch)), policy(name)) == {"gpus"}
    limits = Limits(max_crl_age_days=30, gpus=3)
    assert refused(_gpus(gpus=(*gpus(), switch)), policy(name, limits=limits)) == {"gpus"}


def test_a_tpm_alone_needs_the_policy_to_name_it() -> None:
    assert refused(genuine("vtpm"), policy("vtpm", platforms=None)) == {"evidence.provider"}


@every
def test_a_machine_that_the_policy_does_not_name_is_refused(name: str) -> None:
    named = judged(genuine(name), policy(name)).platform_id
    count = len(MACHINES[name].gpus)
    own, other = (Limits(platform_ids=frozenset({one}), gpus=count) for one in (named, "ff" * 32))
    assert refused(genuine(name), policy(name, limits=own)) == set()
    assert refused(genuine(name), policy(name, limits=other)) == {"custody"}


# Found by an adversary ---------------------------------------------------------------------------------------------


def named(*values: Any, name: str) -> Any:
    return pytest.param(*values, id=name)


PCRS = {"pcr4": LOADER.hex(), "pcr11": "bb" * 32}


@pytest.mark.parametrize(
    ("platform", "entry"),
    [
        named("azure-sev-snp", PCRS, name="Azure's PCRs on SNP without a paravisor"),
        named("azure-tdx", PCRS, name="Azure's PCRs on TDX without a paravisor"),
        named("vtpm", {"pcr11": "bb" * 32}, name="PCR 11 alone, which any loader may extend"),
        named("vtpm", {"pcr4": "00" * 32}, name="a register into which nothing was measured"),
        named("nvidia", {"arch": "hopper"}, name="a GPU's architecture"),
        named(
            "sgx",
            {"mr_signer": "aa" * 32, "isv_prod_id": 1, "min_isv_svn": -1, "launch_sha256": "aa" * 32},
            name="a least number below zero",
        ),
    ],
)
def test_an_entry_that_any_code_could_match_is_no_policy(platform: str, entry: dict[str, str | int]) -> None:
    with pytest.raises(MalformedPolicy):
        Policy(measurements={platform: (entry,)})


@pytest.mark.parametrize(
    "entry",
    [
        named({"vcpus": 8}, name="a note"),
        named({"guest_svn": "7"}, name="a number"),
        named({"min_guest_svn": 0}, name="a least number"),
    ],
)
def test_a_signed_entry_that_any_code_could_match_is_refused(entry: dict[str, str | int]) -> None:
    key = Ed25519PrivateKey.generate()
    signer = f"ed25519:{b64url(key.public_key().public_bytes_raw())}"
    payload = Payload(LAUNCH.deployment, 1, {"sev-snp": (entry,)}).encode()
    signed = Provenance(payload, key=signer, signature=key.sign(signed_bytes(payload))).item()
    document = replace(MACHINES["sev-snp"], other_code=True).document()
    document = Document({**document.items, "provenance": signed})
    assert refused(document, policy("sev-snp", measurements={}, measurements_signer=signer))


@pytest.mark.parametrize(
    ("name", "log"),
    [
        named("sev-snp", b"no log at all", name="a log that nobody replays"),
        named("tdx", b"", name="an empty one, TDX"),
        named("vtpm", b"", name="an empty one, TPM"),
    ],
)
def test_a_boot_log_is_judged_or_refused(name: str, log: bytes) -> None:
    assert refused(_with(name, eventlog=Item(RAW, log)), policy(name))


def _list_of_version_1() -> Document:
    crl = MAKER.crl().replace(b"\2\1\1", b"\2\1\0", 1)
    return replaced(genuine("vtpm"), "endorsements", Endorsements(tpm_crls=(crl,)).item().content)


def _list_numbered_beyond_printing() -> Document:
    made = intel.other_intel().make(intel.Settings(crl_number=10**4400))
    sgx = replaced(genuine("sgx"), "cpu", made.quote)
    return replaced(sgx, "endorsements", Endorsements(intel=made.collateral).item().content)


def _certificate_of_no_scheme() -> Document:
    """RSASSA-PSS without parameters, where ECDSA with SHA-256 stands."""
    ecdsa, pss = bytes.fromhex("300a06082a8648ce3d040302"), bytes.fromhex("300b06092a864886f70d01010a")
    leaf, *above = TPM.chain
    outer, inner = (len(leaf) - 2).to_bytes(2, "big"), bytes([leaf[6] + 1])
    grown = leaf[:2] + outer + leaf[4:6] + inner + leaf[7:].replace(ecdsa, pss)
    device = replace(TPM, chain=(grown, *above))
    return replace(MACHINES["vtpm"], with_tpm=device).document()


@pytest.mark.parametrize(
    ("name", "made"),
    [
        named("vtpm", _list_of_version_1, name="a revocation list of version 1"),
        named("sgx", _list_numbered_beyond_printing, name="a number beyond what is printed"),
        named("vtpm", _certificate_of_no_scheme, name="a signature without parameters"),
    ],
)
def test_only_our_own_errors_escape(name: str, made: Callable[[], Document]) -> None:
    assert refused(made(), policy(name))


def test_what_no_policy_can_pin_is_said() -> None:
    """The launch config's app and logs: whoever starts the genuine image writes what they like there."""
    other = MACHINES["sev-snp"].started_with(app=App("exfiltrate", "aa" * 32), logs="everything")
    try:
        steps = {
            factor.step for factor in judged(other.document(), policy("sev-snp")).factors if factor.verdict != "pass"
        }
    except VerificationFailed as error:
        steps = set(failures(error))
    assert {"app", "logs"} <= steps
