"""A systemd user service that runs a command of cloister, hardened by what needs no privilege and no namespace.

It is restarted when the enclave is out of reach, and not when it is refused: then a person has to look.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cloister.errors import Malformed, NotTrusted, WrongUse

__all__ = ["unit"]

_UNIT = """\
# cloister connect … --print-service > ~/.config/systemd/user/cloister.service
# systemctl --user daemon-reload && systemctl --user enable --now cloister
# An API key belongs into ~/.config/cloister/connect.env (chmod 600), as CLOISTER_API_KEY=…
[Unit]
Description=Verified enclaves as an OpenAI-compatible endpoint on this machine's loopback

[Service]
Type=exec
ExecStart={command}
EnvironmentFile=-%E/cloister/connect.env
Restart=on-failure
RestartSec=5
RestartPreventExitStatus={final}
UMask=0077
LimitCORE=0
NoNewPrivileges=yes
KeyringMode=private
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=default.target
"""


def unit(arguments: Sequence[str]) -> str:
    """`arguments`: of `cloister`, whose program is the one that runs now. Raises: WrongUse when that cannot be found."""
    final = " ".join(str(kind.exit_code) for kind in (WrongUse, NotTrusted, Malformed))
    return _UNIT.format(command=" ".join(map(_word, [_program(), *arguments])), final=final)


def _program() -> str:
    beside = Path(sys.executable).with_name("cloister")
    found = str(beside) if beside.is_file() else shutil.which("cloister")
    if found is None:
        raise WrongUse("The program `cloister` is not installed where a service would find it.", hint="pip install it.")
    return str(Path(found).absolute())


def _word(text: str) -> str:
    """One argument in systemd's quotes. Raises: WrongUse for what no unit can hold."""
    if not text.isprintable():
        raise WrongUse("An address or a file's name has control characters.", step="service")
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        text = text.replace(plain, escaped)
    return f'"{text}"'
