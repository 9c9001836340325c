import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.verify.world import LAUNCH, MEASUREMENT, World, failures

from cloister.errors import VerificationFailed, WrongUse
from cloister.evidence.document import Document
from cloister.evidence.provenance import Payload, Provenance, signed_bytes
from cloister.evidence.strict_json import b64url
from cloister.verify import provenance as verifier
from cloister.verify.factors import Factor
from cloister.verify.policy import Policy
from cloister.verify.provenance import joined, signed_measurements

VECTORS = Path(__file__).resolve().parents[2].parent / "shared" / "vectors"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
CODE = {"mr_td": "d2" * 48, "rtmr1": "a1" * 48, "rtmr2": "a2" * 48}
PAYLOAD = Payload("acme-chat", 3, {"tdx": (CODE,)})
PASSED = {f"provenance.{what}": "pass" for what in ("signature", "deployment", "release", "measurements")}
IDENTITY = {"identity": "release@example.com", "issuer": "https://accounts.example.com"}


def name(key: Ed25519PrivateKey) -> str:
    return f"ed25519:{b64url(key.public_key().public_bytes_raw())}"


def signed(payload: Payload = PAYLOAD, key: Ed25519PrivateKey = KEY) -> Provenance:
    data = payload.encode()
    return Provenance(data, name(key), key.sign(signed_bytes(data)))


GOOD = signed()
BELIEVING = Policy(measurements_signer=name(KEY))
BY_SIGSTORE = Policy(sigstore=IDENTITY)
BUNDLE = Provenance(PAYLOAD.encode(), bundle=b"{}")


def judged(
    provenance: Provenance | None = GOOD,
    policy: Policy = BELIEVING,
    release: int = 3,
    deployment: str = "acme-chat",
) -> tuple[dict[str, Any], dict[str, str]]:
    """What is believed, and the factors' verdicts."""
    launch = replace(LAUNCH, release=release, deployment=deployment)
    believed, factors = signed_measurements(provenance, policy=policy, launch=launch)
    assert all(factor.expected and factor.got and factor.hint for factor in factors if factor.verdict == "fail")
    return dict(believed), {factor.step: factor.verdict for factor in factors}


def test_believes_what_the_policys_signer_signed() -> None:
    assert judged() == (PAYLOAD.measurements, PASSED)


def test_without_a_signer_nothing_that_came_along_is_believed() -> None:
    assert judged(None, Policy()) == ({}, {})
    assert judged(GOOD, Policy()) == ({}, {"provenance": "not-checked"})
    assert judged(BUNDLE, Policy()) == ({}, {"provenance": "not-checked"})


@pytest.mark.parametrize("policy", [BELIEVING, BY_SIGSTORE])
def test_a_signer_who_signed_nothing_is_missed(policy: Policy) -> None:
    assert judged(None, policy) == ({}, {"provenance": "fail"})


@pytest.mark.parametrize(
    "provenance",
    [
        signed(key=OTHER),
        replace(signed(key=OTHER), key=name(KEY)),
        replace(GOOD, payload=replace(PAYLOAD, release=4).encode()),
        replace(GOOD, payload=GOOD.payload + b" "),
        replace(GOOD, signature=bytes(64)),
        replace(GOOD, signature=KEY.sign(GOOD.payload)),
        BUNDLE,
    ],
    ids=["another's", "another's in the name", "another payload", "a space", "zero", "another domain", "a bundle"],
)
def test_what_the_signer_did_not_sign_is_refused(provenance: Provenance) -> None:
    assert judged(provenance) == ({}, {"provenance.signature": "fail"})


@pytest.mark.parametrize("release", [2, 4])
def test_measurements_of_another_release_are_not_believed(release: int) -> None:
    assert judged(release=release) == ({}, PASSED | {"provenance.release": "fail"})


def test_measurements_of_another_deployment_are_not_believed() -> None:
    assert judged(deployment="other-chat") == ({}, PASSED | {"provenance.deployment": "fail"})


@pytest.mark.parametrize("entry", [{"vcpus": 8}, {"mr_td": "d2" * 48}, {"min_rtmr1": "x", **CODE}])
def test_signed_measurements_that_say_nothing_about_the_code_are_not_believed(entry: dict[str, Any]) -> None:
    vague = signed(replace(PAYLOAD, measurements={"tdx": (CODE, entry)}))
    assert judged(vague) == ({}, PASSED | {"provenance.measurements": "fail"})


def test_a_key_does_not_stand_for_a_sigstore_identity() -> None:
    assert judged(GOOD, BY_SIGSTORE) == ({}, {"provenance.signature": "fail"})


class Refused(Exception):
    pass


class Sigstore:
    """In the place of the library: believes one payload of one identity."""

    def verify_artifact(self, payload: bytes, bundle: bytes, identity: dict[str, str]) -> None:
        if (payload, bundle, identity) != (PAYLOAD.encode(), b"{}", IDENTITY):
            raise Refused


@pytest.fixture
def sigstore(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = SimpleNamespace(from_json=lambda data: data if data != b'{"x":1}' else int(data))
    monkeypatch.setattr(verifier, "_sigstore", lambda: (Sigstore, Refused, bundle, dict))


@pytest.mark.usefixtures("sigstore")
def test_believes_a_bundle_of_the_policys_identity() -> None:
    assert judged(BUNDLE, BY_SIGSTORE)[0] == PAYLOAD.measurements


@pytest.mark.usefixtures("sigstore")
@pytest.mark.parametrize(
    ("provenance", "policy"),
    [
        (replace(BUNDLE, payload=PAYLOAD.encode() + b" "), BY_SIGSTORE),
        (replace(BUNDLE, bundle=b'{"x":1}'), BY_SIGSTORE),
        (replace(BUNDLE, bundle=b'{"y":1}'), BY_SIGSTORE),
        (BUNDLE, Policy(sigstore={**IDENTITY, "identity": "somebody@example.com"})),
        (BUNDLE, Policy(sigstore={**IDENTITY, "issuer": "https://accounts.other.example"})),
    ],
)
def test_a_bundle_of_anybody_else_is_refused(provenance: Provenance, policy: Policy) -> None:
    assert judged(provenance, policy) == ({}, {"provenance.signature": "fail"})


@pytest.mark.usefixtures("sigstore")
@pytest.mark.parametrize("error", [AttributeError, KeyError, OverflowError, TypeError, ValueError])
def test_whatever_sigstore_raises_is_a_refusal(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def surprised(*_: object) -> None:
        raise error

    monkeypatch.setattr(Sigstore, "verify_artifact", surprised)
    assert judged(BUNDLE, BY_SIGSTORE) == ({}, {"provenance.signature": "fail"})


@pytest.fixture(params=["no home", "a home that others write"])
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sigstore's own offline mode looks for the root to believe: nothing in it may matter, nor may it change."""
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    if request.param == "no home":
        monkeypatch.setenv("HOME", "/dev/null")
        return tmp_path
    cache = tmp_path / ".cache" / "sigstore-python" / "tuf" / "https%3A%2F%2Ftuf-repo-cdn.sigstore.dev"
    cache.mkdir(parents=True)
    (cache / "trusted_root.json").write_text(
        '{"mediaType":"application/vnd.dev.sigstore.trustedroot+json;version=0.1"}'
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_the_root_is_sigstores_own_and_no_file_of_the_users(home: Path) -> None:
    before = contents(home)
    certificates = verifier.sigstore_verifier()._fulcio_certificate_chain
    assert {each.subject.rfc4514_string() for each in certificates} >= {"CN=sigstore,O=sigstore.dev"}
    assert judged(BUNDLE, BY_SIGSTORE) == ({}, {"provenance.signature": "fail"})
    assert contents(home) == before


@pytest.mark.skipif(not VECTORS.is_dir(), reason="real evidence lies beside the repository, and is absent here")
@pytest.mark.usefixtures("home")
def test_a_real_bundle_is_judged_under_sigstores_own_root() -> None:
    folder = VECTORS / "sigstore" / "sigstore-python" / "bundle_v3_github_whl"
    artifact, bundle = (folder / "artifact.whl").read_bytes(), (folder / "bundle.sigstore").read_bytes()
    signer = {
        "identity": "https://github.com/trailofbits/rfc8785.py/.github/workflows/release.yml@refs/tags/v0.1.2",
        "issuer": "https://token.actions.githubusercontent.com",
    }
    good = Provenance(artifact, bundle=bundle)
    cases = {
        "as it is": (good, signer),
        "another artifact": (replace(good, payload=artifact + b" "), signer),
        "another bundle": (replace(good, bundle=b"{}"), signer),
        "another identity": (good, {**signer, "identity": signer["identity"][:-1] + "3"}),
        "another issuer": (good, {**signer, "issuer": "https://accounts.google.com"}),
    }
    got = {name: verifier._check_sigstore(each, Policy(sigstore=who)).verdict for name, (each, who) in cases.items()}
    assert got == {name: "pass" if name == "as it is" else "fail" for name in cases}


def test_a_sigstore_without_its_root_can_judge_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "_SIGSTORE_ROOT", ("_store", "absent.json"))
    factor = verifier._check_sigstore(BUNDLE, BY_SIGSTORE)
    assert (factor.verdict, factor.expected, factor.got) == ("fail", "sigstore's own root", "FileNotFoundError")


def test_without_the_extra_a_sigstore_signer_is_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sigstore.errors", None)
    with pytest.raises(WrongUse, match="not installed"):
        judged(BUNDLE, BY_SIGSTORE)


def test_own_and_signed_measurements_stand_beside_each_other() -> None:
    own, more = {"sim": ({"code": "a"},), "tdx": ({"mr_td": "b"},)}, {"tdx": ({"mr_td": "c"},), "sgx": ()}
    assert joined(own, more) == {"sim": ({"code": "a"},), "tdx": ({"mr_td": "b"}, {"mr_td": "c"}), "sgx": ()}


def with_provenance(world: World, provenance: Provenance) -> Document:
    return Document({**world.document().items, "provenance": provenance.item()})


def test_a_document_brings_its_measurements_along(world: World) -> None:
    measured = Payload(LAUNCH.deployment, 1, {"sim": (dict(MEASUREMENT.components()),)})
    asking = replace(world, pins={"measurements": {}, "measurements_signer": name(KEY)})
    factors = asking.verify(with_provenance(asking, signed(measured))).factors
    passed = {factor.step for factor in factors if isinstance(factor, Factor) and factor.verdict == "pass"}
    assert {*PASSED, "measurement.code"} <= passed


def test_a_document_whose_signed_measurements_were_changed_is_refused(world: World) -> None:
    asking = replace(world, pins={"measurements_signer": name(KEY)})
    with pytest.raises(VerificationFailed) as caught:
        asking.verify(with_provenance(asking, replace(signed(), signature=bytes(64))))
    assert failures(caught.value).keys() == {"provenance.signature"}
    with pytest.raises(VerificationFailed) as caught:
        asking.verify()
    assert failures(caught.value).keys() == {"provenance"}
    assert json.loads(json.dumps(failures(caught.value)["provenance"].to_json()))["expected"] == name(KEY)
