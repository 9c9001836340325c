import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cloister.enclave.machine import parse_line
from cloister.errors import WrongUse
from cloister.host.qemu import (
    SECTOR,
    BootLine,
    Machine,
    find_accelerator,
    find_tee,
    machine_command,
    tpm_command,
    tpm_server_command,
    tpm_setup_command,
)

LAUNCH_SHA256 = bytes(range(32))
VTPM = Machine(
    tee="vtpm",
    accelerator="tcg",
    kernel=Path("/i/cloister.efi"),
    firmware=Path("/f/OVMF.fd"),
    boot=Path("/r/boot"),
    launch_sha256=LAUNCH_SHA256,
    memory_bytes=2 << 30,
    cores=2,
    port=40001,
    tpm=Path("/r/tpm.sock"),
)
TDX = replace(VTPM, tee="tdx", accelerator="kvm", tpm=None)
SNP = replace(TDX, tee="sev-snp", cpu="EPYC-v4")

START = "setpriv --pdeathsig KILL -- qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none"
SANDBOX = "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny"
BOOT = (
    "-drive if=none,id=boot,format=raw,readonly=on,file=/r/boot -device virtio-blk-pci,drive=boot,serial=cloister-boot"
)
NETWORK = (
    "-netdev user,id=net,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:40001-10.0.2.15:8484 "
    "-device virtio-net-pci,netdev=net,romfile="
)
EVENTS = (
    "-chardev file,id=events,path=/dev/stdout -device virtio-serial-pci "
    "-device virtserialport,chardev=events,name=cloister.events -serial null -device virtio-rng-pci"
)


def test_a_machine_with_a_software_tpm() -> None:
    assert " ".join(machine_command(VTPM)) == (
        f"{START} {SANDBOX} -machine q35,smm=off -accel tcg,thread=multi -cpu max -smp 2 -m 2048M "
        f"-bios /f/OVMF.fd -kernel /i/cloister.efi {BOOT} {NETWORK} {EVENTS} "
        "-chardev socket,id=tpm,path=/r/tpm.sock -tpmdev emulator,id=tpm0,chardev=tpm -device tpm-crb,tpmdev=tpm0"
    )


def test_a_second_port_leads_to_the_tls_listener() -> None:
    command = machine_command(replace(VTPM, tls_port=40002))
    forwards = "hostfwd=tcp:127.0.0.1:40001-10.0.2.15:8484,hostfwd=tcp:127.0.0.1:40002-10.0.2.15:8443"
    assert command[command.index("-netdev") + 1] == f"user,id=net,restrict=on,ipv6=off,{forwards}"


def test_a_trust_domain_is_made_with_the_launch_digest_in_its_configuration() -> None:
    command = machine_command(TDX)
    launch = base64.b64encode(LAUNCH_SHA256 + bytes(16)).decode()
    assert json.loads(command[command.index("-object") + 1]) == {
        "qom-type": "tdx-guest",
        "id": "tee",
        "mrconfigid": launch,
        "quote-generation-socket": {"type": "vsock", "cid": "2", "port": "4050"},
    }
    board = "q35,accel=kvm,kernel-irqchip=split,smm=off,hpet=off,confidential-guest-support=tee"
    assert command[command.index("-machine") + 1] == board
    assert command[command.index("-cpu") + 1] == "host"
    assert "-tpmdev" not in command


def test_a_snp_guest_is_made_with_the_launch_digest_and_the_kernels_hash() -> None:
    text = " ".join(machine_command(SNP))
    host_data = base64.b64encode(LAUNCH_SHA256).decode()
    guest = f"sev-snp-guest,id=tee,cbitpos=51,reduced-phys-bits=1,policy=0x30000,kernel-hashes=on,host-data={host_data}"
    assert f"-object {guest} -object memory-backend-memfd,id=ram,size=2048M,share=true,prealloc=false" in text
    assert "-machine q35,accel=kvm,smm=off,confidential-guest-support=tee,memory-backend=ram -cpu EPYC-v4 " in text
    assert "-append" not in text
    assert "-initrd" not in text


def test_the_network_is_closed_unless_the_launch_config_opens_it() -> None:
    assert "restrict=on," in " ".join(machine_command(VTPM))
    assert "restrict=off," in " ".join(machine_command(replace(VTPM, egress=True)))


def test_disks_are_never_written_and_their_names_are_no_options() -> None:
    command = machine_command(replace(VTPM, data=Path("/r/a,snapshot=off"), root=Path("/i/cloister.raw")))
    drives = [command[at + 1] for at, word in enumerate(command) if word == "-drive"]
    assert [drive.partition(",file=")[2] for drive in drives] == ["/r/boot", "/r/a,,snapshot=off", "/i/cloister.raw"]
    assert all(",format=raw,readonly=on," in drive for drive in drives)


@pytest.mark.parametrize(
    "changes",
    [
        {"tpm": None},
        {"tee": "sgx"},
        {"accelerator": "hvf"},
        {"tee": "tdx", "tpm": None},
        {"tee": "sev-snp", "accelerator": "kvm"},
        {"launch_sha256": bytes(31)},
        {"cpu": "max,+sgx"},
        {"memory_bytes": 1 << 20},
        {"cores": 0},
    ],
)
def test_refuses_machines_that_cannot_be(changes: dict[str, object]) -> None:
    with pytest.raises(WrongUse):
        replace(VTPM, **changes)  # type: ignore[arg-type]


def test_the_software_tpm_is_a_new_one_and_ends_with_the_machine() -> None:
    assert " ".join(tpm_setup_command(Path("/r/tpm"))) == "swtpm_setup --tpm2 --tpmstate /r/tpm --pcr-banks sha256"
    assert " ".join(tpm_command(Path("/r/tpm"), Path("/r/tpm.sock"))) == (
        "setpriv --pdeathsig KILL -- swtpm socket --tpm2 --terminate --tpmstate dir=/r/tpm "
        "--ctrl type=unixio,path=/r/tpm.sock"
    )


def test_the_software_tpm_can_be_asked_before_anything_boots() -> None:
    assert " ".join(tpm_server_command(Path("/r/tpm"), Path("/r/s"))) == (
        "setpriv --pdeathsig KILL -- swtpm socket --tpm2 --flags startup-clear --tpmstate dir=/r/tpm "
        "--server type=unixio,path=/r/s --ctrl type=unixio,path=/r/s.ctrl"
    )


def test_the_guest_reads_what_the_host_wrote() -> None:
    line = BootLine(launch=b'{"v":1}', config=b"{}", data="model", data_bytes=77, model_name="tiny").encode()
    assert len(line) % SECTOR == 0
    assert line.startswith(b'{"')
    read = parse_line(line)
    assert (read.launch, read.config, read.data, read.data_bytes) == (b'{"v":1}', b"{}", "model", 77)
    assert (read.model_name, read.port) == ("tiny", 8484)


@pytest.mark.parametrize(
    ("files", "tee"),
    [
        ({}, None),
        ({"kvm_intel/parameters/tdx": "Y\n"}, "tdx"),
        ({"kvm_amd/parameters/sev_snp": "1"}, "sev-snp"),
        ({"kvm_intel/parameters/tdx": "N\n", "kvm_amd/parameters/sev_snp": "N"}, None),
    ],
)
def test_finds_what_kvm_can_start_guests_in(tmp_path: Path, files: dict[str, str], tee: str | None) -> None:
    for name, text in files.items():
        path = tmp_path / "sys/module" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert find_tee(tmp_path) == tee


def test_emulates_where_kvm_is_not_or_the_cpu_runs_no_guests(tmp_path: Path) -> None:
    for name in ("dev", "proc"):
        (tmp_path / name).mkdir()
    cpu = tmp_path / "proc/cpuinfo"
    cpu.write_text("flags\t\t: fpu vmx sse\n")
    assert find_accelerator(tmp_path) == "tcg"
    (tmp_path / "dev/kvm").touch()
    assert find_accelerator(tmp_path) == "kvm"
    cpu.write_text("flags\t\t: fpu svm\n")
    assert find_accelerator(tmp_path) == "kvm"
    cpu.write_text("flags\t\t: fpu vmxoff\n")
    assert find_accelerator(tmp_path) == "tcg"
    cpu.unlink()
    assert find_accelerator(tmp_path) == "tcg"
