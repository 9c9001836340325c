import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.deploy.efi import CMDLINE, INITRD, OSREL, kernel, program, sdmagic, uki

from cloister.deploy.uki import parse_image
from cloister.errors import MalformedImage


def test_an_image_is_taken_apart() -> None:
    image = parse_image(uki())
    assert (image.stub, image.kernel_version) == (257, (6, 12))
    assert image.kernel.data == kernel()
    assert [name for name, _ in image.sections] == [".linux", ".osrel", ".cmdline", ".initrd", ".uname", ".sbat"]
    assert dict(image.sections)[".osrel"] == OSREL
    assert image.load_options == (CMDLINE.decode() + "\0").encode("utf-16-le")


def test_an_older_stub_measures_less() -> None:
    names = [name for name, _ in parse_image(uki("252.39-1~deb12u2")).sections]
    assert names == [".linux", ".osrel", ".cmdline", ".initrd"]


def test_a_signature_of_the_result_is_not_measured_and_its_key_is() -> None:
    image = parse_image(uki(pcrsig=b"{}", pcrpkey=b"a key"))
    assert [name for name, _ in image.sections][-1] == ".pcrpkey"
    assert ".pcrsig" not in dict(image.sections)


def test_the_kernel_is_handed_the_initrd_with_the_stubs_own_files_behind_it() -> None:
    image = parse_image(uki(ucode=b"microcode"))
    padded = INITRD + bytes(-len(INITRD) % 4)
    assert image.initrd.startswith(b"microcode" + bytes(3) + padded + b"070701")
    archive = image.initrd[12 + len(padded) :]
    assert len(archive) % 4 == 0
    assert archive.count(b"070701") == 3
    assert b".extra/os-release\0" in archive
    assert OSREL in archive
    assert archive.endswith(b"TRAILER!!!" + bytes(4))


def test_an_initrd_alone_is_handed_over_as_it_is() -> None:
    assert parse_image(uki("252.39", initrd=b"an odd one")).initrd == b"an odd one"
    assert parse_image(uki("252.39", initrd=b"an odd one", pcrsig=b"{}")).initrd.startswith(
        b"an odd one" + bytes(2) + b"070701"
    )
    assert parse_image(uki("257", osrel=None)).initrd == INITRD
    assert parse_image(uki("257", osrel=None, initrd=None)).initrd == b""


@pytest.mark.parametrize(
    ("written", "handed"),
    [(b"a b=c \n\t", "a b=c"), (b"a\0b", "a"), ("\u00fc".encode(), "\u00fc"), (b"x" * 4000, "x" * 4000)],
)
def test_the_command_line_is_handed_over_without_its_blank_end(written: bytes, handed: str) -> None:
    assert parse_image(uki(cmdline=written)).load_options == (handed + "\0").encode("utf-16-le")


def test_no_command_line_is_none() -> None:
    assert parse_image(uki(cmdline=None)).load_options == b""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (kernel(), "no kernel in it"),
        (uki(linux=b"no program"), "begin"),
        (uki(linux=program([(".text", b"x" * 2000)])), "not a Linux kernel"),
        (uki(linux=kernel("new")), "not a Linux kernel"),
        (uki("251.1"), "boot stub"),
        (uki("255.1"), "boot stub"),
        (uki("258.1"), "boot stub"),
        (uki(hwids=b"x"), "devices"),
        (uki(linux=kernel("5.15.0")), "not a Linux kernel"),
        (uki(sdmagic=b"#### LoaderInfo: another ####"), "boot stub"),
        (uki(sdmagic=None), "boot stub"),
        (uki(cmdline=b"\xff"), "UTF-8"),
        (uki(cmdline=b" a"), "command line"),
        (uki(cmdline=b"a\tb"), "command line"),
        (uki(cmdline=b"a\x7f b"), "command line"),
        (uki(cmdline=b" \n"), "command line"),
        (uki()[:-1], "cut short"),
    ],
)
def test_refuses_what_cannot_be_predicted(data: bytes, words: str) -> None:
    with pytest.raises(MalformedImage, match=words):
        parse_image(data)


def test_refuses_an_image_of_several_profiles() -> None:
    two = [
        (".sdmagic", sdmagic("257")),
        (".linux", kernel()),
        (".cmdline", b"a"),
        (".profile", b"ID=1"),
        (".cmdline", b"b"),
    ]
    with pytest.raises(MalformedImage, match="profiles"):
        parse_image(program(two))


@given(data=st.data())
def test_is_total_over_mangled_images(data: st.DataObject) -> None:
    whole = uki()
    at = data.draw(st.integers(0, len(whole)))
    junk = data.draw(st.binary(max_size=6))
    try:
        parse_image(whole[:at] + junk + whole[at + len(junk) :])
    except MalformedImage:
        return
