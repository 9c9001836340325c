"""What a client accepts: one frozen value, from a TOML file or made in code. Absent means strictest.

"Strictest" on hardware: what no policy names is refused. On a simulator, whose operator can read everything anyway,
what no policy names is reported as not checked.
"""

import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NoReturn

from cloister.errors import MalformedPolicy
from cloister.evidence import simulated
from cloister.evidence.launch import NO_LOGS, OWNER_KEY, PUBLIC
from cloister.evidence.statement import INSECURE_NAMES
from cloister.evidence.strict_json import Fields

__all__ = ["PLATFORMS", "TCB_STATUSES", "Limits", "Measurements", "Policy", "Tcb", "check_entry", "parse_policy"]

PLATFORMS = ("sim", "sgx", "tdx", "sev-snp", "nitro", "azure-sev-snp", "azure-tdx", "vtpm")

GPUS = "nvidia"
"""In `measurements`: acceptable entries for every GPU, beside those for the platform it is plugged into."""

LEAST = "min_"
"""In an entry, before a component's name: a number that it must reach."""

NOTES = frozenset({"vcpus"})
"""In an entry, for people: what its measurement was computed for. Never compared."""

UNKNOWN = "unknown"
"""In an entry made in code, for a value that is yet to be learnt: nothing matches it, and the factor says what runs."""

_EMPTY_MEANS_NOTHING = frozenset(
    {"mr_enclave", "mr_td", "measurement", "id_key_digest", *(f"pcr{at}" for at in range(24))}
)

_BOOTS = (("pcr4", "pcr11"), ("pcr4", "pcr9"))
"""The boot programs, and what they started: a unified kernel image, or a boot loader's kernel and initrd."""

_REQUIRED: Mapping[str, tuple[frozenset[str], ...]] = MappingProxyType(
    {
        "sgx": (
            frozenset({"mr_enclave", "launch_sha256"}),
            frozenset({"mr_signer", "isv_prod_id", "min_isv_svn", "launch_sha256"}),
        ),
        "tdx": (frozenset({"mr_td", "rtmr1", "rtmr2"}),),
        "sev-snp": (frozenset({"measurement"}),),
        "nitro": (frozenset({"pcr0"}),),
        "azure-tdx": tuple(frozenset({"mr_td", *boot}) for boot in _BOOTS),
        "azure-sev-snp": tuple(
            frozenset({paravisor, *boot}) for paravisor in ("measurement", "id_key_digest") for boot in _BOOTS
        ),
        "vtpm": tuple(frozenset(boot) for boot in _BOOTS),
        GPUS: (frozenset({"measurements"}), frozenset({"driver", "vbios"})),
    }
)
"""Platform -> sets of components, one of which an entry must name whole: fewer would let any code match.

SGX has no field of its own for the launch config: the enclave's measurement covers it, so both are pinned together. On
Azure the paravisor is the root of all PCRs: without it, any guest could bring a TPM of its own making.
"""

TCB_STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
)
"""Intel's words for firmware, from the best to the worst, that can be tolerated: all but "Revoked"."""

SNP_TCB = ("bootloader", "tee", "snp", "microcode", "fmc")

MAX_POLICY = 1024 * 1024

Measurements = Mapping[str, tuple[Mapping[str, str | int], ...]]
"""Platform -> acceptable entries; an entry is component -> value, and every component it names must match."""

_HEX = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_COMPONENT = re.compile(r"[a-z][a-z0-9_]{0,31}")
_SIM_COMPONENTS = frozenset({*simulated.COMPONENTS, "measurement"})

_BYTES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("mr_enclave", "mr_signer", "launch_sha256", "measurements"), 32),
        **dict.fromkeys(("mr_td", "mr_seam", "mr_config_id", "mr_owner", "mr_owner_config"), 48),
        **dict.fromkeys(("measurement", "id_key_digest", "author_key_digest"), 48),
        **{f"rtmr{at}": 48 for at in range(4)},
        **{f"pcr{at}": 32 for at in range(24)},
        **dict.fromkeys(("family_id", "image_id"), 16),
        **dict.fromkeys(("td_attributes", "xfam"), 8),
    }
)
"""Component of hardware -> its bytes, written as twice as many digits."""

_NITRO_PCR = 48
_NUMBERS = frozenset({"isv_prod_id", "isv_svn", "guest_svn"})
_NUMBER = re.compile(r"0|[1-9][0-9]*")
_BITS = frozenset({"policy", "platform_info"})
_BIT_FIELD = re.compile(r"0x(0|[1-9a-f][0-9a-f]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tcb:
    """Hardware TCB: statuses tolerated beyond UpToDate, and a floor for Intel's tcbEvaluationDataNumber.

    `tolerate_advisories`: open advisories that do not matter here; None tolerates those of a tolerated status.
    `min_sev_snp`: component of AMD's TCB version ("bootloader", "tee", "snp", "microcode", "fmc") -> least value.
    """

    tolerate: frozenset[str] = frozenset()
    tolerate_advisories: frozenset[str] | None = None
    min_tcb_evaluation_data_number: int | None = None
    min_sev_snp: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`platform_ids` None: any machine. `max_crl_age_days` None: the collateral's own nextUpdate alone.

    `gpus`: how many confidential GPUs there must be, not counting switches; None: any number, also none.
    `dangerously_allow_missing_crl`: where no revocation list came with the evidence, say "not checked" instead of failing.
    """

    max_crl_age_days: int | None = None
    gpus: int | None = None
    platform_ids: frozenset[str] | None = None
    dangerously_allow_missing_crl: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """`models`, `app` and `config` are SHA-256 digests (64 hexadecimal digits, without prefix).

    `models` None: in a simulator, whatever the launch config says; on hardware, none. `platforms` None: any that can be
    verified; a simulator only under `simulator_root`, the PEM of its root certificate. `tolerate_insecure` names weakened settings that are accepted.
    `measurements_signer` ("ed25519:…") or `sigstore` ("identity" and "issuer" of a certificate) names whose signed
    measurements, coming with the evidence, count beside `measurements`.
    `broker_key` ("ed25519:…"): who else than the owner may hand it keys and secrets; None: nobody. `logs` "public": an app
    that publishes what it writes to its logs is accepted too; "none": only one of which nothing leaves.
    `require_pq` refuses an enclave that offers no post-quantum key. `trust` "first-use" says that the policy was written from a running server.

    Raises: MalformedPolicy for values that could never match or would match anything.
    """

    deployment: str | None = None
    owner_key: str | None = None
    broker_key: str | None = None
    models: frozenset[str] | None = None
    config: str | None = None
    app: str | None = None
    logs: str = NO_LOGS
    platforms: tuple[str, ...] | None = None
    measurements: Measurements = field(default_factory=dict)
    measurements_signer: str | None = None
    sigstore: Mapping[str, str] | None = None
    tcb: Tcb = Tcb()
    limits: Limits = Limits()
    simulator_root: bytes | None = None
    tolerate_insecure: frozenset[str] = frozenset()
    trust: str | None = None
    require_pq: bool = False

    def __post_init__(self) -> None:
        _check_names("platforms", self.platforms or (), PLATFORMS)
        _check_names("measurements", self.measurements, [*PLATFORMS, GPUS])
        _check_names("dangerously_tolerate_insecure", self.tolerate_insecure, INSECURE_NAMES)
        _check_names("logs", [self.logs], [NO_LOGS, PUBLIC])
        _check_names("trust", [] if self.trust is None else [self.trust], ["first-use"])
        if self.owner_key is not None and not OWNER_KEY.fullmatch(self.owner_key):
            _refuse("owner_key", "ed25519: and 43 characters of base64url")
        if self.broker_key is not None and not OWNER_KEY.fullmatch(self.broker_key):
            _refuse("broker_key", "ed25519: and 43 characters of base64url")
        if self.measurements_signer is not None and not OWNER_KEY.fullmatch(self.measurements_signer):
            _refuse("measurements_signer", "ed25519: and 43 characters of base64url")
        if self.sigstore is not None and set(self.sigstore) != {"identity", "issuer"}:
            _refuse("sigstore", 'a table of "identity" and "issuer"')
        for digest in [*(self.models or ()), *(one for one in (self.config, self.app) if one is not None)]:
            if not _HEX.fullmatch(digest):
                _refuse("models, config or app", "SHA-256 digests")
        if "" in (self.limits.platform_ids or ()):
            _refuse("limits.platform_ids", "names of machines")
        for platform, entries in self.measurements.items():
            for entry in entries:
                check_entry(platform, entry)
        _check_names("tcb.tolerate", self.tcb.tolerate, TCB_STATUSES)
        _check_names("tcb.min_sev_snp", self.tcb.min_sev_snp, SNP_TCB)
        frozen = {name: tuple(MappingProxyType(dict(e)) for e in es) for name, es in self.measurements.items()}
        object.__setattr__(self, "measurements", MappingProxyType(frozen))


def parse_policy(toml: str | bytes, *, read: Callable[[str], bytes]) -> Policy:
    """The policy file of PROTOCOL, "Client policy". `read` gives the bytes of the simulator's root, named by a path.

    Raises: MalformedPolicy for TOML errors (with their line), unknown keys, wrong types, values out of bounds, and a
    root that cannot be read.
    """
    fields = Fields(_load(toml), what="policy", error=MalformedPolicy)
    fields.integer("version", low=1, high=1)
    policy = Policy(
        deployment=_optional_text(fields, "deployment"),
        owner_key=_optional_text(fields, "owner_key"),
        broker_key=_optional_text(fields, "broker_key"),
        models=_optional_digests(fields, "models"),
        config=_digest(fields.text("config"), "config") if fields.has("config") else None,
        app=_digest(fields.text("app"), "app") if fields.has("app") else None,
        logs=fields.text("logs") if fields.has("logs") else NO_LOGS,
        platforms=fields.texts("platforms") if fields.has("platforms") else None,
        measurements=_parse_measurements(fields),
        measurements_signer=_optional_text(fields, "measurements_signer"),
        sigstore=_parse_sigstore(fields),
        tcb=_parse_tcb(fields),
        limits=_parse_limits(fields),
        simulator_root=_read_root(fields, read),
        tolerate_insecure=frozenset(_optional_texts(fields, "dangerously_tolerate_insecure")),
        trust=_optional_text(fields, "trust"),
        require_pq=fields.boolean("require_pq") if fields.has("require_pq") else False,
    )
    fields.end()
    return policy


def _refuse(name: str, expected: str) -> NoReturn:
    raise MalformedPolicy(f"policy.{name} is not {expected}.", step=f"policy.{name}", expected=expected)


def _check_names(name: str, values: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise MalformedPolicy(
            f"policy.{name} has an unknown name: {ascii(unknown[0])[:64]}.",
            step=f"policy.{name}",
            expected=", ".join(sorted(known)),
        )


def _covers_code(platform: str, entry: Mapping[str, str | int]) -> bool:
    """A register into which nothing was measured, and a key that signed nothing, are no pins."""
    said = {name for name, value in entry.items() if set(str(value)) != {"0"} or name not in _EMPTY_MEANS_NOTHING}
    required = _REQUIRED.get(platform, ())
    return not required or any(names <= said for names in required)


def _misformed(platform: str, component: str, value: str) -> str:
    """How the component is written, where this is not; "" for what may be, and for what is text."""
    if value == UNKNOWN:
        return ""
    name = component.removeprefix(LEAST)
    size = _NITRO_PCR if platform == "nitro" and name.startswith("pcr") else _BYTES.get(name, 0)
    if size and (name != component or not re.fullmatch(rf"[0-9a-f]{{{2 * size}}}", value)):
        return f"{2 * size} lower-case hexadecimal digits"
    if name in _NUMBERS and not _NUMBER.fullmatch(value):
        return "a number"
    if name in _BITS and (name != component or not _BIT_FIELD.fullmatch(value)):
        return "0x and lower-case hexadecimal digits, as text"
    return ""


def check_entry(platform: str, entry: Mapping[str, str | int]) -> None:
    """Raises: MalformedPolicy for an entry that could never match, or that any code could."""
    where = f"policy.measurements.{platform}"
    if not entry:
        raise MalformedPolicy(f"{where} has an empty entry, which would match anything.", step=where)
    for component, value in entry.items():
        known = component in _SIM_COMPONENTS if platform == simulated.PLATFORM else _COMPONENT.fullmatch(component)
        if not known:
            raise MalformedPolicy(f"{where} has an unknown component: {ascii(component)[:40]}.", step=where)
        if type(value) not in (str, int) or value == "":
            raise MalformedPolicy(f"{where}.{component} is neither text nor an integer.", step=where)
        if component.startswith(LEAST) and (type(value) is not int or value < 0):
            raise MalformedPolicy(f"{where}.{component} is no least number.", step=where)
        expected = "" if platform == simulated.PLATFORM else _misformed(platform, component, str(value))
        if expected:
            message = f"{where}.{component} could never match."
            raise MalformedPolicy(message, step=where, expected=expected, got=ascii(str(value))[1:65])
    if not _covers_code(platform, entry):
        expected = " or ".join(", ".join(sorted(names)) for names in _REQUIRED[platform])
        raise MalformedPolicy(f"{where} has an entry that any code could match.", step=where, expected=expected)


def _load(toml: str | bytes) -> dict[str, object]:
    if len(toml) > MAX_POLICY:
        raise MalformedPolicy("The policy is over 1 MiB.", step="policy")
    try:
        return tomllib.loads(toml.decode("utf-8") if isinstance(toml, bytes) else toml)
    except (ValueError, RecursionError) as error:
        raise MalformedPolicy(f"The policy is not TOML: {ascii(str(error))[1:-1][:200]}.", step="policy") from error


def _optional_text(fields: Fields, name: str) -> str | None:
    return fields.text(name) if fields.has(name) else None


def _optional_texts(fields: Fields, name: str) -> tuple[str, ...]:
    return fields.texts(name, max_items=64) if fields.has(name) else ()


def _digest(text: str, name: str) -> str:
    if not _DIGEST.fullmatch(text):
        _refuse(name, "sha256: and 64 lower-case hexadecimal digits")
    return text.removeprefix("sha256:")


def _optional_digests(fields: Fields, name: str) -> frozenset[str] | None:
    if not fields.has(name):
        return None
    return frozenset(_digest(text, name) for text in fields.texts(name, max_items=256))


def _section(fields: Fields, name: str) -> Fields:
    value = fields.take(name) if fields.has(name) else {}
    return Fields(value, what=f"policy.{name}", error=MalformedPolicy)


def _parse_measurements(fields: Fields) -> Measurements:
    section = _section(fields, "measurements")
    return {
        platform: tuple(_parse_entry(entry, platform) for entry in section.items(platform, max_items=256))
        for platform in section.names()
    }


def _parse_entry(entry: object, platform: str) -> Mapping[str, str | int]:
    if not isinstance(entry, dict):
        _refuse(f"measurements.{ascii(platform)[1:17]}", "a list of tables")
    if UNKNOWN in entry.values():
        _refuse(f"measurements.{ascii(platform)[1:17]}", "known")
    return entry


def _parse_sigstore(fields: Fields) -> Mapping[str, str] | None:
    if not fields.has("sigstore"):
        return None
    section = _section(fields, "sigstore")
    return MappingProxyType({name: section.text(name) for name in section.names()})


def _parse_tcb(fields: Fields) -> Tcb:
    section = _section(fields, "tcb")
    name = "min_tcb_evaluation_data_number"
    snp = Fields(
        section.take("min_sev_snp") if section.has("min_sev_snp") else {},
        what="policy.tcb.min_sev_snp",
        error=MalformedPolicy,
    )
    advisories = "tolerate_advisories"
    tcb = Tcb(
        tolerate=frozenset(_optional_texts(section, "tolerate")),
        tolerate_advisories=frozenset(_optional_texts(section, advisories)) if section.has(advisories) else None,
        min_tcb_evaluation_data_number=section.integer(name) if section.has(name) else None,
        min_sev_snp={component: snp.integer(component, high=255) for component in snp.names()},
    )
    section.end()
    return tcb


def _parse_limits(fields: Fields) -> Limits:
    section = _section(fields, "limits")
    ids = frozenset(_optional_texts(section, "platform_ids"))
    age = section.integer("max_crl_age_days", high=3650) if section.has("max_crl_age_days") else None
    gpus = section.integer("gpus", high=99) if section.has("gpus") else None
    missing = "dangerously_allow_missing_crl"
    allow = section.boolean(missing) if section.has(missing) else False
    section.end()
    return Limits(max_crl_age_days=age, gpus=gpus, platform_ids=ids or None, dangerously_allow_missing_crl=allow)


def _read_root(fields: Fields, read: Callable[[str], bytes]) -> bytes | None:
    name = "dangerously_trust_simulator"
    if not fields.has(name):
        return None
    try:
        return read(fields.text(name, max_length=4096))
    except OSError as error:
        raise MalformedPolicy("The simulator's root cannot be read.", step=f"policy.{name}") from error
