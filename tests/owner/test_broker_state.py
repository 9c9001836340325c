from dataclasses import replace
from pathlib import Path

import pytest

from cloister import private_file
from cloister.channel.release import ApiKeyHash
from cloister.errors import NotFound, NotTrusted, WrongUse
from cloister.owner.broker_state import BrokerKeys, Record, Records, make_root, read_root

KEYS = BrokerKeys.derive(bytes(range(32)))
RECORD = Record(
    deployment="acme",
    app="ab" * 32,
    keys={"code": b"k" * 32},
    secrets={"TOKEN": "canary-secret"},
    settings={"GREETING": "canary-setting"},
    api_keys=(ApiKeyHash("alice", "cd" * 32),),
    expires=2_000_000_000,
)


def records(folder: Path) -> Records:
    return Records(folder / "records", KEYS.records)


def test_one_root_gives_the_same_keys_each_time_and_each_purpose_its_own() -> None:
    """The values are fixed (HKDF of RFC 5869, computed apart): another derivation would be a broker whom no launch config names."""
    assert (
        BrokerKeys.derive(bytes(range(32))).name == KEYS.name == "ed25519:aymkM8yBq1nVCfYeUhAou5qxUG6j-jiueh_Ppv-5BVk"
    )
    assert KEYS.records.hex() == "af79fecf08d4ed44c5a892f793157898b04095525830a9901429d2428cc0da98"
    assert BrokerKeys.derive(bytes(32)).name != KEYS.name
    assert "private" not in repr(KEYS)
    assert KEYS.records.hex()[:8] not in repr(KEYS)


def test_a_root_is_made_once_for_its_user_alone(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    assert len(root) == 32
    assert make_root(tmp_path / "root") == read_root(tmp_path / "root") == root
    assert (tmp_path / "root").stat().st_mode & 0o777 == 0o600
    assert make_root(tmp_path / "other") != root


def test_a_root_that_others_can_read_is_refused(tmp_path: Path) -> None:
    make_root(tmp_path / "root")
    (tmp_path / "root").chmod(0o640)
    with pytest.raises(WrongUse):
        read_root(tmp_path / "root")


@pytest.mark.parametrize("content", ["", "AAAA\n", "!" * 43 + "\n", "A" * 42 + "B\n", "ä" * 43])
def test_what_is_no_root_is_refused(tmp_path: Path, content: str) -> None:
    private_file.write(tmp_path / "root", content.encode())
    with pytest.raises(WrongUse, match="no root"):
        read_root(tmp_path / "root")


def test_without_a_root_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongUse) as caught:
        read_root(tmp_path / "root")
    assert "init" in caught.value.hint


def test_a_record_comes_back_whole_and_rests_sealed(tmp_path: Path) -> None:
    records(tmp_path).save(RECORD)
    assert records(tmp_path).load("acme") == RECORD
    content = (tmp_path / "records" / "acme.record").read_bytes()
    assert b"canary" not in content
    assert b"k" * 32 not in content
    assert "canary" not in repr(RECORD)
    assert (tmp_path / "records" / "acme.record").stat().st_mode & 0o777 == 0o600


def test_no_bit_of_a_record_may_be_another(tmp_path: Path) -> None:
    records(tmp_path).save(RECORD)
    path = tmp_path / "records" / "acme.record"
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        private_file.write(path, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(NotTrusted):
            records(tmp_path).load("acme")


def test_a_record_under_another_deployments_name_or_root_does_not_open(tmp_path: Path) -> None:
    records(tmp_path).save(RECORD)
    path = tmp_path / "records" / "acme.record"
    private_file.write(tmp_path / "records" / "other.record", path.read_bytes())
    with pytest.raises(NotTrusted):
        records(tmp_path).load("other")
    with pytest.raises(NotTrusted):
        Records(tmp_path / "records", BrokerKeys.derive(bytes(32)).records).load("acme")


def test_what_was_never_handed_over_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        records(tmp_path).load("acme")
    for name in ("../acme", "", "a/b", "x" * 64):
        with pytest.raises(WrongUse):
            records(tmp_path).load(name)


def test_what_no_enclave_would_take_is_not_kept(tmp_path: Path) -> None:
    secrets = {f"S{number}": "x" * 60_000 for number in range(20)}
    with pytest.raises(WrongUse, match="1 MiB"):
        records(tmp_path).save(replace(RECORD, secrets=secrets))
    with pytest.raises(NotFound):
        records(tmp_path).load("acme")


def test_a_release_from_it_is_dated_now_and_ends_when_it_was_said() -> None:
    release = RECORD.release(1000.9)
    assert (release.time_floor, release.expires) == (1000, 2_000_000_000)
    assert (release.keys, release.secrets, release.settings) == (RECORD.keys, RECORD.secrets, RECORD.settings)
    assert release.api_keys == RECORD.api_keys
