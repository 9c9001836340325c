import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.verify.world import OWNER

from cloister.errors import MalformedPolicy
from cloister.verify import Limits, Policy, Tcb, parse_policy
from cloister.verify.policy import TCB_STATUSES, UNKNOWN

SHA = "0123456789abcdef" * 4
WIDE = "0123456789abcdef" * 6
CODE = f'mr_td = "{WIDE}", rtmr1 = "{WIDE}", rtmr2 = "{WIDE}"'
WHOLE = f"""
version = 1
deployment = "acme-chat"
owner_key = "{OWNER}"
models = ["sha256:{SHA}"]
config = "sha256:{SHA}"
platforms = ["tdx", "sev-snp", "sim"]
trust = "first-use"
require_pq = true
dangerously_trust_simulator = "path/to/root.pem"
dangerously_tolerate_insecure = ["ehbp"]
[measurements]
tdx = [{{ {CODE} }}]
sev-snp = [{{ measurement = "{WIDE}", vcpus = 8 }}]
sim = [{{ code = "sha256:{SHA}" }}, {{ code = "sha256:00", engine = "sha256:11" }}]
[tcb]
tolerate = ["SWHardeningNeeded"]
min_tcb_evaluation_data_number = 17
[limits]
max_crl_age_days = 30
platform_ids = ["{SHA}"]
"""


def read(path: str) -> bytes:
    assert path == "path/to/root.pem"
    return b"the root"


def parse(toml: str | bytes) -> Policy:
    return parse_policy(toml, read=read)


def test_reads_every_key_of_the_protocol() -> None:
    policy = parse(WHOLE)
    assert policy == Policy(
        deployment="acme-chat",
        owner_key=OWNER,
        models=frozenset({SHA}),
        config=SHA,
        platforms=("tdx", "sev-snp", "sim"),
        measurements={
            "tdx": ({"mr_td": WIDE, "rtmr1": WIDE, "rtmr2": WIDE},),
            "sev-snp": ({"measurement": WIDE, "vcpus": 8},),
            "sim": ({"code": f"sha256:{SHA}"}, {"code": "sha256:00", "engine": "sha256:11"}),
        },
        tcb=Tcb(tolerate=frozenset({"SWHardeningNeeded"}), min_tcb_evaluation_data_number=17),
        limits=Limits(max_crl_age_days=30, platform_ids=frozenset({SHA})),
        simulator_root=b"the root",
        tolerate_insecure=frozenset({"ehbp"}),
        trust="first-use",
        require_pq=True,
    )
    assert parse(WHOLE.encode()) == policy


def test_what_is_absent_is_none_and_strictest() -> None:
    assert parse("version = 1") == Policy()
    assert Policy().simulator_root is None
    assert Policy().tolerate_insecure == frozenset()


def test_an_empty_list_of_machines_means_any_and_of_models_none() -> None:
    policy = parse("version = 1\nmodels = []\n[limits]\nplatform_ids = []")
    assert (policy.limits.platform_ids, policy.models) == (None, frozenset())


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        parse(WHOLE).measurements["sim"] = ()  # type: ignore[index]
    with pytest.raises(TypeError):
        parse(WHOLE).measurements["sim"][0]["code"] = "x"  # type: ignore[index]


@pytest.mark.parametrize(
    "line",
    [
        "version = 2",
        "version = true",
        "version = '1'",
        "verison = 1\nversion = 1",
        "version = 1\nversion = 1",
        "version = 1\nmodels = 'sha256:00'",
        f"version = 1\nmodels = ['{SHA}']",
        f"version = 1\nmodels = ['sha256:{SHA.upper()}']",
        "version = 1\nowner_key = 'x'",
        "version = 1\nbroker_key = 'x'",
        "version = 1\nlogs = 'everything'",
        f"version = 1\nowner_key = '{OWNER}\\n'",
        "version = 1\nconfig = 'x'",
        "version = 1\nplatforms = ['sgx', 'riscv']",
        "version = 1\nplatforms = 'sgx'",
        "version = 1\ntrust = 'always'",
        "version = 1\ndangerously_tolerate_insecure = ['debug']",
        "version = 1\ndangerously_trust_simulator = true",
        "version = 1\n[measurements]\nriscv = [{ x = 'y' }]",
        "version = 1\n[measurements]\nsim = { code = 'x' }",
        "version = 1\n[measurements]\nsim = [{}]",
        "version = 1\n[measurements]\nsim = ['x']",
        "version = 1\n[measurements]\nsim = [{ cod = 'x' }]",
        "version = 1\n[measurements]\nsim = [{ code = '' }]",
        "version = 1\n[measurements]\nsim = [{ code = 1.5 }]",
        "version = 1\n[measurements]\ntdx = [{ mr_td = ['x'] }]",
        "version = 1\n[measurements]\ntdx = [{ 'MR TD' = 'x' }]",
        "version = 1\n[tcb]\ntolerated = []",
        "version = 1\n[tcb]\nmin_tcb_evaluation_data_number = -1",
        "version = 1\n[limits]\nmax_crl_age_days = 1979-05-27",
        "version = 1\n[limits]\nplatform_id = []",
        "version = 1\nlimits = []",
        "version = 1\ndeployment = ''",
        "",
    ],
)
def test_refuses_what_it_does_not_know_or_could_not_enforce(line: str) -> None:
    with pytest.raises(MalformedPolicy):
        parse(line)


SGX = f'mr_enclave = "{SHA}", launch_sha256 = "{SHA}"'
BOOT = f'pcr4 = "{SHA}", pcr9 = "{SHA}"'


@pytest.mark.parametrize(
    ("platform", "entry"),
    [
        ("sgx", SGX),
        ("sgx", f'{SGX}, isv_prod_id = 0, isv_svn = "9"'),
        ("sgx", f'mr_signer = "{SHA}", isv_prod_id = 1, min_isv_svn = 2, launch_sha256 = "{SHA}"'),
        ("tdx", f'{CODE}, td_attributes = "0000001000000000", pcr4 = "{SHA}"'),
        ("sev-snp", f'measurement = "{WIDE}", family_id = "{"0" * 32}", policy = "0x30000", platform_info = "0x0"'),
        ("nitro", f'pcr0 = "{WIDE}", pcr8 = "{WIDE}"'),
        ("azure-tdx", f'mr_td = "{WIDE}", {BOOT}'),
        ("vtpm", BOOT),
        ("nvidia", f'driver = "550.144.03", vbios = "96.00", measurements = "{SHA}", m1 = "aa"'),
        ("sim", 'code = "sha256:00", measurement = "x"'),
    ],
)
def test_takes_components_as_they_are_reported(platform: str, entry: str) -> None:
    assert len(parse(f"version = 1\n[measurements]\n{platform} = [{{ {entry} }}]").measurements[platform]) == 1


@pytest.mark.parametrize(
    ("platform", "entry"),
    [
        ("tdx", CODE.replace(WIDE, "aa")),
        ("tdx", CODE.replace(WIDE, SHA)),
        ("tdx", CODE.replace(WIDE, WIDE.upper())),
        ("tdx", CODE.replace(WIDE, WIDE[:-1] + "g")),
        ("tdx", CODE.replace(f'"{WIDE}"', f'"{WIDE}\\n"')),
        ("tdx", f"{CODE}, mr_seam = 7"),
        ("tdx", f"{CODE}, min_mr_seam = 7"),
        ("tdx", f'{CODE}, xfam = "0x602e7"'),
        ("tdx", f'{CODE}, mr_owner = "unknown"'),
        ("tdx", CODE.replace(WIDE, "unknown")),
        ("sgx", f'{SGX}, isv_svn = "09"'),
        ("sgx", f'{SGX}, isv_prod_id = "one"'),
        ("sev-snp", f'measurement = "{SHA}"'),
        ("sev-snp", f'measurement = "{WIDE}", policy = 0x30000'),
        ("sev-snp", f'measurement = "{WIDE}", min_policy = 3'),
        ("sev-snp", f'measurement = "{WIDE}", platform_info = "0x01"'),
        ("nitro", f'pcr0 = "{SHA}"'),
        ("vtpm", BOOT.replace(SHA, WIDE)),
        ("nvidia", f'driver = "550", vbios = "96", measurements = "{WIDE}"'),
    ],
)
def test_refuses_what_no_hardware_could_report(platform: str, entry: str) -> None:
    with pytest.raises(MalformedPolicy, match=f"measurements.{platform}"):
        parse(f"version = 1\n[measurements]\n{platform} = [{{ {entry} }}]")


def test_code_may_leave_a_component_to_be_learnt() -> None:
    unknown = dict.fromkeys(("mr_td", "rtmr1", "rtmr2"), UNKNOWN)
    assert Policy(measurements={"tdx": (unknown,)}).measurements["tdx"] == (unknown,)


@pytest.mark.parametrize("status", ["OutofDate", "Revoked", "outofdate", "UpToDate ", ""])
def test_refuses_a_status_that_intel_does_not_say_or_nobody_may_tolerate(status: str) -> None:
    with pytest.raises(MalformedPolicy):
        parse(f"version = 1\n[tcb]\ntolerate = ['{status}']")
    with pytest.raises(MalformedPolicy):
        Policy(tcb=Tcb(tolerate=frozenset({status})))


@pytest.mark.parametrize("status", TCB_STATUSES)
def test_takes_every_other_status(status: str) -> None:
    assert parse(f"version = 1\n[tcb]\ntolerate = ['{status}']").tcb.tolerate == {status}


def test_says_where_toml_is_wrong() -> None:
    with pytest.raises(MalformedPolicy, match="line 3"):
        parse("version = 1\n\ndeployment = acme")


@pytest.mark.parametrize("toml", [b"version = 1\n# \xff", b" " * 1_048_577, "x = " + "[" * 50_000, "x = " + "9" * 5000])
def test_refuses_hostile_toml(toml: str | bytes) -> None:
    with pytest.raises(MalformedPolicy):
        parse(toml)


def test_a_root_that_cannot_be_read_is_a_malformed_policy() -> None:
    def absent(path: str) -> bytes:
        raise FileNotFoundError(path)

    with pytest.raises(MalformedPolicy, match="root"):
        parse_policy(WHOLE, read=absent)


@given(st.text(max_size=200))
def test_is_total(text: str) -> None:
    try:
        parse("version = 1\n" + text)
    except MalformedPolicy:
        return
