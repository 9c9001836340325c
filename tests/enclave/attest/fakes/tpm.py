"""A TPM 2.0 behind the tpm2-tools' command lines: PCRs, NV indices with their sizes, restricted keys, real quotes."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import rsa
from tests.vendors import tpm as vendor

from cloister.enclave.attest.tpm import EK_CERTIFICATE_RSA, Output
from cloister.errors import ConnectionFailed
from cloister.evidence.tpm import public_area, sized

EK_ATTRIBUTES = 0x000300B2


@dataclass
class FakeTpm:
    """`persistent`: handle -> key that the provider left. `race`: what happens between a quote and the PCRs' reading.

    `on_nv_write`, `on_nv_read`: what a paravisor does once an index was written, and before it is read. `change`: name of a file -> what comes instead of it.
    """

    pcrs: dict[int, bytes] = field(default_factory=lambda: dict.fromkeys(range(24), bytes(32)))
    nv: dict[int, bytes] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    persistent: dict[int, vendor.Tpm] = field(default_factory=dict)
    race: Callable[["FakeTpm"], None] | None = None
    on_nv_write: Callable[["FakeTpm", int], None] | None = None
    on_nv_read: Callable[["FakeTpm", int], None] | None = None
    change: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    ek: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))
    primary: vendor.Tpm = field(default_factory=vendor.Tpm)
    commands: list[Sequence[str]] = field(default_factory=list)
    _contexts: dict[bytes, vendor.Tpm] = field(default_factory=dict)

    def run(
        self, command: Sequence[str], *, inputs: Mapping[str, bytes] | None = None, outputs: Sequence[str] = ()
    ) -> Output:
        self.commands.append(tuple(command))
        tool, *arguments = command
        options = {name: arguments[at + 1] for at, name in enumerate(arguments[:-1]) if name.startswith("-")}
        files = dict(inputs or {})
        stdout = getattr(self, f"_{tool.removeprefix('tpm2_')}")(arguments, options, files)
        for name, change in self.change.items():
            if name in files and name in outputs:
                files[name] = change(files[name])
        if missing := [name for name in outputs if name not in files]:
            raise ConnectionFailed(f"{tool} left no {missing[0]}.")
        return Output(stdout or b"", {name: files[name] for name in outputs})

    def extend(self, index: int, digest: bytes) -> None:
        self.pcrs[index] = hashlib.sha256(self.pcrs[index] + digest).digest()

    def define(self, index: int, content: bytes) -> None:
        self.nv[index] = content
        self.sizes[index] = len(content)

    def ak(self, context: bytes) -> vendor.Tpm:
        return self._contexts[context]

    def _pcrread(self, arguments: Sequence[str], options: Mapping[str, str], files: dict[str, bytes]) -> None:
        files[options["-o"]] = self.pcrs[int(arguments[0].removeprefix("sha256:"))]

    def _pcrextend(self, arguments: Sequence[str], options: Mapping[str, str], files: dict[str, bytes]) -> None:
        index, _, digest = arguments[0].partition(":sha256=")
        if len(digest) != 64:
            raise ConnectionFailed("tpm2_pcrextend failed.")
        self.extend(int(index), bytes.fromhex(digest))

    def _getcap(self, arguments: Sequence[str], options: Mapping[str, str], files: dict[str, bytes]) -> bytes:
        assert arguments == ["handles-nv-index"]
        return "".join(f"- {index:#x}\n".upper().replace("0X", "0x") for index in sorted(self.sizes)).encode()

    def _nvdefine(self, arguments: Sequence[str], options: Mapping[str, str], files: dict[str, bytes]) -> None:
        index = self._index(arguments)
        if index in self.sizes or options["-C"] != "o":
            raise ConnectionFailed("tpm2_nvdefine failed.")
        self.sizes[index] = int(options["-s"])

    def _nvread(self, arguments: Sequence[str], options: Mapping[str, str], files: dict[str, bytes]) -> None:
        index = self._index(arguments)
        if self.on_nv_read is not None:
            self.on_nv_read(self, index)
        if index not in self.nv or options["-C"] != "o":  # undefined, or never written
            raise ConnectionFailed("tpm2_nvread failed.", got="Esys_TR_FromTPMPublic(0x18B)")
        files[options["-o"]] = self.nv[index]

    def _nvwrite(self, arguments: Sequence[str], options: Mapping[str, str], files: dict[str, bytes]) -> None:
        index, data = self._index(arguments), files[options["-i"]]
        if index not in self.sizes or len(data) > self.sizes[index]:
            raise ConnectionFailed("tpm2_nvwrite failed.")
        self.nv[index] = data + self.nv.get(index, bytes(self.sizes[index]))[len(data) :]
        if self.on_nv_write is not None:
            self.on_nv_write(self, index)

    def _createek(self, arguments: Sequence[str], options: Mapping[str, str], files: dict[str, bytes]) -> None:
        area = public_area(self.ek.public_key(), attributes=EK_ATTRIBUTES)
        files[options["-u"]] = sized(area)
        files[options["-c"]] = b"context of the endorsement key"

    def _createprimary(self, arguments: Sequence[str], options: Mapping[str, str], files: dict[str, bytes]) -> None:
        assert (options["-C"], options["-G"]) == ("e", "ecc256:ecdsa-sha256:null")
        assert {"restricted", "sign", "fixedtpm", "fixedparent"} <= set(options["-a"].split("|"))
        context = f"context {len(self._contexts)}".encode()
        self._contexts[context] = self.primary
        files[options["-c"]] = context

    def _readpublic(self, arguments: Sequence[str], options: Mapping[str, str], files: dict[str, bytes]) -> None:
        files[options["-o"]] = sized(self._key(options["-c"], files).area)

    def _quote(self, arguments: Sequence[str], options: Mapping[str, str], files: dict[str, bytes]) -> None:
        key = self._key(options["-c"], files)
        bank, _, listed = options["-l"].partition(":")
        assert (bank, options["-F"], options["-g"]) == ("sha256", "values", "sha256")
        chosen = {int(index): self.pcrs[int(index)] for index in listed.split(",")}
        message = vendor.quote(bytes.fromhex(options["-q"]), chosen, signer=key.signer)
        files[options["-m"]], files[options["-s"]] = message, vendor.sign(message, key.key)
        if self.race is not None:
            self.race(self)
        files[options["-o"]] = b"".join(self.pcrs[index] for index in sorted(chosen))

    def _key(self, named: str, files: Mapping[str, bytes]) -> vendor.Tpm:
        if named.startswith("0x"):
            if int(named, 16) not in self.persistent:
                raise ConnectionFailed("tpm2_readpublic failed.")
            return self.persistent[int(named, 16)]
        return self._contexts[files[named]]

    @staticmethod
    def _index(arguments: Sequence[str]) -> int:
        return int(arguments[0], 16)


def with_ek_certificate(der: bytes, reserved: int = 1600) -> FakeTpm:
    fake = FakeTpm()
    fake.define(EK_CERTIFICATE_RSA, der.ljust(reserved, b"\0"))
    return fake
