"""`cloister verify URL --save-cert PEM`: the attested certificate in a file, for `curl --cacert` and its like."""

import re
import shlex
import time
from pathlib import Path
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.serialization import Encoding

from cloister import private_file
from cloister.cli import output
from cloister.cli.judgement import moment
from cloister.client.certificate import fetch_certificate, find_listener
from cloister.errors import WrongUse
from cloister.verify import Verified
from cloister.verify.tls import check_certificate

__all__ = ["keep_certificate"]

_WITH_PORT = re.compile(r"https://.+:[0-9]+")


def keep_certificate(path: Path, verified: Verified, url: str, at: str = "") -> None:
    """`at`: "host:port" of the TLS listener, "" for the statement's. What was in the file before stays unless the
    certificate is the enclave's.

    Raises: NotTrusted, MalformedEvidence, ConnectionFailed, WrongUse.
    """
    if verified.statement.tls_spki is None:
        raise WrongUse("This enclave has no TLS listener.", step="tls", hint="Its owner starts one with --tls.")
    host, port = _parse(at) if at else find_listener(verified, url)
    certificate = check_certificate(fetch_certificate(host, port), verified, time.time())
    try:
        private_file.write(path, certificate.public_bytes(Encoding.PEM))
    except OSError as error:
        raise WrongUse(f"{path} cannot be written: {error.strerror}.") from error
    until = moment(certificate.not_valid_after_utc.timestamp())
    output.note(f"certificate {path}: until {until}, or the enclave's next start; then verify again", hang=2)
    output.note(
        "TLS is weaker than the sealed channel: no padding, not post-quantum. Where it leads, only this file says."
    )
    output.note(f"curl --cacert {shlex.quote(str(path))} {_shown(verified, host, port)}")


def _parse(text: str) -> tuple[str, int]:
    """Raises: WrongUse."""
    try:
        parts = urlsplit(f"//{text}")
        if parts.hostname and parts.port and text == parts.netloc and "@" not in text:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise WrongUse(
        "--tls is no address.", hint="Such as 127.0.0.1:8443, or [::1]:8443.", step="tls", got=ascii(text)[:80]
    )


def _shown(verified: Verified, host: str, port: int) -> str:
    """An address to try, by a name that stands in the certificate: the host's that was asked, or else the first."""
    own = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    names = [name for name in verified.statement.aud if _WITH_PORT.fullmatch(name)]
    path = "/v1/models" if verified.launch.app.kind == "llm" else "/"
    return (own if own in names or not names else output.one_line(names[0], 80)) + path
