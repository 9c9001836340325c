from pathlib import Path

import pytest

from cloister.enclave import names
from cloister.enclave.names import name_servers, update

STATE = """# This is private data. Do not parse.
OPER_STATE=routable
ADDRESS_STATE=routable
DNS=10.0.2.3 fe80::3%eth0 10.0.2.3
NTP=10.0.2.9
DOMAINS=example.org
"""


def test_the_networks_name_servers_are_asked_in_its_order_each_once() -> None:
    assert name_servers(STATE) == ("10.0.2.3", "fe80::3%eth0")
    assert name_servers("DNS=1.1.1.1 2.2.2.2 3.3.3.3 4.4.4.4\n") == ("1.1.1.1", "2.2.2.2", "3.3.3.3")


@pytest.mark.parametrize(
    "state", ["", "DNS=\n", "NTP=10.0.2.9\n", "#DNS=10.0.2.3\n", "DNS=1.1.1.1:53#name options 10.0.2 nameserver"]
)
def test_what_is_no_address_is_passed_over(state: str) -> None:
    assert name_servers(state) == ()


def test_the_c_librarys_file_follows_and_keeps_the_last_that_were_known(tmp_path: Path) -> None:
    state, target = tmp_path / "state", tmp_path / "resolv.conf"
    update(state, target)
    assert not target.exists()
    state.write_text(STATE)
    update(state, target)
    assert target.read_text() == "nameserver 10.0.2.3\nnameserver fe80::3%eth0\n"
    written = target.stat().st_ino
    update(state, target)
    assert target.stat().st_ino == written  # nothing new, nothing written
    state.write_text("DNS=10.0.2.4\n")
    update(state, target)
    assert target.read_text() == "nameserver 10.0.2.4\n"
    state.write_text("DNS=\n")
    update(state, target)
    assert target.read_text() == "nameserver 10.0.2.4\n"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_images_own_file_leads_to_what_is_written() -> None:
    tree = Path(__file__).parents[2] / "packaging" / "image" / "tree"
    link = tree / "etc" / "resolv.conf"
    assert (link.parent / link.readlink()).resolve().relative_to(tree.resolve()) == names.TARGET.relative_to("/")
