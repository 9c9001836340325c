"""`cloister collateral fetch|show|export`: what vendors publish about their hardware, kept to verify offline."""

import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urldefrag, urlsplit

import typer

from cloister.cli import output
from cloister.cli.judgement import moment
from cloister.cli.output import AsJson
from cloister.cli.trust import AmdService, IntelService, NvidiaService, Offline
from cloister.cli.verify import Saved, is_address, read_saved
from cloister.client import Session
from cloister.collateral import (
    AMD_KDS,
    INTEL_PCS,
    NVIDIA_RIM,
    Addresses,
    Cache,
    Completed,
    Key,
    Piece,
    Reviewed,
    Vendor,
    complete,
    review,
)
from cloister.errors import ConnectionFailed, Malformed, NotTrusted, WrongUse
from cloister.evidence.document import parse_document
from cloister.evidence.statement import parse_statement
from cloister.verify import Policy
from cloister.verify.roots import PINNED

__all__ = ["register"]

Target = Annotated[
    str, typer.Argument(metavar="URL|FILE", help="An enclave, or a document that `verify --save` wrote.")
]

_DAY = 86400.0
_SOON = 7


def register(app: typer.Typer) -> None:
    app.callback()(_family)
    app.command("fetch")(fetch)
    app.command("show")(show)
    app.command("export")(export)


def _family() -> None:
    """Vendors' certificates, revocation lists and TCB info, for verifying offline."""


def fetch(
    target: Target,
    early: Annotated[bool, typer.Option("--early", help="Intel's early update set too, for the forecast.")] = False,
    intel: IntelService = INTEL_PCS,
    amd: AmdService = AMD_KDS,
    nvidia: NvidiaService = NVIDIA_RIM,
) -> None:
    """Ask the vendor for what verifying URL or FILE needs, check it, and keep it. Nothing about you is sent.

    The vendor learns which platform is asked about: Intel the model, AMD the very chip, NVIDIA its GPUs' firmware.
    """
    saved = _read(target)
    addresses = Addresses(intel, amd, nvidia)
    with Vendor(addresses) as vendor:
        fetched = [_complete(saved, vendor, addresses, now=_now(), refresh=True)]
        if early:
            fetched.append(_complete(saved, vendor, addresses, now=_now(), early=True))
    for completed in fetched:
        _tell(completed)
        if completed.not_stored:
            raise completed.not_stored
    _show_found({found.piece.key: found.piece for completed in fetched for found in completed.found})


def show(as_json: AsJson = False) -> None:
    """What is kept on this machine, for which platform, and until when. Everything is checked again; nobody is asked."""
    now = _now()
    reviewed = review(Cache(), roots=PINNED, now=now)
    if as_json:
        output.json_value([_to_json(each, now) for each in reviewed])
        return
    if not reviewed:
        output.note("Nothing is kept. `cloister collateral fetch URL|FILE` asks the vendor.", "dim")
        return
    _show_head()
    for each in reviewed:
        if each.piece is not None:
            _show_piece(each.piece, now)
        else:
            problem = f": {output.one_line(each.problem)}"
            output.line(output.styled((_row(each.entry.key), ""), ("not usable", "red"), (problem, "")), hang=47)


def export(
    target: Target,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The document to write.")],
    offline: Offline = False,
    intel: IntelService = INTEL_PCS,
    amd: AmdService = AMD_KDS,
    nvidia: NvidiaService = NVIDIA_RIM,
) -> None:
    """Write a document with the collateral inside, so that anybody can verify it later, offline, at its time."""
    saved = _read(target)
    addresses = Addresses(intel, amd, nvidia)
    with Vendor(addresses) as vendor:
        exported = _export(saved, None if offline else vendor, addresses)
    try:
        out.write_text(exported.encode() + "\n", encoding="ascii")
    except OSError as error:
        raise WrongUse(f"{out} cannot be written: {error.strerror}.") from error
    output.line(f"{out}  {out.stat().st_size:,} bytes")
    output.note(f"cloister verify {out}", "dim")


def _now() -> float:
    return time.time()


def _read(target: str) -> Saved:
    """The document as it is, believed or not: collateral is what believing it may still need."""
    if not is_address(target):
        return read_saved(Path(target))
    with Session(urldefrag(target).url, policy=Policy()) as session:
        try:
            session.verify()
        except (NotTrusted, Malformed):
            if not session.document:
                raise
        return Saved(session.document, session.nonce, _now())


def _complete(saved: Saved, vendor: Vendor | None, addresses: Addresses, **options: Any) -> Completed:
    def progress(key: Key, source: str) -> None:
        if source == Vendor.name:
            host = urlsplit(addresses.of(key)).hostname
            output.note(f"asking {host} for {output.one_line(key.what)}", "dim")

    document = parse_document(saved.document)
    return complete(document, vendor=vendor, cache=Cache(), roots=PINNED, progress=progress, **options)


def _export(saved: Saved, vendor: Vendor | None, addresses: Addresses) -> Saved:
    """Judged at the time it was saved where collateral of that time is to be had. Otherwise a little later: when the
    collateral that is to be had now was issued, if the evidence had not expired by then."""
    try:
        completed = _complete(saved, None, addresses, now=saved.at)
    except (ConnectionFailed, NotTrusted):
        completed = _complete(saved, vendor, addresses, now=_now())
    _tell(completed)
    at = max([saved.at, *(found.piece.issued for found in completed.found)])
    if at > saved.at:
        _check_alive(saved, at)
        output.note(f"to be judged as of {moment(at)}, when its collateral was issued", "dim")
    return replace(saved, document=completed.document.encode(), at=at)


def _check_alive(saved: Saved, at: float) -> None:
    statement = parse_document(saved.document).items.get("statement")
    if statement is None or parse_statement(statement.content).exp < at:
        message = "The evidence is older than any collateral to be had now."
        raise WrongUse(message, hint="Save it anew, and export it at once: cloister verify URL --save FILE")


def _tell(completed: Completed) -> None:
    for complaint in completed.complaints:
        output.note(output.one_line(complaint), "yellow")
    if not (completed.found or completed.complaints):
        output.note("This platform's evidence needs no collateral beyond what it brings along.", "dim")


def _show_found(found: Mapping[Key, Piece]) -> None:
    if found:
        _show_head()
    for piece in found.values():
        _show_piece(piece, _now())


def _show_head() -> None:
    output.line(f"{'what':<27}{'platform':<20}{'issued':<12}{'until':<10}  days left", "dim")


def _show_piece(piece: Piece, now: float) -> None:
    days = _days(piece.next_update, now)
    row = f"{_row(piece.key)}{_day(piece.issued)}  {_day(piece.next_update)}"
    output.line(output.styled((row, ""), (f"{days:>11}", "yellow" if days < _SOON else "")))


def _row(key: Key) -> str:
    return f"{output.one_line(key.what, 26):<26} {output.one_line(key.about, 19):<19} "


def _to_json(each: Reviewed, now: float) -> dict[str, Any]:
    key, piece = each.entry.key, each.piece
    return {
        "vendor": key.vendor,
        "kind": key.kind,
        "platform": key.platform,
        "usable": piece is not None,
        "problem": each.problem,
        "issued": piece.issued if piece else None,
        "next_update": piece.next_update if piece else None,
        "days_left": _days(piece.next_update, now) if piece else None,
        "fetched_at": each.entry.fetched_at,
    }


def _days(until: float, now: float) -> int:
    return int((until - now) // _DAY)


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")
