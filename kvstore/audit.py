"""Audit: the catalog's rows against each other and against the files, pure. Facts in, findings out.

Who gathers the facts (inspector) and who carries out repairs (inspector, checks) is apart. A row that is wrong in
several ways is reported once, for what is worst: each rule gets the rows that the rules before it left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .claims import Pin
from .document import Document, DocumentId
from .extent import Extent, ExtentId, named
from .findings import Code, Commit, Finding, Forget, Remove, ordered
from .geometry import extent_geometry
from .orders import DropPin, Record
from .seal import CHECKSUM_BYTES
from .slots import Slot
from .spec import KVSpec


class StoredExtent(NamedTuple):
    """An extent's row: what it is, its seal, and where it lies."""

    extent: Extent
    seal: bytes
    slot: Slot


class Unreadable(NamedTuple):
    """A row that cannot be decoded; `drop` takes it out, None where that would lose what only a person may."""

    table: str
    key: str
    reason: str
    drop: Record | None


class SlabFile(NamedTuple):
    """A file of an arena."""

    number: int
    serial: int
    path: str

    @property
    def place(self) -> tuple[str, int]:
        """Where only the newest counts."""
        return self.path.rpartition("/")[0], self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was found on disk. `segments` maps a segment's number to its file's size in bytes.

    `damage` says what reading an extent found, for those that were read and are not as sealed; `failed` what the device
    said of those it refused. `present` are the extents that a running daemon has a copy of; None when none runs.
    """

    integrity: tuple[str, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    specs: Mapping[bytes, KVSpec] = field(default_factory=dict)
    extents: tuple[StoredExtent, ...] = ()
    documents: tuple[Document, ...] = ()
    pins: tuple[Pin, ...] = ()
    nvme_directory: str
    segment_bytes: int
    segment_count: int
    segments: Mapping[int, int] = field(default_factory=dict)
    slabs: tuple[SlabFile, ...] = ()
    slab_count: int
    foreign: tuple[str, ...] = ()
    stale_address: str | None = None
    stale_socket: str | None = None
    damage: Mapping[ExtentId, str] = field(default_factory=dict)
    failed: Mapping[ExtentId, str] = field(default_factory=dict)
    present: Collection[ExtentId] | None = None

    @property
    def served(self) -> bool:
        """Whether a daemon works on the directory."""
        return self.present is not None


def audit(facts: Facts) -> list[Finding]:
    """Everything that is wrong, the worst first."""
    needed, found = _documents(facts)
    left = list(facts.extents)
    for rule in (_mismatched, _misplaced, _damaged, _overlapping, _mixed):
        wrong = list(rule(facts, left, needed))
        found += wrong
        gone = {finding.repair.extent for finding in wrong if isinstance(finding.repair, Forget)}
        left = [row for row in left if row.extent.id not in gone]
    found += _orphans(facts, left, needed)
    found += _holes(facts)
    found += _whole(facts)
    found += _files(facts, left)
    found += _budgets(facts, left)
    return ordered(found)


def readable(facts: Facts) -> list[StoredExtent]:
    """The rows that name bytes which are there, whatever they are: those that an audit of the data reads."""
    needed, _ = _documents(facts)
    left = list(facts.extents)
    for rule in (_mismatched, _misplaced):
        gone = {finding.repair.extent for finding in rule(facts, left, needed) if isinstance(finding.repair, Forget)}
        left = [row for row in left if row.extent.id not in gone]
    return left


def about(extent: Extent, owners: Sequence[DocumentId]) -> str:
    """What an extent is, for a person."""
    tokens = f"tokens [{extent.start}, {extent.stop})"
    return f"{extent.id}, {tokens} of {owners[0] if owners else f'tenant {extent.tenant}'}"


Needed = dict[ExtentId, list[tuple[DocumentId, Extent]]]


def _documents(facts: Facts) -> tuple[Needed, list[Finding]]:
    """Which documents need an extent, and as what; and the documents that make no sense."""
    needed: Needed = defaultdict(list)
    found: list[Finding] = []
    for document in facts.documents:
        name = str(document.id)
        spec = facts.specs.get(document.fingerprint)
        if spec is None:
            detail = f"no spec with fingerprint {document.fingerprint.hex()}"
            found.append(Finding(code=Code.DOCUMENT_WITHOUT_SPEC, subject=name, detail=detail))
            continue
        wanted = -(-document.token_count // spec.extent_tokens) * len(spec.groups)
        if document.token_count < 1 or len(document.extents) != wanted:
            detail = f"{document.token_count} tokens take {wanted} extents, its manifest has {len(document.extents)}"
            found.append(Finding(code=Code.DOCUMENT_ROW_MISMATCH, subject=name, detail=detail))
            continue
        for extent in named(document.extents, document.token_count, spec, document.id.tenant):
            needed[extent.id].append((document.id, extent))
    return needed, found


def _owners(needed: Needed, extent: ExtentId) -> list[DocumentId]:
    return [document for document, _ in needed.get(extent, ())]


def _bad(code: Code, row: StoredExtent, needed: Needed, detail: str) -> Finding:
    return Finding(
        code=code,
        subject=about(row.extent, _owners(needed, row.extent.id)),
        detail=detail,
        repair=Forget(row.extent.id),
    )


def _mismatched(facts: Facts, rows: Sequence[StoredExtent], needed: Needed) -> Iterator[Finding]:
    """Rows that are not what their model or their document says."""
    for row in rows:
        detail = _mismatch(facts, row, needed)
        if detail is not None:
            yield _bad(Code.EXTENT_ROW_MISMATCH, row, needed, detail)


def _mismatch(facts: Facts, row: StoredExtent, needed: Needed) -> str | None:
    extent = row.extent
    spec = facts.specs.get(extent.fingerprint)
    if spec is None or not 0 <= extent.group < len(spec.groups):
        return f"no spec with fingerprint {extent.fingerprint.hex()} and layer group {extent.group}"
    geometry = extent_geometry(spec, extent.group)
    if extent.slot_bytes != geometry.size_bytes:
        return f"its slot has {extent.slot_bytes} B, its model needs {geometry.size_bytes} B"
    if len(row.seal) != geometry.plane_count * CHECKSUM_BYTES:
        return f"{len(row.seal) // CHECKSUM_BYTES} checksums for {geometry.plane_count} planes"
    for document, expected in needed.get(extent.id, ()):
        ours = (extent.tenant, extent.fingerprint, extent.group, extent.start, extent.valid_tokens)
        theirs = (document.tenant, expected.fingerprint, expected.group, expected.start, expected.valid_tokens)
        if ours != theirs:
            return f"{document} needs tokens [{expected.start}, {expected.stop}) of group {expected.group} there"
    return None


def _misplaced(facts: Facts, rows: Sequence[StoredExtent], needed: Needed) -> Iterator[Finding]:
    """Rows that point to where no bytes are."""
    for row in rows:
        slot = row.slot
        end = _end(slot)
        size = facts.segments.get(slot.slab)
        if slot.slab < 0 or slot.offset < 0 or slot.offset % slot.size_bytes:
            detail = f"offset {slot.offset} of segment {slot.slab} is no slot of {slot.size_bytes} B"
            yield _bad(Code.EXTENT_ROW_OUTSIDE_SEGMENT, row, needed, detail)
        elif size is None:
            yield _bad(Code.SEGMENT_FILE_MISSING, row, needed, f"no segment-{slot.slab} in {facts.nvme_directory}")
        elif end > size:
            outside = end > facts.segment_bytes <= size
            code = Code.EXTENT_ROW_OUTSIDE_SEGMENT if outside else Code.SEGMENT_FILE_SHORT
            yield _bad(code, row, needed, f"it ends at {end}, segment-{slot.slab} at {size}")


def _damaged(facts: Facts, rows: Sequence[StoredExtent], needed: Needed) -> Iterator[Finding]:
    """Rows whose bytes were read and are not what was sealed."""
    for row in rows:
        extent = row.extent
        if extent.id in facts.damage and not _shares_slot(row, rows):
            yield _bad(Code.EXTENT_CORRUPT, row, needed, facts.damage[extent.id])
        if extent.id in facts.failed:
            subject = about(extent, _owners(needed, extent.id))
            yield Finding(code=Code.EXTENT_UNREADABLE, subject=subject, detail=facts.failed[extent.id])


def _shares_slot(row: StoredExtent, rows: Sequence[StoredExtent]) -> bool:
    return any(other is not row and _overlap(row.slot, other.slot) for other in rows)


def _overlap(one: Slot, other: Slot) -> bool:
    return one.slab == other.slab and one.offset < _end(other) and other.offset < _end(one)


def overlapping(rows: Sequence[StoredExtent]) -> list[StoredExtent]:
    """The rows whose bytes another row claims too: worth reading, for at most one of them is right."""
    segments: dict[int, list[StoredExtent]] = defaultdict(list)
    for row in rows:
        segments[row.slot.slab].append(row)
    found: dict[ExtentId, StoredExtent] = {}
    for segment in segments.values():  # one by one: a sort of all would hold up the daemon's other threads
        farthest = None
        for row in sorted(segment, key=lambda row: row.slot):
            if farthest is not None and _overlap(farthest.slot, row.slot):
                found |= {farthest.extent.id: farthest, row.extent.id: row}
            if farthest is None or _end(row.slot) > _end(farthest.slot):
                farthest = row
    return list(found.values())


def _end(slot: Slot) -> int:
    return slot.offset + slot.size_bytes


def _overlapping(facts: Facts, rows: Sequence[StoredExtent], needed: Needed) -> Iterator[Finding]:
    """Rows that claim the same bytes: those that are not as sealed go, else the later in the catalog's order."""
    order = {row.extent.id: place for place, row in enumerate(rows)}
    suspects = sorted(overlapping(rows), key=lambda row: (row.extent.id in facts.damage, order[row.extent.id]))
    kept: list[StoredExtent] = []
    for row in suspects:
        other = next((one for one in kept if _overlap(one.slot, row.slot)), None)
        if other is not None:
            detail = f"bytes {row.slot.offset} to {_end(row.slot)} of segment {row.slot.slab}"
            yield _bad(Code.SLOTS_OVERLAP, row, needed, f"{detail} are claimed by {other.extent.id} too")
        elif row.extent.id in facts.damage:
            yield _bad(Code.EXTENT_CORRUPT, row, needed, facts.damage[row.extent.id])
        else:
            kept.append(row)


def _mixed(_: Facts, rows: Sequence[StoredExtent], needed: Needed) -> Iterator[Finding]:
    """A segment serves one slot size at a time."""
    sizes: dict[int, int] = {}
    for row in rows:
        first = sizes.setdefault(row.slot.slab, row.slot.size_bytes)
        if row.slot.size_bytes != first:
            detail = f"segment {row.slot.slab} has slots of {first} B, this one has {row.slot.size_bytes} B"
            yield _bad(Code.SEGMENT_MIXED, row, needed, detail)


def _orphans(facts: Facts, rows: Sequence[StoredExtent], needed: Needed) -> Iterator[Finding]:
    """Rows that no document needs. While a daemon runs it knows better: see audit_state."""
    for row in rows:
        if row.extent.id not in needed and not facts.served:
            yield _bad(Code.EXTENT_ORPHAN, row, needed, "no document names it")


def _holes(facts: Facts) -> Iterator[Finding]:
    there = {row.extent.id for row in facts.extents}.union(facts.present or ())
    for document in facts.documents:
        if document.id.namespace is not None:
            continue  # an unnamed document loses its tail, and goes with the last of it
        missing = [extent for extent in document.extents if extent not in there]
        if missing:
            detail = f"{len(missing)} of {len(document.extents)} extents are gone"
            yield Finding(code=Code.DOCUMENT_HAS_HOLE, subject=str(document.id), detail=detail)


def _whole(facts: Facts) -> Iterator[Finding]:
    """What concerns the catalog as a whole, and pins."""
    for message in facts.integrity:
        yield Finding(code=Code.SQLITE_INTEGRITY, subject="catalog.sqlite", detail=message)
    for bad in facts.unreadable:
        repair = Commit(bad.drop) if bad.drop is not None else None
        yield Finding(code=Code.ROW_UNREADABLE, subject=f"{bad.table} {bad.key}", detail=bad.reason, repair=repair)
    documents = {document.id for document in facts.documents}
    for pin in facts.pins:
        if pin.document not in documents and not facts.served:
            repair = Commit(DropPin(*pin.document))
            detail = f"pinned to {pin.floor.label} by {pin.owner!r}"
            yield Finding(code=Code.PIN_WITHOUT_DOCUMENT, subject=str(pin.document), detail=detail, repair=repair)


def _files(facts: Facts, rows: Sequence[StoredExtent]) -> Iterator[Finding]:
    used = {row.slot.slab for row in rows}
    for number, size in sorted(facts.segments.items()):
        if number >= facts.segment_count if facts.served else number not in used:
            path = f"{facts.nvme_directory}/segment-{number}"
            detail = f"{size} B, no row names it"
            yield Finding(code=Code.SEGMENT_FILE_ORPHAN, subject=path, detail=detail, repair=Remove(path))
    newest: dict[tuple[str, int], int] = {}
    for slab in facts.slabs:
        newest[slab.place] = max(slab.serial, newest.get(slab.place, 0))
    for slab in facts.slabs:
        if slab.serial < newest[slab.place] or slab.number >= facts.slab_count:
            why = "a newer file has its number" if slab.serial < newest[slab.place] else "the budget has no such slab"
            yield Finding(code=Code.SLAB_FILE_ORPHAN, subject=slab.path, detail=why, repair=Remove(slab.path))
    for path in facts.foreign:
        yield Finding(code=Code.FOREIGN_FILE, subject=path, detail="no file of ours")
    for code, stale in ((Code.STALE_ADDRESS, facts.stale_address), (Code.STALE_SOCKET, facts.stale_socket)):
        if stale is not None:
            yield Finding(code=code, subject=stale, detail="nobody listens there", repair=Remove(stale))


def _budgets(facts: Facts, rows: Sequence[StoredExtent]) -> Iterator[Finding]:
    """What a daemon with this configuration would give up at its start."""
    beyond = [r for r in rows if r.slot.slab >= facts.segment_count or _end(r.slot) > facts.segment_bytes]
    if beyond:
        size = sum(row.slot.size_bytes for row in beyond)
        budget = f"{facts.segment_count} segments of {facts.segment_bytes} B"
        detail = f"{len(beyond)} extents ({size} B) lie outside the budget of {budget}"
        yield Finding(code=Code.BUDGET_EXCEEDED, subject="nvme", detail=detail)
