"""A document with all collateral that judging it needs: its own where that is good, a cache's, or the vendor's."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from typing import ClassVar, TypeAlias

from cloister.collateral import amd, intel, nvidia, tpm
from cloister.collateral.pieces import Answer, CollateralSource, Key, Piece, Pieces
from cloister.collateral.store import Cache, Entry
from cloister.errors import ConnectionFailed, Malformed, MalformedEvidence, NotTrusted, Unreachable, WrongUse
from cloister.evidence.document import Document, gpu_labels
from cloister.evidence.endorsements import MAX_LIST, MAX_RIMS, MEDIA_TYPE, Endorsements, parse_endorsements
from cloister.evidence.nvidia import parse_gpu
from cloister.evidence.sev_snp import REPORT_SIZE, parse_report
from cloister.evidence.tpm import parse_tpm
from cloister.verify import rim
from cloister.verify.roots import PINNED, Roots

__all__ = ["Completed", "Found", "Progress", "Reviewed", "complete", "review"]

Progress: TypeAlias = Callable[[Key, str], None]
"""Called with a piece's key and the name of the source that is about to be asked for it."""

_RAW = "application/octet-stream"
_NO_EXTRA = "NVIDIA's manifests for the GPUs are not asked for: judging them takes pip install 'cloister[rim]'."


@dataclass(frozen=True, slots=True)
class Found:
    """A checked piece and where it came from: "document", "cache" or "vendor"."""

    piece: Piece
    source: str


@dataclass(frozen=True, slots=True)
class Completed:
    """`document` is the one given, or one that differs in its `endorsements` alone, which nothing signs as a whole.

    `found` is empty where the platform needs no collateral. `complaints`: sources passed over, and why. `not_stored`:
    why the cache could not keep what the vendor said.
    """

    document: Document
    found: tuple[Found, ...] = ()
    complaints: tuple[str, ...] = ()
    not_stored: WrongUse | None = None

    @property
    def intel(self) -> bytes | None:
        """`endorsements.intel` of the document: what `verify.intel` takes beside a quote."""
        return _endorsements(self.document).intel


@dataclass(frozen=True, slots=True)
class _Carried:
    """The document's own collateral as a `CollateralSource`."""

    answers: Mapping[str, Answer]
    name: ClassVar[str] = "document"

    def get(self, key: Key) -> Answer | None:
        return self.answers.get(key.kind)


@dataclass(slots=True, kw_only=True)
class _Search:
    """What is asked, what makes an answer good, and what happened on the way."""

    cache: Cache | None
    vendor: CollateralSource | None
    roots: Roots
    now: float
    refresh: bool
    progress: Progress
    complaints: list[str] = field(default_factory=list)
    not_stored: WrongUse | None = None

    def gather(self, keys: Iterable[Key], document: Document) -> tuple[Found, ...]:
        self.complaints = []
        return self._gather(keys, self._own(document))

    def gather_manifests(self, keys: Sequence[Key], carried: Mapping[str, bytes]) -> tuple[Found, ...]:
        """All of one device's, or none: one without the other convicts the device instead of saying nothing."""
        names = {key.kind: nvidia.name_of(key) for key in keys}
        own = {kind: Answer(carried[name]) for kind, name in names.items() if name in carried}
        try:
            return self._gather(keys, _Carried(own))
        except (Unreachable, NotTrusted, Malformed) as error:
            self.complaints.append(error.message)
            return ()

    def find_list(self, point: tpm.Point, carried: Sequence[bytes]) -> Found | None:
        own = point.own(carried)
        sources = [_Carried({tpm.CRL: own} if own is not None else {}), self.cache, self.vendor]
        try:
            return self._find(point.key, [one for one in sources if one is not None], {}, issuers=point.chain)
        except (Unreachable, NotTrusted, Malformed) as error:
            self.complaints.append(error.message)
            return None

    def _gather(self, keys: Iterable[Key], own: _Carried) -> tuple[Found, ...]:
        sources = [own, self.cache, self.vendor]
        present = [source for source in sources if source is not None]
        found: dict[str, Found] = {}
        for key in keys:
            found[key.kind] = self._find(key, present, {kind: each.piece for kind, each in found.items()})
        return tuple(found.values())

    def _own(self, document: Document) -> _Carried:
        carried = _endorsements(document)
        try:
            cpu = document.items["cpu"].content
            if len(cpu) == REPORT_SIZE:
                return _Carried(amd.answers_of(carried))
            return _Carried(intel.answers_of(carried.intel, cpu) if carried.intel is not None else {})
        except MalformedEvidence as error:
            self.complaints.append(f"{_Carried.name}: {error.message}")
            return _Carried({})

    def _find(self, key: Key, sources: Sequence[CollateralSource], before: Pieces, issuers: bytes = b"") -> Found:
        """The first good answer; `issuers`: those that the document names, where an answer brings none. What is wrong with the vendor's is raised, with another's noted."""
        for source in sources:
            lasting = key.kind in amd.LEAVES.values()  # a certificate of a chip, or of a cloud, stays what it is
            if self.refresh and source is not self.vendor and not lasting:
                continue
            self.progress(key, source.name)
            try:
                answer = source.get(key)
                if answer is not None and issuers:
                    answer = replace(answer, chain=issuers)
                piece = self._checked(key, answer, before)
            except (NotTrusted, Malformed) as error:
                if source is self.vendor:
                    raise
                self.complaints.append(f"{source.name}: {error.message}")
                continue
            if piece is not None:
                return self._kept(piece, before) if source is self.vendor else Found(piece, source.name)
        raise _nowhere(key, self.complaints, asked=self.vendor is not None)

    def _checked(self, key: Key, answer: Answer | None, before: Pieces) -> Piece | None:
        return _check(key, answer, before, self.roots, self.now) if answer is not None else None

    def _kept(self, piece: Piece, before: Pieces) -> Found:
        """What was seen once gives way to nothing older, even if the vendor, or who poses as the vendor, says so."""
        if self.cache is None or self.vendor is None:
            return Found(piece, "vendor")
        try:
            known = self._checked(piece.key, self.cache.get(piece.key), before)
        except (NotTrusted, Malformed):
            known = None
        if known is not None and known.issued > piece.issued:
            self.complaints.append(f"{self.vendor.name}: {piece.key} is older than what is kept here.")
            return Found(known, self.cache.name)
        try:
            self.cache.put(piece.key, piece.answer, self.now)
        except WrongUse as error:
            self.not_stored = error
        return Found(piece, self.vendor.name)


class _Unknown(ConnectionFailed):
    """No source knows this key."""


def _nowhere(key: Key, complaints: Sequence[str], *, asked: bool) -> _Unknown:
    message = f"The vendor does not know {key}." if asked else f"{key} is not here, and the vendor may not be asked."
    hint = "Is this a production platform? A PCCS knows only the platforms of its operator."
    if not asked:
        hint = "Once, with a network: `cloister collateral fetch` for the same document or enclave."
    return _Unknown(message, step=f"collateral.{key.kind}", got="; ".join(complaints)[:400] or None, hint=hint)


def complete(
    document: Document,
    *,
    vendor: CollateralSource | None,
    cache: Cache | None = None,
    roots: Roots = PINNED,
    now: float,
    early: bool = False,
    refresh: bool = False,
    progress: Progress | None = None,
) -> Completed:
    """The document with good collateral for its CPU, GPUs and TPM, piece by piece from the first source that has one.

    (1) the document itself: where all of it is good, the document comes back as it was, and nobody is asked
    (2) `cache`
    (3) `vendor`; None: nobody is asked

    Good is what is signed under the vendor's pinned root, about this platform, and fresh at `now` (Unix seconds). All
    of it is checked here before it is used or kept, and judged again, with the evidence, by `verify`. A cached piece is
    never replaced by an older one. `early` asks for Intel's early update set instead of the standard one: of no use as
    a standard, it tells how far behind a platform will be. `refresh` passes over document and cache, but for the
    certificate of an AMD chip or its cloud, which stays what it is.

    Manifests for GPUs and revocation lists for a TPM's certificates are no condition here: those that are not to be had (or
    cannot be judged, without the extra `rim`) leave a complaint, for the judgement to miss. GPUs and TPMs bring their own
    certificates, which say where lists are: they are asked there, once they lead to a pinned root.

    Does not check the evidence itself, nor its nonce.

    Raises: Unreachable when a piece is nowhere to be had; NotTrusted or Malformed for what the vendor's service said;
    MalformedEvidence for evidence or endorsements that cannot be read.
    """
    carried = _endorsements(document)
    alternatives = _alternatives(document, carried, early=early)
    search = _Search(cache=cache, vendor=vendor, roots=roots, now=now, refresh=refresh, progress=progress or _silent)
    completed = _with_manifests(_with_collateral(document, carried, alternatives, search), search)
    return _with_lists(completed, search)


def _with_collateral(
    document: Document, carried: Endorsements, alternatives: Sequence[tuple[Key, ...]], search: _Search
) -> Completed:
    for keys in alternatives[:-1]:
        with suppress(_Unknown):
            return _completed(document, carried, search.gather(keys, document), search)
    if alternatives:
        return _completed(document, carried, search.gather(alternatives[-1], document), search)
    return Completed(document)


def _with_manifests(completed: Completed, search: _Search) -> Completed:
    """NVIDIA's, for every kind of device beside the CPU."""
    document, carried = completed.document, _endorsements(completed.document)
    wanted = dict.fromkeys(filter(None, (_manifest_keys(document, label) for label in gpu_labels(document))))
    if not wanted:
        return completed
    if not rim.judgeable():
        return replace(completed, complaints=(*completed.complaints, _NO_EXTRA))
    search.complaints = list(completed.complaints)
    found = {each.piece.key: each for keys in wanted for each in search.gather_manifests(keys, carried.rims)}
    rims = {**carried.rims, **{nvidia.name_of(key): each.piece.answer.body for key, each in found.items()}}
    if len(rims) > MAX_RIMS:
        rims, found = dict(carried.rims), {}
        search.complaints.append(f"These are more than {MAX_RIMS} manifests: no document holds as many.")
    if rims != carried.rims:
        document = Document({**document.items, "endorsements": replace(carried, rims=rims).item()})
    return Completed(document, (*completed.found, *found.values()), tuple(search.complaints), search.not_stored)


def _with_lists(completed: Completed, search: _Search) -> Completed:
    """Those that the certificates of a TPM's attestation key name."""
    document, carried = completed.document, _endorsements(completed.document)
    search.complaints = list(completed.complaints)
    wanted = [search.find_list(point, carried.tpm_crls) for point in _points(document, search)]
    found = [each for each in wanted if each is not None]
    if any(each.source != _Carried.name for each in found):
        lists = dict.fromkeys((*(each.piece.answer.body for each in found), *carried.tpm_crls))
        endorsements = replace(carried, tpm_crls=tuple(lists)[:MAX_LIST])
        document = Document({**document.items, "endorsements": endorsements.item()})
    return Completed(document, (*completed.found, *found), tuple(search.complaints), search.not_stored)


def _points(document: Document, search: _Search) -> tuple[tpm.Point, ...]:
    """() for what is no TPM's evidence, or names no certificate: it is for the judgement to say so."""
    item = document.items.get("tpm")
    with suppress(MalformedEvidence):
        certificates = parse_tpm(item.content).certificates if item is not None else ()
        return tpm.points_of(certificates, roots=search.roots.ak, now=search.now) if certificates else ()
    return ()


def _manifest_keys(document: Document, label: str) -> tuple[Key, ...]:
    """() for what is no GPU's evidence: it is for the judgement to say so."""
    with suppress(MalformedEvidence):
        return nvidia.keys_of(parse_gpu(document.items[label].content))
    return ()


def _silent(_key: Key, _source: str) -> None:
    pass


def _check(key: Key, answer: Answer, before: Pieces, roots: Roots, now: float) -> Piece:
    if key.vendor == intel.VENDOR:
        return intel.check(key, answer, found=before, root=roots.intel, now=now)
    if key.vendor == tpm.VENDOR:
        return tpm.check(key, answer, roots=roots.ak, now=now)
    if key.vendor == nvidia.VENDOR:
        return nvidia.check(key, answer, root_sha256=roots.rim, now=now)
    return amd.check(key, answer, found=before, roots=roots.amd, now=now)


def _endorsements(document: Document) -> Endorsements:
    item = document.items.get("endorsements")
    return parse_endorsements(item.content) if item is not None and item.media_type == MEDIA_TYPE else Endorsements()


def _alternatives(document: Document, carried: Endorsements, *, early: bool) -> list[tuple[Key, ...]]:
    """What the evidence needs; more than one entry where it does not say which product made it."""
    cpu = document.items.get("cpu")
    if cpu is None or cpu.media_type != _RAW:
        return []
    if len(cpu.content) != REPORT_SIZE:
        return [intel.keys_of(cpu.content, early=early)]
    report = parse_report(cpu.content)
    return [amd.keys_of(report, product) for product in amd.products_of(report, carried)]


def _completed(document: Document, carried: Endorsements, found: tuple[Found, ...], search: _Search) -> Completed:
    if any(each.source != _Carried.name for each in found):
        pieces = {each.piece.key.kind: each.piece for each in found}
        if found[0].piece.key.vendor == intel.VENDOR:
            endorsements = replace(carried, intel=intel.collateral_json(pieces))
        else:
            chain, crl = amd.endorsed(pieces)
            endorsements = replace(carried, amd=chain, amd_crl=crl)
        document = Document({**document.items, "endorsements": endorsements.item()})
    return Completed(document, found, tuple(search.complaints), search.not_stored)


@dataclass(frozen=True, slots=True)
class Reviewed:
    """An entry of the cache; `piece` None when it is not good, and `problem` says why."""

    entry: Entry
    piece: Piece | None
    problem: str = ""


def review(cache: Cache, *, roots: Roots = PINNED, now: float) -> tuple[Reviewed, ...]:
    """Everything in the cache, checked as if it were to be used at `now`. Asks nobody."""
    before: dict[str, dict[str, Piece]] = {}
    reviewed = []
    for entry in sorted(cache.entries(), key=lambda entry: _rank(entry.key)):
        known = before.setdefault(_family(entry.key), {})
        try:
            piece = _check(entry.key, entry.answer, known, roots, now)
        except (NotTrusted, Malformed) as error:
            reviewed.append(Reviewed(entry, None, error.message + (f" ({error.got})" if error.got else "")))
        else:
            known[entry.key.kind] = piece
            reviewed.append(Reviewed(entry, piece))
    return tuple(sorted(reviewed, key=lambda each: astuple(each.entry.key)))


def _rank(key: Key) -> int:
    """What others are checked with comes first."""
    if key.kind == intel.PCK_CRL or key.kind.endswith(amd.CA):
        return 0
    return 1 if key.kind == intel.ROOT_CRL or key.kind.endswith(amd.CRL) else 2


def _family(key: Key) -> str:
    return (
        key.vendor if key.vendor == intel.VENDOR else f"{key.kind.partition('-')[0]} {key.platform.partition('-')[0]}"
    )
