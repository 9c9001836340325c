import base64
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from tests.vendors.tpm import DAY, EK, EK_USAGE, NOW, Maker, Terms, pinned, time
from tests.verify.world import flips

from cloister.errors import MalformedEvidence
from cloister.verify.policy import Limits, Policy
from cloister.verify.tpm_certificates import ATTESTATION_KEY, ENDORSEMENT_KEY, PROVIDER_ROOTS, Chain, judge_chain

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "azure-vtpm" / "openpcc" / "azure_ak_chain"
real = pytest.mark.skipif(not FOLDER.is_dir(), reason="the real vectors are not beside this tree")

MAKER = Maker()
KEY = ec.generate_private_key(ec.SECP256R1()).public_key()
GOOD = MAKER.chain(KEY)
ALLOWING = Policy(limits=Limits(dangerously_allow_missing_crl=True))


def judged(chain: Sequence[bytes] = GOOD, **changes: Any) -> Chain:
    given: dict[str, Any] = {"purpose": ATTESTATION_KEY, "roots": pinned(MAKER.root), "policy": Policy(), "now": NOW}
    crls = changes.pop("crls", [MAKER.crl()])
    return judge_chain(chain, crls, **{**given, **changes})


def verdicts(chain: Chain) -> dict[str, str]:
    return {factor.step: factor.verdict for factor in chain.factors}


def refused(chain: Sequence[bytes] = GOOD, **changes: Any) -> set[str]:
    return {step for step, verdict in verdicts(judged(chain, **changes)).items() if verdict == "fail"}


def test_a_chain_to_a_pinned_root_is_accepted() -> None:
    chain = judged()
    assert set(verdicts(chain).values()) == {"pass"}
    assert chain.leaf.public_key() == KEY
    assert chain.counters == {"tpm-crl CN=TPM Root": 3}
    assert [expiry.at for expiry in chain.expiries] == [NOW + 30 * DAY] * 3 + [NOW + DAY]


def test_a_chain_is_for_one_purpose() -> None:
    assert refused(MAKER.chain(KEY, EK), purpose=ENDORSEMENT_KEY) == set()
    assert refused(MAKER.chain(KEY, EK)) == CHAIN
    assert refused(purpose=ENDORSEMENT_KEY) == CHAIN


def test_where_nobody_publishes_a_list_none_is_missing_which_is_said() -> None:
    maker = replace(MAKER, ca_terms=replace(MAKER.ca_terms, crl_point=False))
    chain = judged(maker.chain(KEY), crls=[], roots=pinned(maker.root))
    assert verdicts(chain) == {"evidence.root": "pass", "evidence.chain": "pass", "evidence.crl": "not-checked"}


def test_no_single_bit_of_a_certificate_may_change() -> None:
    for at, certificate in enumerate(GOOD):
        for data in flips(certificate):
            try:
                assert refused([*GOOD[:at], data, *GOOD[at + 1 :]], crls=[], policy=ALLOWING)
            except MalformedEvidence:
                continue


def test_no_single_bit_of_a_revocation_list_may_change() -> None:
    for data in flips(MAKER.crl(6)):
        try:
            assert refused(crls=[data]) == {"evidence.crl"}
        except MalformedEvidence:
            continue


CHAIN = {"evidence.chain"}


@pytest.mark.parametrize(
    ("terms", "steps"),
    [
        (Terms(until=NOW - 1), CHAIN),
        (Terms(since=NOW + 1), CHAIN),
        (Terms(usages=("key_encipherment",)), CHAIN),
        (Terms(usages=("digital_signature", "key_cert_sign")), CHAIN),
        (Terms(extended=EK_USAGE), CHAIN),
        (Terms(extended=None), set()),
        (Terms(ca=True), CHAIN),
        (Terms(critical=x509.InhibitAnyPolicy(0)), CHAIN),
        (Terms(constraints=False), set()),
        (Terms(usages=None), CHAIN),
        (Terms(digest=hashes.SHA3_256()), CHAIN),
        (Terms(crl_point=True), {"evidence.crl"}),
    ],
    ids=[
        "expired",
        "not yet",
        "encipherment",
        "certificates too",
        "an endorsement key's",
        "no extended usage",
        "a CA's",
        "unknown critical extension",
        "no constraints",
        "no usage",
        "a hash that is not known to be strong",
        "names a list that is not there",
    ],
)
def test_the_leaf_must_be_an_attestation_key(terms: Terms, steps: set[str]) -> None:
    assert refused(MAKER.chain(KEY, terms)) == steps


@pytest.mark.parametrize(
    "terms",
    [
        {"until": NOW - 1},
        {"since": NOW + 1},
        {"ca": False, "path_length": None},
        {"usages": ("digital_signature",)},
        {"usages": None},
        {"constraints": False},
    ],
)
def test_the_ca_must_be_one_now(terms: dict[str, Any]) -> None:
    maker = replace(MAKER, ca_terms=replace(MAKER.ca_terms, **terms))
    assert refused(maker.chain(KEY), roots=pinned(maker.root)) == CHAIN


def test_an_expired_root_is_refused() -> None:
    maker = replace(MAKER, root_terms=replace(MAKER.root_terms, until=NOW - 1))
    assert refused(maker.chain(KEY), roots=pinned(maker.root)) == CHAIN


def test_an_issuer_without_usages_signs_no_list() -> None:
    maker = replace(MAKER, root_terms=replace(MAKER.root_terms, usages=None))
    given = {"roots": pinned(maker.root), "crls": [maker.crl()]}
    assert refused(maker.chain(KEY), **given) == {"evidence.chain", "evidence.crl"}


ECDSA_SHA256, UNKNOWN = bytes.fromhex("06082a8648ce3d040302"), bytes.fromhex("06082a8648ce3d04037f")


def test_a_signature_that_nobody_knows_is_weak_even_on_the_root() -> None:
    root = MAKER.root.replace(ECDSA_SHA256, UNKNOWN)
    assert root != MAKER.root
    assert refused([*GOOD[:2], root], roots=pinned(root)) == CHAIN


def test_a_list_signed_in_a_way_that_nobody_knows_is_none() -> None:
    assert refused(crls=[MAKER.crl().replace(ECDSA_SHA256, UNKNOWN)]) == {"evidence.crl"}
    assert refused(crls=[MAKER.crl(digest=hashes.SHA3_256())]) == {"evidence.crl"}


def test_an_authority_with_a_key_of_another_kind_issues_nothing() -> None:
    """Not even a revocation list: nothing below it is looked up."""
    key: Any = dsa.generate_private_key(1024)
    terms = replace(MAKER.ca_terms, usages=("key_cert_sign", "crl_sign"))
    maker = replace(MAKER, ca_key=key, ca_terms=terms)
    listed = Terms(crl_point=True)
    by_it = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(x509.load_der_x509_certificate(maker.ca).subject)
        .last_update(time(NOW - DAY))
        .next_update(time(NOW + DAY))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )
    given = {"roots": pinned(maker.root), "crls": [maker.crl(), by_it]}
    assert refused(maker.chain(KEY, listed), **given) == {"evidence.chain", "evidence.crl"}


def test_a_root_that_allows_no_ca_below_it_is_respected() -> None:
    maker = replace(MAKER, root_terms=replace(MAKER.root_terms, path_length=0))
    assert refused(maker.chain(KEY), roots=pinned(maker.root)) == CHAIN


def test_a_leaf_cannot_issue_attestation_keys() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    fake = replace(MAKER, ca_key=key, ca_terms=Terms())
    assert refused([fake.chain(KEY)[0], *MAKER.chain(key.public_key())]) == CHAIN


@pytest.mark.parametrize("cut", [(0,), (0, 2), (1, 2), (2,), (0, 1)])
def test_no_link_may_be_missing(cut: tuple[int, ...]) -> None:
    assert refused([GOOD[index] for index in cut]) & {"evidence.chain", "evidence.root"}


def test_a_chain_that_brings_its_own_root_is_refused() -> None:
    assert refused(Maker().chain(KEY)) == {"evidence.root", "evidence.crl"}
    assert refused(roots=PROVIDER_ROOTS) == {"evidence.root"}
    assert refused([*GOOD[:2], Maker(root_terms=MAKER.root_terms).root]) == {
        "evidence.root",
        "evidence.chain",
        "evidence.crl",
    }


def test_a_leaf_is_no_root() -> None:
    assert refused(GOOD[:1], roots=pinned(GOOD[0])) == CHAIN


def test_a_certificate_with_bytes_after_its_end_is_malformed() -> None:
    with pytest.raises(MalformedEvidence):
        refused([GOOD[0] + b"\0", *GOOD[1:]])


def test_weak_keys_in_the_chain_are_refused() -> None:
    assert refused(MAKER.chain(rsa.generate_private_key(65537, 1024).public_key())) == CHAIN
    assert refused(MAKER.chain(ec.generate_private_key(ec.SECP224R1()).public_key())) == CHAIN


def test_the_clock_decides_exactly_at_the_bounds() -> None:
    since, until = NOW - DAY, NOW + 30 * DAY
    crls = [MAKER.crl(since=since - DAY, until=until + DAY)]
    for now in (since, NOW, until):
        assert refused(now=now, crls=crls) == set()
    for now in (since - 1, until + 1, float("nan"), float("inf"), float("-inf")):
        assert "evidence.chain" in refused(now=now, crls=crls)


def test_a_revoked_ca_is_refused() -> None:
    assert refused(crls=[MAKER.crl(5)]) == {"evidence.crl"}
    assert refused(crls=[MAKER.crl(5)], policy=ALLOWING) == {"evidence.crl"}
    assert refused(crls=[MAKER.crl(6)]) == set()


def test_a_missing_revocation_list_is_refused_unless_the_policy_allows_it() -> None:
    assert refused(crls=[]) == {"evidence.crl"}
    assert verdicts(judged(crls=[], policy=ALLOWING))["evidence.crl"] == "not-checked"


@pytest.mark.parametrize(
    "crl",
    [
        MAKER.crl(until=NOW - 1),
        MAKER.crl(since=NOW + 1, until=NOW + DAY),
        MAKER.crl(critical=x509.DeltaCRLIndicator(1)),
    ],
    ids=["too old", "not yet", "partial"],
)
def test_a_revocation_list_must_be_current_and_whole(crl: bytes) -> None:
    assert refused(crls=[crl], policy=ALLOWING) == {"evidence.crl"}


def test_a_revocation_list_of_somebody_else_is_none() -> None:
    forged = MAKER.crl(key=ec.generate_private_key(ec.SECP384R1()))
    assert refused(crls=[forged]) == {"evidence.crl"}
    assert refused(crls=[MAKER.crl(issuer="another CA of the same key")]) == {"evidence.crl"}
    assert refused(crls=[Maker().crl(), MAKER.crl()]) == set()


def test_a_root_that_may_not_sign_lists_signs_none() -> None:
    maker = replace(MAKER, root_terms=replace(MAKER.root_terms, usages=("key_cert_sign",)))
    given = {"roots": pinned(maker.root), "crls": [maker.crl()]}
    assert refused(maker.chain(KEY), **given) == {"evidence.crl"}


def test_the_policy_limits_the_age_of_a_revocation_list() -> None:
    crls = [MAKER.crl(since=NOW - 10 * DAY)]
    assert refused(crls=crls, policy=Policy(limits=Limits(max_crl_age_days=10))) == set()
    assert refused(crls=crls, policy=Policy(limits=Limits(max_crl_age_days=9))) == {"evidence.crl"}


def test_a_revocation_list_over_a_mebibyte_is_not_read() -> None:
    with pytest.raises(MalformedEvidence, match="over 1 MiB"):
        refused(crls=[bytes(1024 * 1024 + 1)])


@pytest.mark.parametrize("crl", [b"", b"x", MAKER.crl()[:-1]])
def test_a_malformed_revocation_list_is_malformed_evidence(crl: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        refused(crls=[crl])


def test_a_chain_of_nothing_or_of_too_much_is_malformed() -> None:
    for chain in ((), GOOD * 3):
        with pytest.raises(MalformedEvidence):
            refused(chain)


def azure_chain() -> dict[str, x509.Certificate]:
    """The leaf has zeros after its end, as the TPM's NV index gives it: whoever collects it cuts them off."""
    blocks = (FOLDER / "ak_certificates.txt").read_text().split("-----BEGIN CERTIFICATE-----")[1:]
    leaves = [base64.b64decode(block.split("-----END")[0]) for block in blocks]
    whole = [leaf[: 4 + int.from_bytes(leaf[2:4], "big")] for leaf in leaves]
    assert any(leaf != cut for leaf, cut in zip(leaves, whole, strict=True))
    found = {f"leaf {at}": x509.load_der_x509_certificate(leaf) for at, leaf in enumerate(whole)}
    for name in ("azure_tpm_intermediate_01", "azure_tpm_intermediate_03", "azure_tpm_root_2023"):
        found[name] = x509.load_pem_x509_certificate((FOLDER / f"{name}.pem").read_bytes())
    return found


def azure_verdicts(leaf: str, ca: str = "azure_tpm_intermediate_03", now: float = 1764547200.0) -> dict[str, str]:
    found = azure_chain()
    chain = [found[name].public_bytes(Encoding.DER) for name in (leaf, ca, "azure_tpm_root_2023")]
    return verdicts(judged(chain, crls=(), roots=PROVIDER_ROOTS, policy=ALLOWING, now=now))


@real
def test_azures_own_chain_ends_in_the_pinned_root() -> None:
    good = {"evidence.root": "pass", "evidence.chain": "pass", "evidence.crl": "not-checked"}
    assert azure_verdicts("leaf 0") == good
    assert azure_verdicts("leaf 1") == good
    assert azure_verdicts("leaf 1", ca="azure_tpm_intermediate_01") == {**good, "evidence.chain": "fail"}
    assert azure_verdicts("leaf 1", now=1_900_000_000.0) == {**good, "evidence.chain": "fail"}


@real
def test_azures_leaf_as_the_nv_index_gives_it_is_malformed() -> None:
    block = (FOLDER / "ak_certificates.txt").read_text().split("-----BEGIN CERTIFICATE-----")[2]
    padded = base64.b64decode(block.split("-----END")[0])
    with pytest.raises(MalformedEvidence):
        judged([padded])


def test_only_two_provider_roots_are_pinned() -> None:
    assert len(PROVIDER_ROOTS) == 2
    assert all(len(bytes.fromhex(root)) == hashes.SHA256.digest_size for root in PROVIDER_ROOTS)
